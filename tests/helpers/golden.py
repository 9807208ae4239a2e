"""The small real model beside the reference numbers: calls, calibration and comparison of tables."""

import shutil
from pathlib import Path

import numpy as np
import torch

from topk_llama import set_params
from toptheta.calibration.tables import CalibrationTables, load_tables
from toptheta.models.control import calibrated_tables

SWITCHED_OFF = {
    "calibrate": False,
    "sdc": "none",
    "sdc_scale": 1.0,
    "vmc": False,
    "capk": False,
    "calib_tac": False,
}


def forward(model, ids: list[int], cache=None):
    with torch.no_grad():
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True)


def calibrate(model, token_ids: dict, **params) -> CalibrationTables:
    set_params(
        model, **(SWITCHED_OFF | {"mode": 0, "K": 64, "calib_sample_frac": 1.0, "calibrate": True} | params)
    )
    for ids in token_ids["calibration"]:
        forward(model, ids)
    return calibrated_tables(model)


def read_reference(golden: Path, folder: Path, name: str) -> CalibrationTables:
    folder.mkdir(parents=True, exist_ok=True)
    kind = name.split(".")[-3]
    shutil.copy(golden / "calibration" / name, folder / f"{kind}.txt.gz")
    return load_tables(folder, 30, 9)


def compare_tables(ours: dict, theirs: dict, relative: bool) -> float:
    """Median difference; lengths and sample counts must be the same."""
    differences = []
    for layer in range(30):
        a, b = ours[layer], theirs[layer]
        length = min(a.values.shape[1], b.values.shape[1])
        assert not a.samples[:, length:].any() and not b.samples[:, length:].any()
        np.testing.assert_array_equal(a.samples[:, :length], b.samples[:, :length])
        known = b.samples[:, :length] > 0
        x, y = a.values[:, :length][known], b.values[:, :length][known]
        differences.append(np.abs(x - y) / (np.abs(y) if relative else 1.0))
    return float(np.median(np.concatenate(differences)))
