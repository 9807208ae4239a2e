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
from toptheta.kernels.int8_keys import quantized
from toptheta.kernels.triton import backend as gpu
from toptheta.kernels.triton import probe
from toptheta.methods.base import Selection
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
    monkeypatch.setattr(probe, "_probed", {})

    def broken(call):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(gpu, "run", broken)
    kind = a_kind(sees=probe.CAUSAL)
    ours = replace(kernels.BACKENDS[1], device=DEVICE.type, ready=lambda call: probe.probe(False, *kind))
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


def a_kind(**changes) -> probe.Kind:
    kind = probe.Kind(
        DEVICE, torch.float32, 16, 2, False, probe.CAUSAL, int(Selection.THRESHOLD), "pre-softmax", "none",
        False, False, 0, False, True,
    )  # fmt: skip
    return kind._replace(**changes)


KINDS = [
    *(
        {"prompt": prompt, "sees": sees, "sdc": sdc, "vmc": True}
        for prompt in (False, True)
        for sees in (probe.CAUSAL, probe.PADDED, probe.MASKED)
        for sdc in ("none", "exact", "exp-threshold", "offline-calibrated")
    ),
    *(
        {"prompt": prompt, "sees": sees, "placement": "post-softmax", "weighed": weighed, "vmc": True}
        for prompt in (False, True)
        for sees in (probe.CAUSAL, probe.PADDED, probe.MASKED)
        for weighed in (False, True)
    ),
    {"int8": True},
    {"placement": "post-softmax", "key_bits": 4},
    {"placement": "post-softmax", "key_bits": 8, "sees": probe.PADDED},
    {"selection": int(Selection.LARGEST)},
    {"selection": int(Selection.ALL), "placement": "none", "prompt": True, "counts": False},
]


@here
@pytest.mark.parametrize("changes", KINDS, ids=lambda changes: ",".join(map(str, changes.values())))
def test_small_calls(changes):
    """The call that tries a kind is of that kind, and what it computes is what the reference computes."""
    kind = a_kind(**changes)
    small = kind.call()
    assert gpu.unsupported(small) is None
    assert probe.kind_of(small) == kind
    for x in (small.q, small.k):
        x.normal_()
    small.theta = torch.full((2, probe.K + 2), float("-inf"), device=DEVICE)
    small.theta[:, -1] = 0.01
    if small.int8 is not None:
        small.int8 = quantized(small.k)
    real = slice(1, None) if kind.prompt and kind.sees != probe.CAUSAL else slice(None)  # a row of padding
    out, expected = gpu.run(small)[0], sparse_attention(small)[0]
    torch.testing.assert_close(out[:, :, real], expected[:, :, real])


@here
@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
@pytest.mark.parametrize("prompt, key_bits", [(False, 0), (True, 0), (False, 4)])
def test_probe(placement, prompt, key_bits, monkeypatch):
    """It finds that the kernels run, also while a model is traced, and tries them once."""
    monkeypatch.setattr(probe, "_probed", {})
    torch._dynamo.reset()
    calls, run = [], gpu.run
    monkeypatch.setattr(gpu, "run", lambda call: calls.append(call.key_bits) or run(call))
    kind = a_kind(placement=placement, prompt=prompt, key_bits=key_bits)
    assert probe.probe(True, *kind) is None and not calls

    small = kind.call()
    assert small.kernel is not None

    def known(x):
        asked = probe.probe(False, *probe.kind_of(small)), gpu.too_old_here(x.device)
        return x + (asked == (None, None))

    traced = torch.compile(known, fullgraph=True, backend="aot_eager")
    assert (
        traced(torch.zeros(1, device=DEVICE)).item() == 1.0
        and probe.probe(False, *kind) is None
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
