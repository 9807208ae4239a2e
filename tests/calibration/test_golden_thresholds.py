"""Thresholds calibrated on the small real model against those of the published implementation."""

from pathlib import Path

import pytest

from tests.helpers.golden import calibrate, compare_tables, read_tables


@pytest.mark.long
def test_thresholds_without_tac(patched_model, golden: Path, token_ids: dict) -> None:
    theirs = read_tables(golden, "pre-softmax_tac0_sigma0.0_none.th")
    ours = calibrate(patched_model, token_ids, placement="pre-softmax")
    assert theirs.k == ours.k == dict.fromkeys(range(30), 64)
    assert compare_tables(ours.theta, theirs.theta, relative=False) < 1e-4


def test_thresholds_and_sdc_with_tac_and_sigma(patched_model, golden: Path, token_ids: dict) -> None:
    name = "pre-softmax_tac1_sigma0.1_offline-calibrated"
    theirs = read_tables(golden, f"{name}.th", f"{name}.sdc")
    ours = calibrate(
        patched_model,
        token_ids,
        placement="pre-softmax",
        sdc="offline-calibrated",
        calib_tac=True,
        calib_add_sigma=0.1,
    )
    assert compare_tables(ours.theta, theirs.theta, relative=False) < 1e-4
    assert compare_tables(ours.sdc, theirs.sdc, relative=True) < 1e-3


@pytest.mark.long
def test_thresholds_on_weights(patched_model, golden: Path, token_ids: dict) -> None:
    theirs = read_tables(golden, "post-softmax_tac1_sigma0.1_none.th")
    ours = calibrate(patched_model, token_ids, placement="post-softmax", calib_tac=True, calib_add_sigma=0.1)
    # Weights are small numbers: relative, so that the bound means something.
    assert compare_tables(ours.theta, theirs.theta, relative=True) < 1e-4
