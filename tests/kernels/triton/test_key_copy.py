"""Decode steps with a copy of K in few bits by the Triton kernels, against plain PyTorch."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.key_copy import SPECS, share_read, step
from tests.kernels.triton.helpers import DEVICE, here, on_device
from toptheta.attention.reference import sparse_attention
from toptheta.kernels.triton import backend as gpu
from toptheta.methods.base import ValueNorms
from toptheta.methods.state import State


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@here
@pytest.mark.parametrize(
    "kind, heads, dtype, number, copy",
    [
        ("decode", (3, 1, 48), torch.float32, 0, "int4"),  # many splits
        long("decode", (2, 1, 16), torch.float32, 1, "int8"),
        long("padded decode", (4, 2, 24), torch.float32, 0, "int8"),
        long("padded decode", (4, 2, 24), torch.float32, 1, "int4"),
        ("static decode", (2, 2, 16), torch.float32, 0, "int4"),
        ("padded decode", (4, 2, 32), torch.float16, 0, "int4"),
        long("padded decode", (4, 2, 32), torch.float16, 0, "int8"),
        ("decode", (3, 1, 48), torch.float32, 3, "int8"),
        long("decode", (2, 1, 16), torch.float32, 5, "int4"),
        long("padded decode", (4, 2, 24), torch.float32, 6, "int4"),
        ("padded decode", (4, 2, 24), torch.float32, 5, "int8"),
        ("static decode", (2, 2, 16), torch.float32, 3, "int4"),
        long("padded decode", (4, 2, 32), torch.float16, 3, "int4"),
        ("padded decode", (4, 2, 32), torch.float16, 6, "int8"),
    ],
    ids=str,
)
def test_equals_the_reference(kind, heads, dtype, number, copy):
    torch.manual_seed(0)
    asked = step(kind, heads, SPECS[number], copy, louder=4.0)
    asked = replace(asked, q=asked.q.to(dtype), k=asked.k.to(dtype), v=asked.v.to(dtype))
    expected, counts = sparse_attention(asked)
    values = ValueNorms(*(x.to(DEVICE) for x in (asked.values.gram, asked.values.mean, asked.values.scale)))
    moved = replace(
        asked, q=asked.q.to(DEVICE), k=asked.k.to(DEVICE), v=asked.v.to(DEVICE), rows=on_device(asked.rows),
        theta=asked.theta.to(DEVICE), sdc_table=asked.sdc_table.to(DEVICE), values=values, state=State(),
    )  # fmt: skip
    assert gpu.unsupported(moved) is None
    for _ in range(2):  # behind the same state, too
        out, ours = gpu.run(moved)
        assert torch.equal(ours.keys.cpu(), counts.keys)
        assert torch.equal(ours.attn.cpu(), counts.attn) and torch.equal(ours.vrow.cpu(), counts.vrow)
        near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(out.cpu(), expected, **near)
    assert share_read(asked, counts.keys) < 0.95
    uncounted, none = gpu.run(replace(moved, count=False))
    assert none is None and torch.equal(uncounted, out)


@here
def test_which_calls_the_kernels_take():
    def why(kind, spec, **changes):
        asked = replace(step(kind, (4, 2, 16), spec, "int4"), **changes)
        return gpu.unsupported(
            replace(asked, q=asked.q.to(DEVICE), k=asked.k.to(DEVICE), v=asked.v.to(DEVICE))
        )

    assert "one decode step" in why("few rows", SPECS[0])
    assert "capk" in why("decode", SPECS[4])
    assert why("decode", SPECS[3]) is None
    assert why("decode", SPECS[3], decode=False) is None
