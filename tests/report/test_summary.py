"""Summaries of runs: what is written where a score is missing, and in a locale that knows ASCII only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from toptheta.report.results import DECODE, CellResult, Kept, Metric
from toptheta.report.summary import report_run, report_sweep
from toptheta.report.sweep_tables import SweepRow

VERSIONS = ("torch", "transformers", "lm_eval")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_run_that_is_scored_in_part(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without a score that all have there is a table, and a sentence in place of the plot."""
    kept = {"generative_decoding": Kept(0.1, 0.2)}
    scored = CellResult("Top-k K=8", "Tiny", "code", metrics={"pass@1": Metric(0.5, 0.1, 4)}, kept=kept)
    report_run(tmp_path, [scored, CellResult("dense", "Tiny", "code", dense=True)], "Tiny, code")
    assert "| Top-k K=8" in (tmp_path / "summary.md").read_text()
    assert "No plot tradeoff.png, because" in capsys.readouterr().err
    assert not (tmp_path / "tradeoff.png").exists()


def test_files_are_utf8_in_any_locale(tmp_path: Path) -> None:
    code = """
import locale, sys
from pathlib import Path
from toptheta.report.page.build import write_report
from toptheta.report.results import CellResult, Kept, Metric
from toptheta.report.summary import report_run, report_tasks
from toptheta.util.files import append_result, log_line
assert locale.getpreferredencoding(False) != "UTF-8"
root = Path(sys.argv[1])
dense = CellResult("dense", "Größe", "θ", dense=True, metrics={"acc": Metric(0.5, 0.1, 4)})
report_run(root / "a", [dense], "Größe")
report_tasks(root, [root / "a"], [dense])
log_line(root / "log.txt", "Größe")
append_result(root, "results.txt", "Größe")
"""
    environment = os.environ | ASCII | {"PYTHONIOENCODING": "utf-8"}
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "code.py", tmp_path],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    for name in ("summary.md", "log.txt", "results.txt"):
        assert "Größe" in (tmp_path / name).read_text(encoding="utf-8")


def test_a_text_that_keeps_every_key(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As dense attention: a table without a plot of KL, in a run and in a table of runs."""
    kept, read = {DECODE: Kept(1.0, 1.0)}, {DECODE: 1.0}
    extra = {"environment": dict.fromkeys(("device_name", "device", "threads", *VERSIONS), "x")}
    metrics = {"ppl": Metric(9.0, 0.1, 4), "kl": Metric(1e-9, 0.0, 4)}
    results = [
        CellResult(name, "Tiny", "perplexity", k=k, dense=not k, metrics=metrics, kept=kept, kv_bytes=read,
                   seconds={"calibration": 0.0, "evaluation": 1.0}, extra=extra)
        for name, k in (("dense", None), ("Top-k K=300", 300))
    ]  # fmt: skip
    report_run(tmp_path, results, "Tiny, text")
    assert "| Top-k K=300" in (tmp_path / "summary.md").read_text()
    report_sweep(tmp_path / "table", "Tiny", "tiny", [SweepRow("text", r.method, r.k, r) for r in results])
    assert "Top-k K=300" in (tmp_path / "table" / "table.md").read_text()
    printed = capsys.readouterr().err
    assert printed.count("No plot kl.png, because no result differs from dense") == 2
    assert "No plot kl_by_v_rows.png" in printed
