"""Kept calibration samples: their averages are the tables, and damaged files are named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers.calibration import check_average
from topk_llama import set_params, update_model
from toptheta.calibration.kept_samples import (
    SAMPLES_NAME,
    read_calibration_samples,
    write_calibration_samples,
)
from toptheta.models.calibrate import begin_calibration, calibrated_tables, calibration_samples
from toptheta.models.control import get_params
from toptheta.models.patch import layer_states
from toptheta.util.errors import UsageError


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("frac", [1.0, 0.4])
def test_kept_samples_average_to_the_tables(
    tiny_model: LlamaForCausalLM, tmp_path: Path, frac: float
) -> None:
    """For each of several K, in batches with padding, also when calibration goes on from a saved state."""
    update_model(tiny_model)
    set_params(tiny_model, mode=0, K=4, calibrate=True, calib_sample_frac=frac)
    params = get_params(tiny_model)
    ids = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    begin_calibration(tiny_model, params, [(9, 9, 9)])
    assert all("kept" not in key for key in layer_states(tiny_model)[0].calibration.state())
    begin_calibration(tiny_model, params, [(9, 9, 9)], keep_samples=True)
    tiny_model(ids, attention_mask=mask)
    states = [layer.calibration.state() for layer in layer_states(tiny_model)]
    begin_calibration(tiny_model, params, [(9, 9, 9)], keep_samples=True)
    for layer, state in zip(layer_states(tiny_model), states):
        layer.calibration.load_state(state)
    tiny_model(ids[:1, :33])
    for k in (4, 9):
        tables = calibrated_tables(tiny_model, (k, k, k))
        write_calibration_samples(tmp_path, calibration_samples(tiny_model, (k, k, k)))
        found = read_calibration_samples(tmp_path)
        assert list(found) == [0, 1, 2]
        for layer, (n, values) in found.items():
            assert n.dtype == np.int32 and values.dtype == np.float32 and values.shape == (len(n), 6)
            check_average(n, values, tables.theta[layer])


def test_no_samples_to_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no calib_samples.safetensors: calibrate with"):
        read_calibration_samples(tmp_path)
    (tmp_path / SAMPLES_NAME).write_bytes(b"not arrays")
    with pytest.raises(UsageError, match="is damaged"):
        read_calibration_samples(tmp_path)
