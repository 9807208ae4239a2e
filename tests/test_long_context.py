"""Long prompts in chunks, and the long-context data sets end to end on a small folder model."""

import csv
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import tiny_config
from toptheta.eval.cli import settings_from_json
from toptheta.eval.settings import GenSettings
from toptheta.models import generation as chunked
from toptheta.models.control import record_statistics, set_params
from toptheta.models.patch import patched_layers, update_model
from toptheta.models.recorder import Recorder
from toptheta.util.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"mode": 3, "placement": "none"},
    "top-k": {"mode": 1, "K": 12, "placement": "pre-softmax", "sdc": "exact", "vmc": True},
    "top-theta": {"mode": 0, "K": 12, "placement": "pre-softmax", "sdc": "exact", "vmc": True},
    "top-theta capped": {"mode": 0, "K": 12, "placement": "pre-softmax", "capk": True},
    "top-theta post": {"mode": 0, "K": 12, "placement": "post-softmax", "vmc": True},
}


@pytest.fixture(params=METHODS)
def steered(request, tiny_model) -> LlamaForCausalLM:
    """The tiny model in one of the methods, its thresholds calibrated."""
    update_model(tiny_model)
    method = METHODS[request.param]
    if method["mode"] == 0:
        set_params(tiny_model, **method | {"capk": False}, calibrate=True, calib_sample_frac=1.0)
        for seed in range(3):
            tiny_model(torch.randint(97, (2, 61), generator=torch.Generator().manual_seed(seed)))
    set_params(tiny_model, **method, calibrate=False)
    return tiny_model


def prompts(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded at the left."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        ids[i, -length:] = torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(9 + i))
        mask[i, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("chunk", [7, 19, 48])  # 49 = 7 * 7 = 48 + 1: the last chunk of one row is no decode
def test_generation_in_chunks(steered: LlamaForCausalLM, path: str, chunk: int) -> None:
    """Logits, tokens and every count are those without chunks; a batch padded at the left included."""
    for lengths in ((49,), (49, 20, 41)):
        got = []
        for size in (None, chunk):
            recorder = Recorder(6)
            record_statistics(steered, recorder)
            out = chunked.generate(
                steered,
                prompts(lengths),
                size,
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=[],
            )
            got.append((out, *recorder.drain()))
            record_statistics(steered, None)
            assert recorder.phase is None
        (tokens, prefill, decode), (tokens_2, prefill_2, decode_2) = got
        assert torch.equal(tokens, tokens_2)
        assert [len(steps) for steps in decode.values()] == [len(steps) for steps in decode_2.values()]
        assert len(decode[0]) == 5
        for layer in prefill:
            assert (prefill_2[layer].n == list(lengths)).all()
            for one, two in [
                (prefill[layer], prefill_2[layer]),
                *zip(decode[layer], decode_2[layer]),
            ]:
                for name in ("attn", "vrow", "full", "topk", "n"):
                    np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def test_likelihood_in_chunks(steered: LlamaForCausalLM, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """-log p of each token: from whole logits by hand, and the same in chunks."""
    ids = prompts((49, 49))["input_ids"]
    logits = steered(ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(2, 48)
    monkeypatch.setattr(chunked, "LOGIT_ROWS", 10)
    for chunk in (None, 7, 16, 48, 49, 100):
        got = chunked.negative_log_likelihood(steered, ids, chunk)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_calibration_in_chunks(tiny_model: LlamaForCausalLM, path: str) -> None:
    """Every row is sampled once, and thresholds are those without chunks."""
    update_model(tiny_model)
    ids, theta = prompts((49,))["input_ids"], []
    for chunk in (None, 16):
        set_params(
            tiny_model, mode=0, K=12, placement="pre-softmax", calibrate=True, calib_tac=True,
            calib_sample_frac=1.0,
        )  # fmt: skip
        chunked.negative_log_likelihood(tiny_model, ids, chunk)
        set_params(tiny_model, calibrate=False)
        theta.append([layer.theta for layer in patched_layers(tiny_model)])
    for one, two in zip(*theta):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folder_model(tmp_path_factory, small_tokenizer) -> str:
    """A random two-layer model with the real tokenizer, as a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = tiny_config(
        vocab_size=len(small_tokenizer), num_hidden_layers=2, max_position_embeddings=2048, eos_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The hills were green, and the town below slept. " * 120)
    return tmp_path


def settings(folder_model: str, **changes) -> GenSettings:
    values = {
        "llama": folder_model,
        "mode": (0, 1, 3),
        "k": (16,),
        "sdc": "exact",
        "vmc": True,
        "calib_sample_frac": 1.0,
        "calib_samples": 2,
        "max_seq_len": 200,
        "prefill_chunk": 64,
        "device": "cpu",
    }
    return GenSettings(**(values | changes))


def only_run(root: Path) -> Path:
    return next(root.iterdir())


def test_perplexity(folder_model: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    """The table against the metric, chunks against none, calibration on other windows, a resumed run."""
    from toptheta.eval.generate import run_generation

    base = settings(folder_model, dataset="perplexity", text="text.txt", num_tasks=3)
    results = run_generation(base)
    printed = capsys.readouterr().out
    assert "| <= 64" in printed and "| Top-theta K=16" in printed and "(n=3)" in printed
    run = only_run(here / "products")
    for result, folder in zip(results, ("mode0_k16", "mode1_k16", "mode3")):
        rows = list(csv.DictReader((run / folder / "perplexity.csv").open()))
        assert [row["length"] for row in rows] == ["64", "128", "200"]
        tokens = [int(row["tokens"]) for row in rows]
        assert tokens == [3 * 64, 3 * 64, 3 * (199 - 128)]
        mean = sum(float(row["nll"]) * n for row, n in zip(rows, tokens)) / sum(tokens)
        assert result["metrics"]["ppl"]["value"] == pytest.approx(np.exp(mean))
        assert result["metrics"]["ppl"]["stderr"] > 0 and result["metrics"]["ppl"]["count"] == 3
        assert result["kept"]["generative_decoding"] is None
    kept = [result["kept"]["prefill"]["attn"] for result in results]
    assert kept[2] == 1.0 and kept[1] < 0.3 and kept[0] < 0.6

    whole = run_generation(
        settings(
            folder_model, dataset="perplexity", text="text.txt", num_tasks=3, mode=(3,), prefill_chunk=None,
            batch_size=2,
        )
    )  # fmt: skip
    assert whole[0]["metrics"]["ppl"]["value"] == pytest.approx(
        results[2]["metrics"]["ppl"]["value"], rel=1e-4
    )
    again = run_generation(base, resume=str(run))
    assert [r["metrics"] for r in again] == [r["metrics"] for r in results]


def test_perplexity_resumes(folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toptheta.eval.generate import run_generation

    base = settings(folder_model, dataset="perplexity", text="text.txt", num_tasks=4, mode=(1,))
    straight = run_generation(base)
    once, calls = chunked.negative_log_likelihood, []

    def counting(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return once(*arguments)

    monkeypatch.setattr(chunked, "negative_log_likelihood", counting)
    stopped = settings(
        folder_model, dataset="perplexity", text="text.txt", num_tasks=4, mode=(1,), output_dir="stopped"
    )
    with pytest.raises(KeyboardInterrupt):
        run_generation(stopped)
    run = only_run(here / "stopped")
    assert not (run / "results.json").exists()
    saved = settings_from_json(GenSettings, json.loads((run / "run.json").read_text())["settings"])
    assert saved.needle_depths == base.needle_depths
    resumed = run_generation(saved, resume=str(run))
    assert len(calls) == 5
    assert resumed[0]["metrics"] == straight[0]["metrics"] and resumed[0]["kept"] == straight[0]["kept"]


def test_needle(folder_model: str, here: Path, small_tokenizer) -> None:
    from toptheta.eval.generate import run_generation
    from toptheta.eval.tasks.needle import NeedleJob

    base = settings(
        folder_model, dataset="needle", needle_lengths=(200, 128), needle_depths=(0, 100), mode=(0, 3),
        needle_repeats=2,
    )  # fmt: skip
    results = run_generation(base)
    run = only_run(here / "products")
    rows = list(csv.DictReader((run / "mode0_k16" / "needle.csv").open()))
    assert [(row["length"], row["depth"], row["count"]) for row in rows] == [
        ("128", "0", "2"), ("128", "100", "2"), ("200", "0", "2"), ("200", "100", "2"),
    ]  # fmt: skip
    assert results[1]["metrics"]["found"] == {"value": 0.0, "stderr": 0.0, "count": 8}
    assert (run / "mode3" / "needle.png").stat().st_size > 5000
    lengths = np.loadtxt(run / "mode3" / "prompt_completion_lengths_per_sample.csv", dtype=int)
    assert (lengths.sum(axis=1) <= 200).all() and lengths[:, 0].max() > 150
    assert len((run / "mode3" / "predictions.jsonl").read_text().splitlines()) == 8

    job = NeedleJob(base, small_tokenizer)
    assert not {item.facts["number"] for item in job.items} & {i.facts["number"] for i in job.calibration}
    for item in job.items:
        text = small_tokenizer.decode(item.ids)
        needle = text.index(item.facts["number"])
        assert text.count(item.facts["number"]) == 1
        assert (needle < 200) == (item.facts["depth"] == 0)
        assert len(item.ids) <= item.facts["length"] - 24
    reply = f"1,{'234,567'}. That is it"
    job.items[0].facts["number"] = "1234567"
    assert score(job, reply)[0]["found"] and not score(job, "123456")[0]["found"]


def score(job, reply: str) -> list[dict[str, Any]]:
    """The answers of a job whose model replies `reply`."""
    from toptheta.eval.tasks import base as genjob

    was = genjob.reply
    genjob.reply = lambda *_: [{"key": job.items[0].key, "reply": reply}]
    try:
        return job.run(None, job.items[:1])
    finally:
        genjob.reply = was


def longbench_rows(folder: Path, counts: dict[str, int]) -> None:
    folder.mkdir(parents=True)
    for split, count in counts.items():
        rows = [
            {
                "input": f"What was said about {{topic}} {i}?",
                "context": f"Start {i}. " + "Ann: We should talk about it . Ben: Yes .\n" * 60 + f"End {i}.",
                "answers": [f"They talked about topic {i}."],
                "_id": f"{split}{i}",
            }
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_longbench(folder_model: str, here: Path, small_tokenizer) -> None:
    """Truncation in the middle, calibration on other rows, predictions and score."""
    from toptheta.eval.generate import run_generation
    from toptheta.eval.tasks.longbench import LongBenchJob

    longbench_rows(here / "data" / "longbench_qmsum", {"test": 3, "train": 4})
    base = settings(
        folder_model,
        dataset="longbench_qmsum",
        data_dir="data",
        max_new_tokens=12,
        max_seq_len=320,
        mode=(0, 3),
    )
    job = LongBenchJob(base, small_tokenizer)
    assert [item.key for item in job.items] == ["test0", "test1", "test2"] and len(job.calibration) == 2
    for i, item in enumerate(job.items):
        assert 300 <= len(item.ids) <= 308
        text = small_tokenizer.decode(item.ids)
        assert text.startswith("You are given a meeting transcript") and f"Start {i}." in text
        assert text.endswith(f"\nQuery: What was said about {{topic}} {i}?\nAnswer:") and f"End {i}." in text
    results = run_generation(base)
    assert [r["metrics"]["rouge_l"]["count"] for r in results] == [3, 3]
    run = only_run(here / "products")
    lines = [json.loads(s) for s in (run / "mode3" / "predictions.jsonl").read_text().splitlines()]
    assert {"key", "reply", "answers", "rouge_l", "prompt_tokens", "reply_tokens"} <= set(lines[0])
    together = run_generation(
        settings(
            folder_model, dataset="longbench_qmsum", data_dir="data", max_new_tokens=12, max_seq_len=320,
            mode=(3,), batch_size=3, prefill_chunk=None, output_dir="together",
        )
    )  # fmt: skip
    assert together[0]["metrics"]["rouge_l"] == pytest.approx(results[1]["metrics"]["rouge_l"])


def test_longbench_chat(here: Path, small_tokenizer) -> None:
    """The template stays whole around a prompt that was cut, and both fit together."""
    from toptheta.eval.tasks.longbench import LongBenchJob

    longbench_rows(here / "data" / "longbench_qmsum", {"test": 3, "train": 1})
    base = settings("smollm2", dataset="longbench_qmsum", data_dir="data", apply_chat_template=True,
                    max_new_tokens=12, max_seq_len=320, calib_samples=None)  # fmt: skip
    ids = LongBenchJob(base, small_tokenizer).items[0].ids
    text = small_tokenizer.decode(ids)
    assert 295 <= len(ids) <= 308 and text.startswith("<|im_start|>") and text.endswith("assistant\n")


def test_rouge_is_longbench_s() -> None:
    """As `Rouge().get_scores([p], [r], avg=True)["rouge-l"]["f"]`, the best reference, 0 for no words."""
    from rouge import Rouge

    from toptheta.eval.tasks.longbench import rouge_l

    texts = ("the cat sat on the mat", "a dog ran. the cat sat", "nothing alike")
    expected = [Rouge().get_scores([texts[0]], [text], avg=True)["rouge-l"]["f"] for text in texts]
    assert [rouge_l(texts[0], [text]) for text in texts] == expected
    assert rouge_l(texts[0], list(texts[1:])) == max(expected[1:]) > 0.3
    assert rouge_l("", [texts[0]]) == rouge_l("...", [texts[0]]) == 0.0
    words = [f"w{i}" for i in range(900)]
    assert rouge_l(" ".join(words), [" ".join(words[::2])]) == pytest.approx(2 / 3, rel=1e-6)


def test_longbench_from_the_hub(here: Path, small_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's zip file; without train rows the first rows calibrate and are not evaluated."""
    import huggingface_hub

    from toptheta.eval.tasks import longbench

    longbench_rows(here / "rows", {"test": 23})
    with zipfile.ZipFile("data.zip", "w") as archive:
        archive.write("rows/test.jsonl", "data/gov_report.jsonl")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: "data.zip")
    base = settings("smollm2", dataset="longbench_gov_report", max_seq_len=1024, calib_samples=None)
    job = longbench.LongBenchJob(base, small_tokenizer)
    assert [item.key for item in job.items] == ["test20", "test21", "test22"] and len(job.calibration) == 20
    with pytest.raises(UsageError, match=r"data.zip holds no data/qmsum.jsonl"):
        longbench.load_rows("longbench_qmsum", None)


def test_local_longbench(local_data: Path, small_tokenizer) -> None:
    from toptheta.eval.tasks.longbench import LongBenchJob

    for name, test, train in (("longbench_qmsum", 10, 6), ("longbench_gov_report", 5, 3)):
        job = LongBenchJob(
            settings("smollm2", dataset=name, data_dir=str(local_data), max_seq_len=8192, calib_samples=None),
            small_tokenizer,
        )
        assert (len(job.items), len(job.calibration)) == (test, train)
        assert max(len(item.ids) for item in job.items) <= 8192 - 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "needles"}, "near it: needle"),
        ({"dataset": "perplexity"}, "name a file with --text"),
        ({"dataset": "perplexity", "text": "nowhere.txt"}, "there is no such file"),
        ({"dataset": "perplexity", "text": "text.txt", "do_sample": True}, "--do_sample has no effect"),
        ({"dataset": "longbench_qmsum", "text": "text.txt"}, "--text has no effect"),
        ({"dataset": "longbench_qmsum", "data_dir": "nowhere"}, "no such folder"),
        ({"dataset": "needle", "needle_depths": (50, 101)}, "from 0 to 100"),
        ({"dataset": "needle", "needle_lengths": (256,)}, "--needle_lengths has 256"),
        ({"prefill_chunk": 0}, "--prefill_chunk is 0"),
        ({"needle_repeats": 2}, "--needle_repeats has no effect on --dataset openai_humaneval"),
    ],
)
def test_flags_that_make_no_sense(here: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_from_json(GenSettings, settings("smollm2", **changes).to_json())


def test_data_that_makes_no_sense(here: Path, folder_model: str) -> None:
    from toptheta.eval.generate import run_generation

    (here / "short.txt").write_text("A few words.")
    (here / "latin.txt").write_bytes("Müller".encode("latin-1"))
    (here / "bad" / "longbench_qmsum").mkdir(parents=True)
    (here / "bad" / "longbench_qmsum" / "test.jsonl").write_text('{"input": "x"}\n')
    for changes, message in (
        ({"dataset": "perplexity", "text": "short.txt"}, "less than two windows"),
        ({"dataset": "perplexity", "text": "latin.txt"}, "not UTF-8"),
        ({"dataset": "perplexity", "text": "text.txt", "calib_samples": 90}, "leave none to evaluate"),
        ({"dataset": "perplexity", "text": "text.txt", "max_seq_len": 4096}, "more than the 2048 tokens"),
        ({"dataset": "needle", "text": "short.txt"}, "less than the longest context"),
        (
            {"dataset": "longbench_qmsum", "data_dir": ".", "max_seq_len": 900},
            "holds neither longbench_qmsum/test.jsonl",
        ),
        ({"dataset": "longbench_qmsum", "data_dir": "bad", "max_seq_len": 900}, "line 1: .* lacks context"),
        ({"dataset": "longbench_qmsum", "data_dir": "bad"}, "leaves -312 tokens"),
    ):
        with pytest.raises(UsageError, match=message):
            run_generation(settings(folder_model, **changes))


def test_script(folder_model: str, here: Path) -> None:
    """The flags reach the job; a wrong list is one sentence and exit code 2."""
    command = [sys.executable, str(ROOT / "gen_llama.py"), "--dataset", "needle", "--llama", folder_model]
    command += [
        "--max_seq_len",
        "160",
        "--needle_lengths",
        "160",
        "--mode",
        "1",
        "--k",
        "8",
        "--device",
        "cpu",
    ]
    run = subprocess.run(
        [*command, "--needle_depths", "50", "--prefill_chunk", "50"], cwd=here, capture_output=True, text=True
    )
    assert run.returncode == 0 and "found %" in run.stdout, run.stderr
    bad = subprocess.run([*command, "--needle_depths", "half"], cwd=here, capture_output=True, text=True)
    assert bad.returncode == 2 and "--needle_depths is 'half': give a whole number" in bad.stderr
