"""`make gpu`, tried on toys: its parts, going on after an interruption, parts that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from tests.helpers.paths import ROOT
from tests.kernels.triton.helpers import needs_triton


def command(folder: Path, *more: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    asked = [sys.executable, "bench/gpu.py", "--output", str(folder), *more]
    return subprocess.run(asked, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.long
@needs_triton
def test_tiny_run_and_going_on(tmp_path):
    wanted = ("--tiny", "--only", "tests,call-decode")
    first = command(tmp_path, *wanted)
    assert first.returncode == 0, first.stdout + first.stderr
    (folder,) = tmp_path.iterdir()
    rows = json.loads((folder / "call-decode.json").read_text())["cases"]
    assert len(rows) == 1 and all(row["methods"]["Top-theta"]["ms"] > 0 for row in rows)
    assert json.loads((folder / "device.json").read_text())["torch"] == torch.__version__
    again = command(tmp_path, *wanted)
    assert again.returncode == 0 and again.stdout.count("done before") == 2
    said = (folder / "summary.md").read_text()
    assert "| call-decode | done |" in said and "dense, ours" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 2 and "has no GPU" in done.stderr and not list(tmp_path.iterdir())
    done = command(tmp_path, "--tiny", "--only", "call")
    assert done.returncode == 2 and "names call: choose from tests, tune-decode" in done.stderr


def test_parts_that_fail(tmp_path, monkeypatch):
    """How a part ended is on file; it is run again, as is one whose sources have changed."""
    bad = gpu.Part("bad", ("-c", "print('so far'); raise SystemExit(3)"), table=False)
    assert gpu.run(bad, tmp_path, False, "x")["ended"] == "exit code 3"
    assert gpu.before(bad, tmp_path, "x") is None and "so far" in (tmp_path / "bad.log").read_text()
    monkeypatch.setattr(gpu, "LIMIT", 1)
    slow = gpu.Part("slow", ("-c", "import time; time.sleep(60)"), table=False)
    assert gpu.run(slow, tmp_path, False, "x")["ended"] == "stopped after 1 s"
    good = gpu.Part("good", ("-c", "pass"), table=False)
    monkeypatch.setattr(gpu, "LIMIT", 60)
    assert gpu.run(good, tmp_path, False, "x")["ended"] == "done"
    assert gpu.before(good, tmp_path, "x") is not None and gpu.before(good, tmp_path, "y") is None


def test_every_part_names_a_script_that_is_there():
    names = [part.name for part in gpu.parts(False)]
    assert len(set(names)) == len(names)
    for part in gpu.parts(False) + gpu.parts(True):
        for word in part.command:
            assert not word.endswith(".py") or (ROOT / word).is_file(), word
