"""What the Triton kernels share: the online softmax, updated with one tile of scores at a time.

A row without any score above its threshold keeps its largest score (every key that ties for it). Which rows
those are is known only after the last key. So, as long as no score of a row was above the threshold, the row
keeps the keys with its largest score so far *provisionally*, and discards them when a larger score, or the
first one above the threshold, is found.
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
    """one & other. ALWAYS: other is known to be true everywhere, so the result is one."""
    if ALWAYS:
        return one
    else:
        return one & other


@triton.jit
def keys_of_split(span, batch, kv_len, splits, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys of this split, start to stop, and the number of keys that the splits share. With HAS_MASK,
    those are the keys of span `[B, 2]` int32: the first visible one of each sequence and the one after its
    last."""
    low, high = 0, kv_len
    if HAS_MASK:
        low, high = tl.load(span + 2 * batch), tl.load(span + 2 * batch + 1)
    per_split = tl.cdiv(tl.cdiv(high - low, BLOCK_N), splits) * BLOCK_N
    start = low + tl.program_id(1) * per_split
    return start, tl.minimum(start + per_split, high), high - low


@triton.jit
def whole_row(part_max, part_sum, parts, in_parts):
    """A row's largest score and its sum of exp(score - largest), from those of its splits, which lie at
    `parts` `[heads, splits]`."""
    maxima = tl.load(part_max + parts, mask=in_parts, other=LOWEST)
    largest = tl.max(maxima, axis=1)
    sums = tl.load(part_sum + parts, mask=in_parts, other=0.0)
    return largest, tl.sum(sums * exp(maxima - largest[:, None]), axis=1)


@triton.jit
def next_above(theta):
    """The smallest float above theta: `s > theta` is `s >= next_above(theta)`.

    So one comparison serves for keys above the threshold and for keys that equal the row's largest score.
    """
    theta = theta + 0.0  # -0 becomes +0
    bits = theta.to(tl.int32, bitcast=True)
    up = tl.where(bits >= 0, bits + 1, bits - 1).to(tl.float32, bitcast=True)
    return tl.where(theta == float("inf"), theta, up)


@triton.jit
def smallest_kept_exp(theta, row_sum):
    """The smallest exp(score - row_max) that is kept by a threshold on weights.

    It is the smallest one whose weight, its share of row_sum, is above theta, but at most 1: that is the exp
    of the row's largest score, which is always kept.
    """
    return tl.minimum(next_above(theta * row_sum), 1.0)


@triton.jit
def smallest_kept_weighed(theta, row_max, row_sum, best):
    """The smallest score + log(factor) that is kept by a threshold on weight times factor; at most `best`,
    the row's largest, which is always kept. A threshold of -inf keeps all, also keys whose factor is 0."""
    cutoff = next_above(tl.log(tl.maximum(theta, 0.0)) + row_max + tl.log(row_sum))
    return tl.where(theta < 0, float("-inf"), tl.minimum(cutoff, best))


@triton.jit
def compared(s, element, here, factor, row_max, ON_SCORES: tl.constexpr, WEIGHED: tl.constexpr):
    """What thresholds are compared with in place of the scores `s` `[G, N]`: the scores with ON_SCORES, with
    WEIGHED score + log(factor), else exp(score - row_max). element: the scores' places in factor `[B, H, N]`.
    """
    if ON_SCORES:
        return s
    elif WEIGHED:
        return s + tl.log(tl.load(factor + element, mask=here, other=0.0))
    else:
        return exp(s - row_max[:, None])


@triton.jit
def softmax_step(
    s, smallest_kept, running_max, running_sum, kept_sum, count, passed,
    SUM: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the state of M rows, updated with a tile of their scores.

    s: `[M, N]`, -inf where a key is not visible; smallest_kept: `[M]`, `next_above` of the thresholds.
    State: running_max `[M]`, the largest score; passed `[M]`, whether some score was above the threshold;
    running_sum, if SUM, and kept_sum, the sums of exp(score - running_max) over all and over the kept keys;
    count, if COUNT, the number of kept keys. These three are `[M]` or, with LANES, `[M, N]` and to be summed
    over the last dimension after the last tile, so that threads need not exchange sums for every tile.

    Returns the new state; the exps `[M, N]` of the kept keys, 0 elsewhere; which rows keep any key of this
    tile `[M]`; and the factor `[M]` that rescales what was accumulated over the kept keys before this tile.
    """
    tile_max = tl.max(s, axis=1)
    new_max = tl.maximum(running_max, tile_max)
    any_passed = tile_max >= smallest_kept
    now_passed = passed | any_passed
    cutoff = tl.where(now_passed, smallest_kept, new_max)
    keep = s >= cutoff[:, None]
    discard = (any_passed | (new_max > running_max)) & (passed == 0)
    rescale = exp(running_max - new_max)
    kept_rescale = tl.where(discard, 0.0, rescale)
    exps = exp(s - new_max[:, None])
    kept_exps = tl.where(keep, exps, 0.0)
    if LANES:
        running_sum = running_sum * rescale[:, None] + exps if SUM else running_sum
        kept_sum = kept_sum * kept_rescale[:, None] + kept_exps
        count = tl.where(discard[:, None], 0, count) + keep.to(tl.int32) if COUNT else count
    else:
        running_sum = running_sum * rescale + tl.sum(exps, axis=1) if SUM else running_sum
        kept_sum = kept_sum * kept_rescale + tl.sum(kept_exps, axis=1)
        count = tl.where(discard, 0, count) + tl.sum(keep.to(tl.int32), axis=1) if COUNT else count
    return new_max, running_sum, kept_sum, count, now_passed, kept_exps, tile_max >= cutoff, kept_rescale


@triton.jit
def store_kept(
    part_kept_sum, part_count, part_acc, part, in_group, kept_sum, count, passed, acc,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Write the sums over the keys that a split keeps, at the places `part` `[G]` of the part_* tensors.

    kept_sum, count: `[G, N]` as in `softmax_step` with LANES; acc: `[G, D]`. The count written is negative
    where the keys are kept provisionally; without COUNT it is 1 or -1.
    """
    d = tl.arange(0, BLOCK_D)
    tl.store(part_kept_sum + part, tl.sum(kept_sum, axis=1), mask=in_group)
    num_kept = tl.sum(count, axis=1) if COUNT else tl.full(part.shape, 1, tl.int32)
    tl.store(part_count + part, tl.where(passed, num_kept, -num_kept), mask=in_group)
    in_tile = in_group[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(part_acc + part[:, None] * HEAD_DIM + d[None, :], acc, mask=in_tile)


@triton.jit
def final_denominator(row_sum, kept_sum, count, row_max, n, theta, table, sdc_scale, SDC: tl.constexpr):
    """The denominator of the kept exps, with compensation. SDC: the index in compensation.SDC_METHODS, or -1
    for thresholds on weights, whose denominator is the sum over all keys."""
    result = kept_sum
    if SDC == -1:
        result = row_sum
    if SDC == 1:
        result = kept_sum + sdc_scale * (row_sum - kept_sum)
    if SDC == 2:
        result = kept_sum + sdc_scale * ((n - count).to(tl.float32) * exp(theta - row_max))
    if SDC == 3:
        result = kept_sum + sdc_scale * table
    return tl.maximum(result, 1.1754943508222875e-38)  # rows without a visible key: 0 / tiny
