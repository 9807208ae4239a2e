"""Whether the Triton kernels build for Hopper (sm_90), which needs no GPU, and within its registers."""

import pytest

from bench.builds import SHARED_OF_ONE, build, kernels
from tests.test_kernels_triton import HAS_TRITON, needs_triton
from toptheta.kernels import gpu

KERNELS = kernels() if HAS_TRITON and not gpu.INTERPRETED else {}


@needs_triton
@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", KERNELS)
def test_builds_for_hopper_without_spills_in_loops(name, masked):
    """As many of the decode kernels fit on a processor as the splits are made for."""
    from toptheta.kernels import triton_decode

    function, constants, options = KERNELS[name]
    if masked:
        flag = next((flag for flag in ("HAS_MASK", "HAS_KEY_REAL") if flag in constants), None)
        if flag is None:
            pytest.skip("takes no mask")
        constants = constants | {flag: True}
    made = build(function, constants, options)
    assert made.shared <= SHARED_OF_ONE
    assert made.spilled <= 16 and not any(spills for _, _, spills in made.loops)  # a word or two around them
    if name in ("split", "filtered"):
        assert made.resident == triton_decode.RESIDENT
    if name != "merge":
        assert len(made.loops) >= 1
