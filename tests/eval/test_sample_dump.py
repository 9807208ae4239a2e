"""Calibration samples that a run keeps, through an interrupt."""

from pathlib import Path

import pytest

from tests.eval.helpers import calibrating_settings, interrupt_at
from tests.helpers.calibration import check_average
from toptheta.calibration.kept_samples import (
    SAMPLES_NAME,
    read_calibration_samples,
)
from toptheta.calibration.tables import BINARY_NAME, load_tables


def test_dump_of_each_cell_survives_an_interrupt(
    folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toptheta.eval.runner import evaluate

    options = {"k": (16, 32), "calibrate_only": True, "calib_dump_samples": True}
    batches = interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(calibrating_settings(folder_model, **options))
    (run,) = here.joinpath("products").iterdir()
    evaluate(calibrating_settings(folder_model, **options), resume=str(run))
    assert len(batches) == 3  # prompts: none ran twice
    for k in (16, 32):
        folder = run / f"mode0_k{k}"
        samples, tables = read_calibration_samples(folder), load_tables(folder, 2, 6)
        (folder / BINARY_NAME).unlink()
        assert sorted(samples) == sorted(tables.theta) == [0, 1]
        for layer, (n, values) in samples.items():
            assert n.min() == k + 1
            check_average(n, values, tables.theta[layer])
            check_average(n, values, load_tables(folder, 2, 6).theta[layer])  # of th.txt
    evaluate(calibrating_settings(folder_model, calibrate_only=True, output_dir="off"))
    assert not list(here.glob(f"off/**/{SAMPLES_NAME}"))
