"""What the Triton kernels share: one tile of scores folded into the running softmax of its rows.

A row that passes its threshold nowhere keeps its largest score (all on a tie), and no kernel knows which row
that is before its last key. So while nothing of a row has passed, the row *provisionally* takes what ties for
its largest score so far, and drops that again once a larger score or the first passing one is seen.
"""

import triton
import triton.language as tl

# Stands for the maximum of no scores: finite, so that no difference of two maxima is inf - inf.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def lookup(table, heads, n, stride, length, mask):
    """Values of a `[H, L]` table at min(n, L - 1); 0 outside `mask`. heads and n broadcast."""
    at = tl.minimum(n, length - 1)
    return tl.load(table + heads * stride + at, mask=mask, other=0.0)


@triton.jit
def exp(x):
    """exp in two instructions: 0 below 2^-126, where tl.exp takes three more for subnormal numbers."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def both(one, other, ALWAYS: tl.constexpr):
    """one & other; just one where the other is known to hold ALWAYS."""
    if ALWAYS:
        return one
    else:
        return one & other


@triton.jit
def keys_of_split(span, batch, kv_len, splits, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys of this split, from start to stop; span `[B, 2]` int32 limits those that may be visible."""
    low, high = 0, kv_len
    if HAS_MASK:
        low, high = tl.load(span + 2 * batch), tl.load(span + 2 * batch + 1)
    per_split = tl.cdiv(tl.cdiv(high - low, BLOCK_N), splits) * BLOCK_N
    start = low + tl.program_id(1) * per_split
    return start, tl.minimum(start + per_split, high)


@triton.jit
def least_above(theta):
    """The smallest float above theta, so that s > theta is s >= this, and one comparison can serve either."""
    theta = theta + 0.0  # -0 becomes +0
    bits = theta.to(tl.int32, bitcast=True)
    up = tl.where(bits >= 0, bits + 1, bits - 1).to(tl.float32, bitcast=True)
    return tl.where(theta == float("inf"), theta, up)


@triton.jit
def least_exp(theta, total):
    """The smallest exp(score - peak) whose share of `total` is above theta, or that is the row's largest."""
    return tl.minimum(least_above(theta * total), 1.0)


@triton.jit
def fold(
    s, least, peak, total, taken, count, passed, TOTAL: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr
):
    """One tile of scores `[M, N]` (-inf: not visible), folded into the state of its M rows.

    least: `[M]`, `least_above` of the thresholds. State: peak `[M]`, the largest score; passed `[M]`, whether
    a score was above its threshold; total, if TOTAL, and taken, the sums of exp(score - peak) over all and
    over the taken keys; count, if COUNT, how many are taken. These three are `[M]` or, with LANES, `[M, N]`,
    still to be summed over the last dimension: threads then need not exchange them for each tile. Returns the
    new state, then the exps of the taken keys (0 elsewhere), which rows take any `[M]`, and the factor for
    what was accumulated before.
    """
    top = tl.max(s, axis=1)
    new_peak = tl.maximum(peak, top)
    some = top >= least
    now = passed | some
    bar = tl.where(now, least, new_peak)
    take = s >= bar[:, None]
    drop = (some | (new_peak > peak)) & (passed == 0)
    shrink = exp(peak - new_peak)
    factor = tl.where(drop, 0.0, shrink)
    exps = exp(s - new_peak[:, None])
    kept = tl.where(take, exps, 0.0)
    if LANES:
        total = total * shrink[:, None] + exps if TOTAL else total
        taken = taken * factor[:, None] + kept
        count = tl.where(drop[:, None], 0, count) + take.to(tl.int32) if COUNT else count
    else:
        total = total * shrink + tl.sum(exps, axis=1) if TOTAL else total
        taken = taken * factor + tl.sum(kept, axis=1)
        count = tl.where(drop, 0, count) + tl.sum(take.to(tl.int32), axis=1) if COUNT else count
    return new_peak, total, taken, count, now, kept, top >= bar, factor


@triton.jit
def store_taken(
    part_taken, part_count, part_acc, part, in_group, taken, count, passed, acc,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Write what a split's rows take, at `part` `[G]`: taken and count by lane as in `fold`, acc `[G, D]`.
    Without COUNT every count is 1; what is taken provisionally has a negative one."""
    d = tl.arange(0, BLOCK_D)
    tl.store(part_taken + part, tl.sum(taken, axis=1), mask=in_group)
    took = tl.sum(count, axis=1) if COUNT else tl.full(part.shape, 1, tl.int32)
    tl.store(part_count + part, tl.where(passed, took, -took), mask=in_group)
    in_tile = in_group[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(part_acc + part[:, None] * HEAD_DIM + d[None, :], acc, mask=in_tile)


@triton.jit
def final_denominator(total, taken, count, peak, n, theta, table, sdc_scale, SDC: tl.constexpr):
    """What the taken exps are divided by. SDC as in params.SDC_METHODS; -1: by all (post-softmax)."""
    result = taken
    if SDC == -1:
        result = total
    if SDC == 1:
        result = taken + sdc_scale * (total - taken)
    if SDC == 2:
        result = taken + sdc_scale * ((n - count).to(tl.float32) * exp(theta - peak))
    if SDC == 3:
        result = taken + sdc_scale * table
    return tl.maximum(result, 1.1754943508222875e-38)  # rows without a visible key: 0 / tiny
