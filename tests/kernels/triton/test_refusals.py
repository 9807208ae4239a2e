"""Calls that the Triton kernels cannot compute are refused, with the reason."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.calls import call, layer_spec
from tests.helpers.models import SPARSE, steer, tokens
from tests.kernels.triton.helpers import DEVICE, HERE, here, needs_triton
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.kernels import registry as kernels
from toptheta.kernels.triton import backend as gpu
from toptheta.util.errors import UsageError


@here
def test_forced_but_impossible(tiny_model, monkeypatch):
    monkeypatch.setattr(kernels, "FORCED", "triton")
    steer(tiny_model.to(DEVICE), SPARSE["Top-k"])
    with pytest.raises(UsageError, match="TOPTHETA_KERNEL=triton cannot be used, because Top-k of"):
        tiny_model(tokens().to(DEVICE))


@here
def test_falls_back_where_it_does_not_build(monkeypatch):
    """A failing compiler costs one warning, and the reference computes."""
    monkeypatch.setattr(kernels, "FORCED", None)
    monkeypatch.setattr(gpu, "_probed", {})

    def broken(call):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(gpu, "run", broken)
    kind = (torch.float32, 16, 2, 0, "pre-softmax", False)
    ours = replace(kernels.BACKENDS[1], device=DEVICE.type, ready=lambda call: gpu.probe(DEVICE, *kind))
    monkeypatch.setattr(kernels, "BACKENDS", (ours,))
    q, k = torch.randn(1, 2, 1, 16, device=DEVICE), torch.randn(1, 1, 40, 16, device=DEVICE)
    asked = call(q, k, k, rows_of(None, 1, 40, DEVICE), layer_spec(1, "pre-softmax", 6), 1.0)
    with pytest.warns(UserWarning, match="plain PyTorch on .* head_dim 16.*PassManager") as said:
        out, _ = kernels.attend(asked)
        kernels.attend(asked)
    assert len(said) == 1 and torch.equal(out, sparse_attention(asked)[0])
    monkeypatch.setattr(kernels, "FORCED", "triton")
    with pytest.raises(UsageError, match="do not build for this GPU .RuntimeError: PassManager"):
        kernels.attend(asked)


@here
@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
@pytest.mark.parametrize("prefill, key_bits", [(False, 0), (True, 0), (False, 4)])
def test_probe(placement, prefill, key_bits, monkeypatch):
    """It finds that the kernels run, also while a model is traced, and tries them once."""
    monkeypatch.setattr(gpu, "_probed", {})
    torch._dynamo.reset()
    calls, run = [], gpu.run
    monkeypatch.setattr(gpu, "run", lambda call: calls.append(call.key_bits) or run(call))
    kind = (DEVICE, torch.float32, 16, 2, 0, placement, prefill, key_bits)
    assert gpu.probe(*kind, only_known=True) is None and not calls

    def known(x):
        asked = gpu.probe(x.device, x.dtype, *kind[2:]), gpu._too_old(x.device)
        return x + (asked == (None, None))

    traced = torch.compile(known, fullgraph=True, backend="aot_eager")
    assert (
        traced(torch.zeros(1, device=DEVICE)).item() == 1.0
        and gpu.probe(*kind) is None
        and calls == [key_bits]
    )


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
