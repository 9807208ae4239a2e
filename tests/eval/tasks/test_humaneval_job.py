"""The HumanEval job end to end on a small folder model: batches, scoring, calibration, resuming."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from toptheta.eval.settings import GenSettings
from toptheta.report.results import Metric


def test_generation(folder_model: str, here: Path) -> None:
    """Completions in batches are those made one by one, and scored later as at once; a finished run is not
    repeated."""
    from toptheta.eval.runner import evaluate
    from toptheta.eval.score import score_folder

    values = {
        "llama": folder_model,
        "mode": (0, 3),
        "k": (40,),
        "sdc": "exact",
        "vmc": True,
        "calib_sample_frac": 1.0,
        "calib_samples": 2,
        "num_tasks": 3,
        "max_seq_len": 230,
        "device": "cpu",
    }
    alone = evaluate(GenSettings(**values, output_dir="alone", allow_code_execution=True))
    together = evaluate(GenSettings(**values, output_dir="together", batch_size=3))
    for a in alone:
        assert a.metrics["pass@1"] == Metric(0.0, 0.0, 3)
        assert a.kept["generative_decoding"].attn <= 1.0
    assert alone[0].kept["generative_decoding"].attn < 0.6
    assert [b.metrics for b in together] == [{}, {}]

    def samples(root: str) -> dict:
        run = next(here.joinpath(root).iterdir())
        lines = (run / "mode3" / "samples.jsonl").read_text().splitlines()
        return {json.loads(line)["task_id"]: json.loads(line)["reply"] for line in lines}

    assert samples("alone") == samples("together")
    run = next(here.joinpath("together").iterdir())
    score_folder(str(run))
    assert json.loads((run / "mode0_k40" / "results.json").read_text())["metrics"]["pass@1"]["count"] == 3
    lengths = np.loadtxt(run / "mode3" / "prompt_completion_lengths_per_sample.csv", dtype=int)
    assert lengths.shape == (3, 2)
    decode = np.loadtxt(
        gzip.open(run / "mode3" / "layer0_kept_attn_generative_decoding.csv.gz", "rt"), delimiter=","
    )
    assert len(decode) == 6 * (lengths[:, 1] - 1).sum()  # the first token comes out of the prefill
    before = (run / "mode3" / "results.json").stat().st_mtime_ns
    evaluate(GenSettings(**values, output_dir="together", batch_size=3), resume=str(run))
    assert (run / "mode3" / "results.json").stat().st_mtime_ns == before


def test_generation_calibrates_on_own_rows(folder_model: str, here: Path) -> None:
    """A reply that is finished adds no rows while others of its batch go on: thresholds, and how many samples
    each has, are those of prompts calibrated one by one."""
    from toptheta.calibration.tables import load_tables
    from toptheta.eval.runner import evaluate

    values = {"mode": (0,), "k": (40,), "calib_samples": 3, "num_tasks": 3, "calib_sample_frac": 1.0}
    found = []
    for size in (1, 3):
        settings = GenSettings(
            **values,
            llama=folder_model,
            max_seq_len=215,
            device="cpu",
            calibrate_only=True,
            batch_size=size,
            output_dir=f"by{size}",
        )
        evaluate(settings)
        run = next(here.joinpath(f"by{size}").iterdir())
        found.append(load_tables(run, 2, 6).theta)
    for alone, together in zip(*(tables.values() for tables in found)):
        np.testing.assert_array_equal(alone.samples, together.samples)
        np.testing.assert_allclose(alone.values, together.values, rtol=1e-4, atol=1e-5)


def test_generation_calibrates_on_tasks_not_on_samples(
    folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With several samples a task, each calibration prompt is another task's; and it is said which."""
    from toptheta.eval.runner import evaluate
    from toptheta.eval.tasks.humaneval.job import HumanEvalJob

    once, seen = HumanEvalJob.run, []

    def running(self, model, batch):
        seen.extend(item.key for item in batch)
        return once(self, model, batch)

    monkeypatch.setattr(HumanEvalJob, "run", running)
    values = {"mode": (0,), "k": (40,), "calib_samples": 2, "num_tasks": 3, "num_samples_per_task": 2}
    evaluate(GenSettings(**values, llama=folder_model, max_seq_len=220, device="cpu", calibrate_only=True))
    assert seen == ["HumanEval/0#0", "HumanEval/1#0"]
    assert "2 of the 3 evaluated tasks are also used for calibration" in capsys.readouterr().err


def test_generation_resumes(folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toptheta.eval.runner import evaluate
    from toptheta.eval.tasks.humaneval.job import HumanEvalJob

    values = {
        "llama": folder_model,
        "mode": (1,),
        "k": (40,),
        "num_tasks": 3,
        "max_seq_len": 220,
        "device": "cpu",
        "do_sample": True,
        "num_samples_per_task": 2,
    }
    evaluate(GenSettings(**values, output_dir="straight"))
    once, calls = HumanEvalJob.run, []

    def running(self, model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return once(self, model, batch)

    monkeypatch.setattr(HumanEvalJob, "run", running)
    with pytest.raises(KeyboardInterrupt):
        evaluate(GenSettings(**values, output_dir="stopped"))
    run = next(here.joinpath("stopped").iterdir())
    evaluate(GenSettings(**values, output_dir="stopped"), resume=str(run))
    assert len(calls) == 7
    straight = next(here.joinpath("straight").iterdir())
    assert (straight / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()
