"""Effective K in the jobs: its flags, its table with the other statistics, resumed runs."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tests.eval.helpers import interrupt_at, parse
from tests.helpers.effective_k import rows_of_csv
from toptheta.attention import effective_k as effective
from toptheta.eval.settings import GenSettings, QASettings
from toptheta.models.recorder import DECODE, PREFILL, Recorder
from toptheta.util.errors import UsageError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--effective_k", "--effective_k applies to thresholds only: use it with --mode 0"),
        ("--effective_k --mode 1,3", "--effective_k applies to thresholds only: use it with --mode 0"),
        ("--effective_k --mode 0 --placement none", "--effective_k applies to thresholds"),
        ("--effective_k --mode 0 --no_statistics", "--effective_k needs statistics: leave out --no_stat"),
        ("--effective_k --mode 0 --calibrate_only", "--effective_k needs an evaluation"),
    ],
)
def test_flags_that_make_no_sense(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(flags)
    assert parse("--effective_k --mode 0,3").effective_k and not parse("--mode 0").effective_k


def kept_lines(folder: Path, layer: int, phase: str) -> np.ndarray:
    with gzip.open(folder / f"layer{layer}_kept_attn_{phase}.csv.gz", "rt") as file:
        return np.loadtxt(file, delimiter=",", dtype=int)


def test_generation(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Counts agree with the other statistics of the same run: batches of unlike lengths, some done early."""
    from toptheta.eval.runner import evaluate

    monkeypatch.chdir(tmp_path)
    limits = {"num_tasks": 3, "max_seq_len": 230, "batch_size": 3, "calib_samples": 2}
    settings = GenSettings(
        llama=folder_model, mode=(0, 1), k=(40,), layerk={1: 24}, calib_sample_frac=1.0, device="cpu",
        effective_k=True, **limits,
    )  # fmt: skip
    results = evaluate(settings)
    run = next(tmp_path.joinpath("products").iterdir())
    assert results[1].effective_k is None and not (run / "mode1_k40" / "effective_k.csv").exists()
    cell = run / "mode0_k40"
    assert not (cell / "effective_k.npz").exists() and not (cell / "partial").exists()
    rows = rows_of_csv(cell)
    reported = results[0].effective_k
    assert json.loads((cell / "results.json").read_text())["effective_k"] == reported
    assert [(one["phase"], one["k"]) for one in reported] == [
        (PREFILL, 24),
        (PREFILL, 40),
        (DECODE, 24),
        (DECODE, 40),
    ]
    for layer, k in ((0, 40), (1, 24)):
        prefill = [row for row in rows if row["layer"] == layer and row["phase"] == PREFILL]
        lines = kept_lines(cell, layer, PREFILL)
        assert sum(row["rows"] for row in prefill) == (lines[:, 2] - k).sum()
        kept = sum(row["rows"] * row["mean"] for row in prefill)
        assert kept + len(lines) * k * (k + 1) // 2 == pytest.approx(lines[:, 3].sum())

        decode = [row for row in rows if row["layer"] == layer and row["phase"] == DECODE]
        lines = kept_lines(cell, layer, DECODE)
        assert len(decode) > 2 and sum(row["rows"] for row in decode) == len(lines)
        for row in decode:
            raw = lines[(lines[:, 2] >= row["n_low"]) & (lines[:, 2] <= row["n_high"])][:, 3]
            assert row["rows"] == len(raw) and row["mean"] == pytest.approx(raw.mean()) and row["k"] == k
            for percent in effective.PERCENTS:
                exact = np.percentile(raw, percent, method="inverted_cdf")
                assert row[f"p{percent}"] == pytest.approx(exact, rel=effective.RELATIVE_ERROR)
    text = (run / "summary.md").read_text()
    assert "layers farthest from K" in text and "layers farthest from K" in capsys.readouterr().out


def test_resume_adds_up(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of a batch's model calls and resumed, with a chunk for each batch."""
    from toptheta.eval import cell as products
    from toptheta.eval import partial
    from toptheta.eval.runner import evaluate

    def settings(output: str) -> QASettings:
        return QASettings(
            llama=folder_model, mode=(0,), k=(16,), calib_tac=True, calib_sample_frac=1.0, calib_samples=3,
            num_samples=5, num_fewshot=3, device="cpu", effective_k=True, output_dir=output,
        )  # fmt: skip

    monkeypatch.chdir(tmp_path)
    drain, counted = Recorder.drain, []

    def draining(self):
        prefill, decode = drain(self)
        counted.append(sum(int(record.histogram[:, :-1].sum()) for record in prefill.values()))
        return prefill, decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "drain", draining)
        straight = evaluate(settings("straight"))
    # Three calibrate; the rows of the last are counted, but must not be kept.
    interrupt_at(monkeypatch, 6, after=True)
    monkeypatch.setattr(products, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings("stopped"))
    stopped = next(tmp_path.joinpath("stopped").iterdir())
    chunks = partial.chunks(stopped / "partial")
    assert len(chunks) == 2 and all("effective_k.npz" in partial.names(chunk) for chunk in chunks)
    resumed = evaluate(settings("stopped"), resume=str(stopped))
    one = next(tmp_path.joinpath("straight").iterdir())
    assert (one / "effective_k.csv").read_text() == (stopped / "effective_k.csv").read_text()
    assert len(counted) == 5 and min(counted) > 0
    assert sum(row["rows"] for row in rows_of_csv(one)) == sum(counted)
    assert resumed[0].effective_k == straight[0].effective_k and len(rows_of_csv(one)) > 4
    assert {row["phase"] for row in rows_of_csv(one)} == {PREFILL}
