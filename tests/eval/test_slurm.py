"""A run as a Slurm job of several processes, on this machine in place of a cluster."""

import json
import time
from pathlib import Path

import pytest

import test_llama
from tests.helpers.paths import ROOT
from toptheta.util.errors import UsageError


def call(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", [str(ROOT / "test_llama.py"), *flags])
    test_llama.main()


def test_a_run_as_a_job(folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_CLUSTER", "local")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    task = ("--llama", folder_model, "--device", "cpu", "--num_samples", "2", "--num_fewshot", "2")
    method = ("--mode", "0", "--k", "16", "--calib_samples", "2")
    call(monkeypatch, *task, *method, "--slurm", "short", "--processes", "2")
    for _ in range(1200):
        if list(here.glob("products/*/results.json")):
            break
        time.sleep(0.1)
    result = next(here.glob("products/*/results.json"))
    assert json.loads(result.read_text())["metrics"]["acc"]["count"] == 2
    assert json.loads((result.parent / "run.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--nodes", "2"), "--nodes applies to --slurm"),
        (("--slurm", "short", "--processes", "0"), "--processes is 0: give at least 1"),
        (("--slurm", "short"), "this machine has no Slurm"),
    ],
)
def test_refused(flags: tuple[str, ...], words: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no srun
    monkeypatch.delenv("SUBMITIT_CLUSTER", raising=False)
    with pytest.raises(UsageError, match=words):
        call(monkeypatch, *flags)
