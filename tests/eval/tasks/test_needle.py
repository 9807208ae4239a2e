"""The needle task end to end on a small folder model: prompts, scoring, table and picture."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.eval.helpers import gen_settings, only_run
from toptheta.report.results import Metric


def test_needle(folder_model: str, here_with_text: Path, small_tokenizer) -> None:
    from toptheta.eval.runner import evaluate
    from toptheta.eval.tasks.needle import NeedleJob

    base = gen_settings(
        folder_model, dataset="needle", needle_lengths=(200, 128), needle_depths=(0, 100), mode=(0, 3),
        needle_repeats=2,
    )  # fmt: skip
    results = evaluate(base)
    run = only_run(here_with_text / "products")
    rows = list(csv.DictReader((run / "mode0_k16" / "needle.csv").open()))
    assert [(row["length"], row["depth"], row["count"]) for row in rows] == [
        ("128", "0", "2"), ("128", "100", "2"), ("200", "0", "2"), ("200", "100", "2"),
    ]  # fmt: skip
    assert results[1].metrics["found"] == Metric(0.0, 0.0, 8)
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


def test_haystacks_of_any_text(folder_model: str, here: Path, small_tokenizer) -> None:
    """Rows of LongBench, words without a full stop, a language without spaces: the prompts have their
    length."""
    from toptheta.eval.tasks.needle import NeedleJob

    Path("rows.jsonl").write_text(json.dumps({"context": "A quiet river. " * 400, "answers": ["x"]}) + "\n")
    Path("words.txt").write_text("river " * 3000)
    Path("japanese.txt").write_text("静かな川が流れている。" * 600)
    for text in ("rows.jsonl", "words.txt", "japanese.txt"):
        settings = gen_settings(
            folder_model, dataset="needle", needle_lengths=(512,), text=text, mode=(3,), max_seq_len=512
        )
        for item in NeedleJob(settings, small_tokenizer).items:
            assert 512 - 24 - 120 < len(item.ids) <= 512 - 24
            assert "context" not in small_tokenizer.decode(item.ids)


def score(job, reply: str) -> list[dict[str, Any]]:
    """The answers of a job whose model replies `reply`."""
    from toptheta.eval.tasks import items as genjob

    was = genjob.reply
    genjob.reply = lambda *_: [{"key": job.items[0].key, "reply": reply}]
    try:
        return job.run(None, job.items[:1])
    finally:
        genjob.reply = was
