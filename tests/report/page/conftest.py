"""Runs of a tiny model with everything a report shows, and the report on them."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.eval.helpers import gen_settings, qa_settings
from toptheta.report.frames import LoadedRun
from toptheta.report.page.build import write_report
from toptheta.report.results import CellResult

TEXT = "The hills were green, and the town below slept. Rain came; nobody minded it much. " * 120


@dataclass(frozen=True)
class Report:
    """The file, and what was read for it."""

    path: Path
    run: LoadedRun

    def of_task(self, task: str) -> dict[str, CellResult]:
        """The results of a task, by cell."""
        return {label: one for label, one in zip(self.run.labels, self.run.results) if one.task == task}


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory, folder_model: str) -> Report:
    """A text, questions and programs, each by Top-theta, Top-k and dense attention."""
    from toptheta.eval.runner import evaluate

    before, folder = Path.cwd(), tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    os.chdir(folder)
    try:
        jobs = [
            gen_settings(folder_model, dataset="perplexity", text="text.txt", num_tasks=3, k=(8, 16)),
            qa_settings(folder_model, num_samples=4, effective_k=True),
            gen_settings(
                folder_model,
                num_tasks=2,
                calib_samples=1,
                max_seq_len=200,
                prefill_chunk=None,
                mode=(0, 3),
                allow_code_execution=True,
                vrow_popularity=True,
            ),
        ]
        for settings in jobs:
            evaluate(settings)
        runs = sorted((folder / "products").iterdir())
        path = folder / "all.html"
        return Report(path, write_report(runs, path))
    finally:
        os.chdir(before)
