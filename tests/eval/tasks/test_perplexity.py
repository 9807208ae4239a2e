"""Perplexity end to end on a small folder model: the table by length, chunks, resuming."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tests.eval.helpers import gen_settings, only_run
from toptheta.eval.cli import settings_from_json
from toptheta.eval.settings import GenSettings
from toptheta.models import generation as chunked


def test_perplexity(folder_model: str, here_with_text: Path, capsys: pytest.CaptureFixture) -> None:
    """The table against the metric, chunks against none, calibration on other windows, a resumed run."""
    from toptheta.eval.generate import run_generation

    base = gen_settings(folder_model, dataset="perplexity", text="text.txt", num_tasks=3)
    results = run_generation(base)
    printed = capsys.readouterr().out
    assert "| <= 64" in printed and "| Top-theta K=16" in printed and "(n=3)" in printed
    run = only_run(here_with_text / "products")
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
        gen_settings(
            folder_model, dataset="perplexity", text="text.txt", num_tasks=3, mode=(3,), prefill_chunk=None,
            batch_size=2,
        )
    )  # fmt: skip
    assert whole[0]["metrics"]["ppl"]["value"] == pytest.approx(
        results[2]["metrics"]["ppl"]["value"], rel=1e-4
    )
    again = run_generation(base, resume=str(run))
    assert [r["metrics"] for r in again] == [r["metrics"] for r in results]


def test_perplexity_resumes(folder_model: str, here_with_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toptheta.eval.generate import run_generation

    base = gen_settings(folder_model, dataset="perplexity", text="text.txt", num_tasks=4, mode=(1,))
    straight = run_generation(base)
    once, calls = chunked.negative_log_likelihood, []

    def counting(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return once(*arguments)

    monkeypatch.setattr(chunked, "negative_log_likelihood", counting)
    stopped = gen_settings(
        folder_model, dataset="perplexity", text="text.txt", num_tasks=4, mode=(1,), output_dir="stopped"
    )
    with pytest.raises(KeyboardInterrupt):
        run_generation(stopped)
    run = only_run(here_with_text / "stopped")
    assert not (run / "results.json").exists()
    saved = settings_from_json(GenSettings, json.loads((run / "run.json").read_text())["settings"])
    assert saved.needle_depths == base.needle_depths
    resumed = run_generation(saved, resume=str(run))
    assert len(calls) == 5
    assert resumed[0]["metrics"] == straight[0]["metrics"] and resumed[0]["kept"] == straight[0]["kept"]
