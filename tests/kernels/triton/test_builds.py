"""Whether the Triton kernels build for Hopper (sm_90), which needs no GPU, and within its registers."""

import pytest

from bench.builds import SHARED_OF_ONE, build, kernels
from tests.kernels.triton.helpers import HAS_TRITON, needs_triton
from toptheta.kernels.triton import backend as gpu

KERNELS = kernels() if HAS_TRITON and not gpu.INTERPRETED else {}


@needs_triton
@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("name", KERNELS)
def test_builds_for_hopper_without_spills_in_loops(name):
    """As many programs of the decode kernels fit on a processor as `split_count` assumes."""
    from toptheta.kernels.triton import decode as triton_decode

    function, constants, options = KERNELS[name]
    made = build(function, constants, options)
    assert made.shared <= SHARED_OF_ONE
    assert made.spilled <= 16 and not any(spills for _, _, spills in made.loops)  # a word or two around them
    if name.removesuffix(", masked") in ("split", "filtered"):
        assert made.resident == triton_decode.RESIDENT
    if name != "merge":
        assert len(made.loops) >= 1
