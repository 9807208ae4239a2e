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
def fold(s, whole, theta, peak, total, taken, count, passed):
    """One tile of scores `[M, N]` (-inf: not visible), folded into the state of its M rows.

    s: what is compared with theta `[M]`; whole: what enters total, the same unless a score is only estimated
    (`two_tier.py`), which is then -inf in s. State, all `[M]`: peak, the largest score; total and taken, the
    sums of exp(score - peak) over all and over the taken keys; count, how many are taken; passed, 1 once a
    score was above theta. Returns the new state, then the exps of the taken keys (0 elsewhere), which keys
    are taken, and the factor for what was accumulated before.
    """
    new_peak = tl.maximum(peak, tl.max(whole, axis=1))
    above = s > theta[:, None]
    some = tl.max(above.to(tl.int32), axis=1)
    now = tl.maximum(passed, some)
    take = tl.where(now[:, None] > 0, above, s == new_peak[:, None])
    drop = (passed == 0) & ((some > 0) | (new_peak > peak))
    shrink = tl.exp(peak - new_peak)
    factor = tl.where(drop, 0.0, shrink)
    exps = tl.exp(whole - new_peak[:, None])
    total = total * shrink + tl.sum(exps, axis=1)
    exps = tl.where(take, exps, 0.0)
    taken = taken * factor + tl.sum(exps, axis=1)
    count = tl.where(drop, 0, count) + tl.sum(take.to(tl.int32), axis=1)
    return new_peak, total, taken, count, now, exps, take, factor


@triton.jit
def final_denominator(total, taken, count, peak, n, theta, table, sdc_scale, SDC: tl.constexpr):
    """What the taken exps are divided by. SDC as in params.SDC_METHODS; -1: by all (post-softmax)."""
    result = taken
    if SDC == -1:
        result = total
    if SDC == 1:
        result = taken + sdc_scale * (total - taken)
    if SDC == 2:
        result = taken + sdc_scale * ((n - count).to(tl.float32) * tl.exp(theta - peak))
    if SDC == 3:
        result = taken + sdc_scale * table
    return tl.maximum(result, 1.1754943508222875e-38)  # rows without a visible key: 0 / tiny
