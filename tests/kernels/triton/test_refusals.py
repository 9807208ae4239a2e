"""Calls that the Triton kernels cannot compute are refused, with the reason."""

import pytest
import torch

from tests.helpers.calls import call, layer_spec
from tests.helpers.models import SPARSE, steer, tokens
from tests.kernels.triton.helpers import DEVICE, HERE, here, needs_triton
from toptheta.attention.rows import rows_of
from toptheta.kernels import registry as kernels
from toptheta.kernels.triton import backend as gpu
from toptheta.util.errors import UsageError


@here
def test_forced_but_impossible(tiny_model, monkeypatch):
    monkeypatch.setattr(kernels, "FORCED", "triton")
    steer(tiny_model.to(DEVICE), SPARSE["Top-k"])
    with pytest.raises(UsageError, match="TOPTHETA_KERNEL=triton cannot be obeyed, because Top-k of"):
        tiny_model(tokens().to(DEVICE))


@needs_triton
def test_says_what_it_cannot():
    q = torch.zeros(1, 2, 3, 16, device="meta")
    rows = rows_of(None, 3, 3, torch.device("cpu"))
    assert "not on a GPU" in (gpu.unsupported(call(q, q, q, rows, layer_spec(), 1.0)) or "")
    if HERE:
        q = torch.zeros(1, 2, 3, 16, device=DEVICE)
        for spec, says in (
            (layer_spec(1, "pre-softmax", 2), "Top-k of many rows"),
            (layer_spec(0, "pre-softmax", 2, capk=True), "capk"),
        ):
            assert says in (gpu.unsupported(call(q, q, q, rows, spec, 1.0)) or "")
        assert "single rows" in (
            gpu.unsupported(call(q, q, q, rows, layer_spec(), 1.0, count_rows=True)) or ""
        )
        wide = torch.zeros(1, 2, 3, 264, device=DEVICE)
        assert "head_dim is 264" in (gpu.unsupported(call(wide, wide, wide, rows, layer_spec(), 1.0)) or "")
        double = q.double()
        assert "not torch.float64" in (
            gpu.unsupported(call(double, double, double, rows, layer_spec(), 1.0)) or ""
        )
