"""Where the cells of a run have their products, and what one that fails costs the others."""

from pathlib import Path

import pytest

from tests.eval.helpers import calibrating_settings, only_run
from toptheta.eval.run import Run, product_folder
from toptheta.eval.settings import QASettings
from toptheta.report import load
from toptheta.report.results import read_result
from toptheta.util.errors import UsageError


def test_folders_of_earlier_versions_are_found(tmp_path: Path) -> None:
    """They were named by mode and K alone, also with --capk."""
    run = Run(tmp_path, QASettings(mode=(0, 1), k=(16, 32), capk=True), "test_llama.py")
    (tmp_path / "mode0_k16").mkdir()
    names = [product_folder(run, cell).name for cell in run.settings.cells()]
    assert names == ["mode0_k16", "top_theta_capk_k32", "mode1_k16", "mode1_k32"]
    single = Run(tmp_path, QASettings(mode=(3,)), "test_llama.py")
    assert product_folder(single, single.settings.cells()[0]) == tmp_path


def test_a_cell_that_cannot_be_calibrated_costs_no_other(folder_model: str, here: Path) -> None:
    """Cells before and behind it, also those of its calibration pass, have the results that they have without
    it; the run ends with its error, and so does each resumed run."""
    from toptheta.eval.runner import evaluate

    settings = calibrating_settings(folder_model, mode=(0, 1, 3), k=(16, 900, 32))
    for resume in (None, "again"):
        with pytest.raises(UsageError, match="^Top-theta K=900 could not be computed; the other cells are f"):
            evaluate(settings, resume=resume and str(only_run(here / "products")))
    run = only_run(here / "products")
    log = [line.split(" ", 1)[1] for line in (run / "run.log").read_text().splitlines()]
    words = [line.split()[0] for line in log]
    assert words == ["started", "calibrated", "failed:", "resumed", "failed:"]
    assert log[-1].startswith("failed: Top-theta K=900 could not be computed")
    missing = f"{run} is not finished: 1 of its 7 cells have no result (mode0_k900)."
    assert load(run).notes == (missing,) and missing in (run / "report.html").read_text()
    assert not list(run.glob("**/partial*"))
    found = [read_result(path) for path in sorted(run.glob("*/results.json"))]
    alone = evaluate(calibrating_settings(folder_model, mode=(0, 1, 3), k=(16, 32), output_dir="alone"))
    found = {result.method: result for result in found}
    assert found.keys() - {"Top-k K=900"} == {result.method for result in alone}
    for result in alone:
        assert (result.metrics, result.kept) == (found[result.method].metrics, found[result.method].kept)
