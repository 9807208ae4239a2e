"""What the Triton kernels cannot do is said."""

import pytest
import torch

from tests.helpers.models import SPARSE, steer, tokens
from tests.kernels.triton.helpers import DEVICE, HERE, here, needs_triton
from toptheta.attention.reference import LayerSpec
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
    assert "not on a GPU" in (gpu.unsupported(q, q, q, rows, LayerSpec()) or "")
    if HERE:
        q = torch.zeros(1, 2, 3, 16, device=DEVICE)
        for spec, says in (
            (LayerSpec(1, "pre-softmax", 2), "Top-k of many rows"),
            (LayerSpec(0, "pre-softmax", 2, capk=True), "capk"),
        ):
            assert says in (gpu.unsupported(q, q, q, rows, spec) or "")
        assert "single rows" in (gpu.unsupported(q, q, q, rows, LayerSpec(), count_rows=True) or "")
        wide = torch.zeros(1, 2, 3, 264, device=DEVICE)
        assert "head_dim is 264" in (gpu.unsupported(wide, wide, wide, rows, LayerSpec()) or "")
        double = q.double()
        assert "not torch.float64" in (gpu.unsupported(double, double, double, rows, LayerSpec()) or "")
