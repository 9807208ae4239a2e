"""The examples, on a small random model: what they answer is what sparse attention generates."""

import io
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.cli.transformers import app

from tests.helpers.paths import ROOT
from topk_llama import restore_model, set_params, update_model
from toptheta.models.loading import find_model, load_model, load_tokenizer

ENV = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
QUESTION = "Name three uses of a paper clip, and say why each of them works well."
K, STEPS = 1, 24


def example(name: str, folder: Path) -> str:
    """An example as a file, with a K that a model with random weights notices, and a short reply."""
    program = (ROOT / "examples" / name).read_text()
    assert "K=32" in program
    (folder / name).write_text(program.replace("K=32", f"K={K}").replace("tokens=48", f"tokens={STEPS}"))
    return str(folder / name)


def reply(folder_model: str, sparse: bool) -> str:
    """The greedy reply to the question, of attention as the examples set it or of dense attention."""
    source = find_model(folder_model)
    model, tokenizer = load_model(source), load_tokenizer(source)
    if sparse:
        set_params(update_model(model), mode=1, K=K, sdc="exact", vmc=True)
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_pipeline(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline.py", folder_model])
    runpy.run_path(example("pipeline.py", tmp_path), run_name="__main__")
    shown = capsys.readouterr().out.strip()
    assert shown == reply(folder_model, sparse=True).strip() != reply(folder_model, sparse=False).strip()


def test_ten_lines(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    program = (ROOT / "examples" / "ten_lines.py").read_text()
    (tmp_path / "ten_lines.py").write_text(program.replace("K=64", f"K={K}").replace("=64)", f"={STEPS})"))
    monkeypatch.setattr(sys, "argv", ["ten_lines.py", folder_model])
    names = runpy.run_path(str(tmp_path / "ten_lines.py"), run_name="__main__")
    prefill, decode, text = capsys.readouterr().out.split("\n", 2)
    for line, phase in ((prefill, "prefill"), (decode, "decode")):
        kept = re.fullmatch(rf"{phase}: (.+) % of the attention elements kept", line)
        assert kept is not None and 0 < float(kept[1]) < 50
    prompt, model = names["prompts"][0], restore_model(names["model"])
    length, dense = prompt["input_ids"].shape[1], model.generate(**prompt, max_new_tokens=STEPS)
    texts = [
        names["tokenizer"].decode(ids[0, length:], skip_special_tokens=True) for ids in (names["out"], dense)
    ]
    assert text.strip() == texts[0].strip() != texts[1].strip()


def test_ten_lines_are_those_of_the_readme() -> None:
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    lines = snippet[1].strip().split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("set_params"))
    program = (ROOT / "examples" / "ten_lines.py").read_text().split("\n")
    assert len(lines[start:]) == 6 and [line for line in program if line in lines[start:]] == lines[start:]


@pytest.fixture
def server(folder_model: str, tmp_path: Path) -> Iterator[str]:
    """The address of examples/serve.py with the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, example("serve.py", tmp_path), folder_model, "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--device", "cpu"], env=ENV, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_serve_and_chat(server: str, folder_model: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked = {
        "model": folder_model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": STEPS,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"]
    assert answer == reply(folder_model, sparse=True) != reply(folder_model, sparse=False)
    # The first of them may answer whether a reply that met its limit should go on.
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n" + "!exit\n" * 3))
    app(["chat", folder_model, server, "max_new_tokens=5", "--user", "me"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "<me>" in shown and f"<{folder_model}>" in shown
