"""The small real model beside the reference numbers: calls, calibration and comparison of tables."""

import io
import lzma
from pathlib import Path

import numpy as np
import torch

from topk_llama import set_params
from toptheta.calibration.tables import CalibrationTables, LayerTable
from toptheta.models.calibrate import calibrated_tables

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


def read_arrays(golden: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of one file of `tests/golden/`."""
    content = io.BytesIO(lzma.decompress((golden / f"{name}.npz.xz").read_bytes()))
    with np.load(content) as arrays:
        return dict(arrays)


def read_tables(golden: Path, *names: str) -> CalibrationTables:
    """Tables of the published implementation: thresholds (`.th`), SDC tables (`.sdc`), or both."""
    tables = CalibrationTables(30, 9, dict.fromkeys(range(30), 64))
    for name in names:
        arrays = read_arrays(golden, name)
        values = np.full((30, 9, arrays["n"].max() + 1), np.nan)
        values[:, :, arrays["n"]] = arrays["values"]
        samples = np.zeros((9, values.shape[2]), dtype=np.int64)
        samples[:, arrays["n"]] = arrays["samples"]
        layers = {layer: LayerTable(values[layer], samples.copy()) for layer in range(30)}
        setattr(tables, "theta" if name.endswith(".th") else "sdc", layers)
    return tables


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
