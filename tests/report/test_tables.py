"""Tables of the summary."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.effective_k import histogram_of
from tests.helpers.paths import ROOT
from toptheta.attention import effective_k as effective
from toptheta.models.recorder import DECODE, PREFILL
from toptheta.report import sweep_tables as sweeps
from toptheta.report import tables as report
from toptheta.report.frames import load
from toptheta.report.results import CellResult, Kept, Metric
from toptheta.report.summary import report_sweep


def test_the_summary_names_the_farthest_layers() -> None:
    rng = np.random.default_rng(0)
    n, spreads = np.full(500, 1000), (0.05, 0.9, 0.3, 0.6, 0.1)
    histograms = {
        layer: histogram_of(np.exp(np.log(64) + width * rng.normal(size=500)).astype(np.int64), n)
        for layer, width in enumerate(spreads)
    }
    result = CellResult("Top-theta", effective_k=effective.overall(histograms, PREFILL, (64,) * 5))
    text = report.effective_k([result, CellResult("dense", dense=True)])
    line = text.splitlines()[-1]
    assert len(text.splitlines()) == 3 and "| prefill | 64 | 2500 |" in line
    assert line.index(" 1: ") < line.index(", 3: ") < line.index(", 2: ") and ", 4: " not in line
    assert "no evaluated row was longer" in report.effective_k([CellResult("Top-theta", effective_k=[])])


def test_the_committed_table_of_a_sweep_comes_out_the_same() -> None:
    """table.md and table.csv from results.json alone; in the CSV, methods of a later part come last."""
    folder = ROOT / "products" / "tables" / "smollm2"
    saved = json.loads((folder / "results.json").read_text())
    results = [CellResult.from_json(value) for value in saved]
    rows = [sweeps.SweepRow(r.task, r.family, r.k, r) for r in results]
    title = json.loads((ROOT / "reproduce.json").read_text())["tables"]["smollm2"]["title"]
    assert sweeps.sweep_markdown(title, "smollm2", rows) == (folder / "table.md").read_text()
    text = (folder / "table.csv").read_text()
    assert sorted(sweeps.sweep_csv(rows).splitlines()) == sorted(text.splitlines())


def test_methods_at_equal_v_rows() -> None:
    """On lines in the logarithms: KL = 1e-4 / share, and 0.05 / share, from K of any order."""

    def row(method: str, k: int | None, vrow: float, kl: float) -> sweeps.SweepRow:
        kept = {"prefill": None, "generative_decoding": Kept(vrow / 2, vrow)}
        result = CellResult(method, k=k, metrics={"kl": Metric(kl)}, kept=kept, dense=k is None)
        return sweeps.SweepRow("novel", method, k, result)

    rows = [
        row("dense", None, 1.0, 0.0),
        row("near", 64, 0.2, 5e-4),
        row("near", 16, 0.05, 2e-3),
        row("near", 32, 0.1, 1e-3),
        row("far", 16, 0.05, 1.0),
        row("far", 32, 0.1, 0.5),
        sweeps.SweepRow("novel", "missing", 16, None),
    ]
    header, _, near, far = sweeps.at_equal_vrows(rows, (0.08, 0.16)).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["method", "8 % of V rows", "16 % of V rows"]
    assert [cell.strip() for cell in near.split("|")[1:-1]] == ["near", "0.0013", "0.0006"]
    assert [cell.strip() for cell in far.split("|")[1:-1]] == ["far", "0.6250", "-"]


def test_needles_by_length_and_by_depth() -> None:
    points = [(512, 0, 2, 2), (512, 50, 1, 2), (1024, 0, 0, 2), (1024, 50, 1, 2)]
    grid = [dict(zip(("length", "depth", "found", "count"), point)) for point in points]
    result = CellResult("dense", metrics={"found": Metric(0.5, 0.2, 8)}, extra={"grid": grid})
    columns = report.metric_columns([result])
    assert [(column.header, column.text(result)) for column in columns] == [
        ("found %", "50.0 ± 20.0 (n=8)"),
        ("at 512 tokens %", "75"),
        ("at 1,024 tokens %", "25"),
        ("at depth 0 %", "50"),
        ("at depth 50 %", "50"),
    ]
    assert columns[1].text(CellResult("lost")) == "-"


def test_sections_of_a_sweep_are_tasks_of_their_own(tmp_path: Path) -> None:
    """Two texts of one data set: each is compared with its own dense cell, and read again as a task."""

    def row(task: str, method: str, k: int | None, ppl: float) -> sweeps.SweepRow:
        metrics = {"ppl": Metric(ppl), "kl": Metric(0.1 * (k is not None))}
        environment = dict.fromkeys(
            ("device_name", "device", "threads", "torch", "transformers", "lm_eval"), 1
        )
        seconds, extra = {"calibration": 0.0, "evaluation": 1.0}, {"environment": environment}
        made = {"metrics": metrics, "seconds": seconds, "extra": extra, "dense": k is None}
        return sweeps.SweepRow(task, method, k, CellResult("?", task="perplexity", k=k, **made))

    rows = [
        row(text, *cell) for text in ("novel", "code") for cell in (("dense", None, 9.0), ("Top-k", 8, 9.5))
    ]
    report_sweep(tmp_path, "Texts", "texts", rows, [0.1])
    assert (tmp_path / "table.md").read_text().count("same share of V rows") == 2
    by_task = load(tmp_path).by_task
    assert {task: [one.method for one in results] for task, results in by_task.items()} == {
        "novel": ["dense", "Top-k K=8"],
        "code": ["dense", "Top-k K=8"],
    }


def test_columns_of_a_calibration() -> None:
    """What rows keep relative to K, and the time of the calibration in dense windows."""
    histograms = {0: histogram_of(np.arange(16, 48), np.full(32, 1000))}
    counted = effective.overall(histograms, DECODE, (32,))
    theta = CellResult(
        "Top-theta", k=32, effective_k=counted, seconds={"calibration": 9.0}, extra={"dense_window_s": 2.0}
    )
    columns = sweeps.calibration_columns([CellResult("dense", dense=True), theta])
    assert [column.text(theta) for column in columns] == ["0.98 (0.53 to 1.44)", "4.5"]
    assert [column.text(CellResult("dense", dense=True)) for column in columns] == ["-", "-"]
    assert sweeps.calibration_columns([CellResult("dense", dense=True)]) == []


def test_columns_are_what_results_hold() -> None:
    seconds = {"calibration": 1.2, "evaluation": 60.0}
    prefill = {"prefill": Kept(0.25, 1.0), "generative_decoding": None}
    read = {"by_length": [{"length": 64, "ppl": 20.0}, {"length": 128, "ppl": 10.0}]}
    metrics = {"acc": Metric(0.5, 0.05, 100), "word_perplexity": Metric(12.5)}
    answered = CellResult("Top-k K=64", k=64, metrics=metrics, kept=prefill, seconds=seconds)
    header, _, row = report.results_table([answered]).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "method", "acc %", "word_perplexity", "kept elements prefill %", "kept V rows prefill %",
        "calibration s", "evaluation s",
    ]  # fmt: skip
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "Top-k K=64", "50.0 ± 5.0 (n=100)", "12.50", "25.0", "100.0", "1", "60",
    ]  # fmt: skip
    both = {"prefill": 1.0, "generative_decoding": 0.625}
    header, _, counted, old = report.results_table([replace(answered, kv_bytes=both), answered]).splitlines()
    at = [cell.strip() for cell in header.split("|")].index("KV bytes, decode %")
    assert [line.split("|")[at].strip() for line in (counted, old)] == ["62.5", "-"]
    both = [replace(answered, missed_keys=0.01237), answered]
    header, _, copied, whole = report.results_table(both).splitlines()
    at = [cell.strip() for cell in header.split("|")].index("missed keys %")
    assert [line.split("|")[at].strip() for line in (copied, whole)] == ["1.24", "-"]
    environment = {"environment": {"device_name": "x"}}
    both = [sweeps.SweepRow("t", "Top-k", 64, replace(one, extra=environment)) for one in both]
    found = list(csv.DictReader(sweeps.sweep_csv(both).splitlines()))
    assert [row["missed_keys"] for row in found] == ["0.01237", "0.01237", "", ""]
    windows = CellResult(
        "dense", dense=True, metrics={"ppl": Metric(14.1, 0.5, 7)}, kept=prefill, seconds=seconds, extra=read
    )
    header, _, row = report.results_table([windows]).splitlines()
    assert "| <= 64 | <= 128 | all " in header and "| kept elements % | calibration s |" in header
    assert "| 20.00 | 10.00  | 14.10 ± 0.50 (n=7) |" in row
    not_run = sweeps.SweepRow("t", "Top-theta", 64, None)
    assert "not run" in sweeps.sweep_csv([]) + sweeps.sweep_markdown("T", "t", [not_run])
    assert sweeps.sweep_csv([not_run]).splitlines()[1] == "t,Top-theta,64" + 11 * ","


@pytest.mark.parametrize(
    "value, stderr, text",
    [
        (0.0123, 0.0004, "0.0123 ± 0.0004"),
        (0.1545, 0.0069, "0.1545 ± 0.0069"),
        (0.00118, 0.000041, "0.00118 ± 0.00004"),
        (-9.5e-5, 3.7e-4, "-0.0001 ± 0.0004"),
        (1.5e-4, 5.0e-6, "0.000150 ± 0.000005"),
        (1.2e-7, 3.0e-8, "1.2e-07 ± 3.0e-08"),
        (0.0, 0.0, "0.0000 ± 0.0000"),
        (0.0023, None, "0.0023"),
        (9.4e-4, None, "0.00094"),
        (0.0, None, "0.0000"),
    ],
)
def test_small_numbers_keep_their_standard_error(value: float, stderr: float | None, text: str) -> None:
    assert report.small(Metric(value, stderr, 10)) == text
