"""Which path attention takes: the kernel where it fits, what is forced, and no compiler."""

import warnings
from dataclasses import replace

import pytest
import torch

from tests.helpers.calls import call, layer_spec
from tests.helpers.kernel_cases import needs_kernel
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.kernels import registry as kernels
from toptheta.kernels.cpu import backend as cpu
from toptheta.kernels.cpu import library
from toptheta.util.errors import UsageError


def small_call(head_dim: int = 64, dtype: torch.dtype = torch.float32):
    q = torch.randn(1, 2, 5, head_dim).to(dtype)
    return q, q, q, rows_of(None, 5, 5, torch.device("cpu")), layer_spec(1, "pre-softmax", 2), 0.1


@needs_kernel
def test_chooses_the_kernel_where_it_fits(monkeypatch):
    calls = []
    ours = kernels.BACKENDS[0]
    counted = replace(ours, run=lambda call: calls.append(1) or ours.run(call))
    monkeypatch.setattr(kernels, "BACKENDS", (counted, *kernels.BACKENDS[1:]))
    monkeypatch.setattr(kernels, "FORCED", None)
    kernels.attend(call(*small_call()))
    assert len(calls) == 1
    kernels.attend(call(*small_call(head_dim=20)))
    kernels.attend(call(*small_call(dtype=torch.float64)))
    with torch.enable_grad():
        q, k, v, *rest = small_call()
        assert cpu.unsupported(call(q.requires_grad_(), k, v, *rest)) == "the kernel has no backward pass"
    assert len(calls) == 1
    monkeypatch.setattr(kernels, "FORCED", "reference")
    kernels.attend(call(*small_call()))
    assert len(calls) == 1
    monkeypatch.setattr(kernels, "FORCED", "cpu")
    kernels.attend(call(*small_call()))
    assert len(calls) == 2


@needs_kernel
def test_plain_pytorch_is_reported_with_its_reason(monkeypatch):
    """Once for each reason; not if it was asked for, and not for calls that the kernel computes."""
    monkeypatch.setattr(kernels, "FORCED", None)
    kernels._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for head_dim, dtype in (
            (64, torch.float32),
            (20, torch.float32),
            (20, torch.float32),
            (64, torch.float64),
        ):
            kernels.attend(call(*small_call(head_dim, dtype)))
        monkeypatch.setattr(kernels, "FORCED", "reference")
        kernels.attend(call(*small_call(head_dim=24)))
    first, second = (str(one.message) for one in caught)
    assert "plain PyTorch, slower than by a kernel, because head_dim is 20" in first
    assert "float64" in second


@pytest.mark.parametrize(
    "forced, changes, says",
    [
        ("cpu", {"dtype": torch.float64}, "does float32, bfloat16 and float16"),
        ("cpu", {"head_dim": 20}, "head_dim is 20"),
        ("triton", {}, "because (the tensors are not on a GPU|Triton is not installed)"),
        ("gpu", {}, "not one of reference, cpu, triton"),
    ],
)
def test_forcing_what_cannot_be(forced, changes, says, monkeypatch):
    monkeypatch.setattr(kernels, "FORCED", forced)
    with pytest.raises(UsageError, match=says):
        kernels.attend(call(*small_call(**changes)))


def test_no_compiler_is_said_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "FORCED", None)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    library._warn_once.cache_clear()
    args = small_call()
    with pytest.warns(UserWarning, match="no C.. compiler") as said:
        out, _ = kernels.attend(call(*args))
        kernels.attend(call(*args))
    assert len(said) == 1
    assert torch.equal(out, sparse_attention(call(*args))[0])
    monkeypatch.setattr(kernels, "FORCED", "cpu")
    with pytest.raises(UsageError, match="no C.. compiler"):
        kernels.attend(call(*args))
