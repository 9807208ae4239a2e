"""Whether the Triton kernels build for Hopper (sm_90), which needs no GPU, and within its registers; and for
other chips, of whose many options only those are compiled here that once failed (bench/builds.py --gate
compiles all)."""

import pytest

from bench.builds import build, fault, kernels
from tests.kernels.triton.helpers import HAS_TRITON, needs_triton
from toptheta.kernels.triton import backend as gpu
from toptheta.kernels.triton.chips import KNOWN

KERNELS = kernels() if HAS_TRITON and not gpu.INTERPRETED else {}


@needs_triton
@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("name", KERNELS)
def test_builds_for_hopper_without_spills_in_loops(name):
    """Three programs of the first stage of decode fit on a processor, as registers are given to them for."""
    function, constants, options = KERNELS[name]
    made = build(function, constants, options)
    assert made.shared <= KNOWN["sm_90"].shared
    assert made.spilled <= 16 and not any(spills for _, _, spills in made.loops)  # a word or two around them
    if name.removesuffix(", masked") in ("split", "filtered"):
        assert made.resident == 3
    if name != "merge" and not name.startswith(("append", "add")):
        assert len(made.loops) >= 1


@needs_triton
@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(
    "chip, dtype, head_dim, name",
    [
        ("sm_100", "bf16", 64, "prefill"),  # a condition around V's product, and the sum of the counts
        ("gfx942", "bf16", 128, "split"),  # maxnreg is no option there
        ("sm_86", "fp32", 256, "gather"),  # shared memory
        ("sm_120", "bf16", 128, "filtered"),
        ("gfx942", "bf16", 256, "filtered"),  # shared memory
    ],
)
def test_builds_for_other_chips(chip, dtype, head_dim, name):
    function, constants, options = kernels(chip, dtype, head_dim)[name]
    if "COUNT" in constants:
        constants = constants | {"COUNT": True}
    assert fault(function, constants, options, dtype, chip) is None


@needs_triton
@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("chip", ["sm_86", "gfx942"])
def test_dense_prefill_fits_chips_with_little_shared_memory(chip):
    """It loads V ahead, too: with any mask, padding and counts."""
    names = [name for name in kernels(chip, every=True) if name.startswith("prefill, masked, CAUSAL False")]
    (name,) = (name for name in names if "COUNT True" in name and "SKIP False" in name)
    function, constants, options = kernels(chip, every=True)[name]
    assert fault(function, constants | {"SDC": 0}, options, "bf16", chip) is None


@needs_triton
@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("chip", ["sm_86", "gfx942"])
def test_tuned_tiles_fit_other_builds(chip):
    """A tile that is the fastest for one build may be too large for another."""
    from toptheta.kernels.triton import tiles

    with tiles.configured("prefill", {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}):
        function, constants, options = kernels(chip)["prefill, masked"]
        assert fault(function, constants | {"COUNT": True}, options, "bf16", chip) is None
    assert constants["BLOCK_N"] == (64 if chip == "sm_86" else 128)
