"""Value-aware thresholds by the Triton kernels."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.value_aware import check_weighed, weighed_call
from tests.kernels.triton.helpers import DEVICE, here, on_device
from toptheta.attention.call import Counts
from toptheta.kernels.triton import backend as gpu
from toptheta.methods.base import ValueNorms
from toptheta.methods.state import State


@here
@pytest.mark.parametrize("kind", ["padded decode", "static decode", "left padding", "any mask"])
def test_equals_the_reference(kind):
    torch.manual_seed(1)
    asked = weighed_call(kind, (3, 1, 16), 4.0, vmc=True)
    assert asked.values is not None and asked.theta is not None
    values = ValueNorms(*(x.to(DEVICE) for x in (asked.values.gram, asked.values.mean, asked.values.scale)))
    moved = replace(
        asked, q=asked.q.to(DEVICE), k=asked.k.to(DEVICE), v=asked.v.to(DEVICE), rows=on_device(asked.rows),
        theta=asked.theta.to(DEVICE), values=values, state=State(),
    )  # fmt: skip
    assert gpu.unsupported(moved) is None

    def run(_):
        out, counts = gpu.run(moved)
        assert counts is not None
        return out.cpu(), Counts(counts.attn.cpu(), counts.vrow.cpu())

    check_weighed(asked, run)
