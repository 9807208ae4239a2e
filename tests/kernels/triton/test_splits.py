"""How many splits share the keys of a sequence in decode, and how many programs a processor runs."""

import pytest

from tests.kernels.triton.helpers import needs_triton
from toptheta.kernels.triton.chips import KNOWN, Chip, too_old


def time(batch_heads: int, tiles: int, at_once: int, splits: int) -> int:
    """Tiles that the processors go through one after the other."""
    waves = -(-batch_heads * splits // at_once)
    return waves * -(-tiles // splits)


@needs_triton
@pytest.mark.parametrize("at_once", [24, 396, 912])
@pytest.mark.parametrize("batch_heads", [1, 2, 8, 32, 130, 1024])
@pytest.mark.parametrize("tiles", [1, 2, 63, 64, 512, 2048])
def test_is_within_5_percent_of_the_best(batch_heads, tiles, at_once):
    from toptheta.kernels.triton.decode import MAX_SPLITS, split_count

    splits = split_count(batch_heads, tiles, at_once)
    assert 1 <= splits <= min(tiles, MAX_SPLITS)
    best = min(time(batch_heads, tiles, at_once, n) for n in range(1, min(tiles, MAX_SPLITS) + 1))
    assert time(batch_heads, tiles, at_once, splits) <= 1.05 * best
    assert all(time(batch_heads, tiles, at_once, n) > 1.05 * best for n in range(1, splits))


@needs_triton
def test_fills_the_processors():
    from toptheta.kernels.triton.decode import split_count

    assert split_count(1, 2048, 396) > 300  # 128k keys of one KV head
    assert split_count(792, 64, 396) == 1  # two full waves


def test_programs_of_a_processor():
    hopper = KNOWN["sm_90"]
    assert hopper.resident(168, 38912, 4) == 3  # by registers: 65,536 / (168 * 128)
    assert hopper.resident(40, 98304, 4) == 2  # by shared memory: 228 KiB / 97 KiB
    assert hopper.resident(255, 232448, 8) == 1
    assert KNOWN["gfx942"].resident(100, 1000, 4) >= 1


def test_old_chips_are_refused():
    turing = Chip("cuda", 75, 40, 64 << 10, 64 << 10)
    assert too_old(turing) == "the kernels need compute capability 8.0 or later, and this GPU has 7.5"
    assert all(too_old(chip) is None for chip in KNOWN.values())
