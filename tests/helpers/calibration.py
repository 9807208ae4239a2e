"""Prompts that calibrate the tiny model, and what its kept samples must average to."""

import numpy as np
import torch
from transformers import LlamaForCausalLM

from topk_llama import set_params, update_model
from toptheta.calibration.tables import LayerTable


def check_average(n: np.ndarray, values: np.ndarray, table: LayerTable) -> None:
    assert len(n) == table.samples[0].sum() and n.min() > 0
    for length in np.flatnonzero(table.samples[0]):
        chosen = values[n == length].astype(np.float64)
        assert len(chosen) == table.samples[0, length]
        np.testing.assert_allclose(chosen.mean(axis=0), table.values[:, length], rtol=1e-9)


def prompts(count: int = 4, length: int = 30) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 97, (1, length + 3 * i), generator=generator) for i in range(count)]


def calibrated(model: LlamaForCausalLM, **params) -> None:
    update_model(model)
    set_params(model, **({"mode": 0, "K": 6, "calib_sample_frac": 1.0} | params), calibrate=True)
    for ids in prompts():
        model(ids)
