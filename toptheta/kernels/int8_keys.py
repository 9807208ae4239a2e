"""Two tiers of K for decode: an int8 copy shows which keys a threshold may keep; K is read only for those.

As the threshold is known before the scores, an upper bound on a score is enough to drop its key. The copy
represents a key k as `mean + step * code + rest`: the product of q with the first two terms is the estimated
score, and the rest changes the score by at most |q| times the norm of the rest (Cauchy-Schwarz); that norm is
the key's slack. For the product with the codes, q itself is represented by two int8 codes, so that it is an
exact integer product; the rest of q, at most 1/64516 of its largest channel, is bounded in the same way. No
key above the threshold can be missed, so the kept keys are *identical* to those of the exact scores. A row
without a score above its threshold is computed from all of K. Only the sum over all keys, which SDC 'exact'
needs, contains estimates, namely for keys that are not read: its relative error is at most exp(max_error) - 1
of their share (`estimates`), and individual estimates may be too high or too low.

Memory: head_dim + 8 bytes for each token and KV head, in addition to the 4 head_dim of 16-bit K and V: +27%
of the cache at head_dim 128. Bytes read in a decode step for each element of K, with a share c of candidate
keys and f of kept keys: 1 + 2c + 2f instead of 2 + 2f, or 4 for dense attention. Off by default.

This module is plain PyTorch: the copy itself, and the reference of the kernel in triton/filtered.py.
"""

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall, Int8Keys, per_row
from toptheta.attention.rows import Rows
from toptheta.methods.base import NEG_INF, KernelSpec, Selection
from toptheta.methods.compensation import missing_denominator
from toptheta.methods.top_theta import keep_above

LARGEST_CODE = 127
TINY = 2e-18  # a bound on what a norm loses to squares that underflow


def extended(keys: Int8Keys, k: Tensor) -> Int8Keys:
    """The copy extended by the keys `k` `[B, H_kv, M, D]`, with the same mean."""
    new = quantized(k, keys.mean)
    return Int8Keys(
        torch.cat([keys.codes, new.codes], dim=2),
        torch.cat([keys.steps, new.steps], dim=2),
        torch.cat([keys.slacks, new.slacks], dim=2),
        keys.mean,
    )


def quantized(k: Tensor, mean: Tensor | None = None) -> Int8Keys:
    """The int8 copy of `k` `[B, H_kv, N, D]`, around `mean` or, if None, the mean of these keys.

    The slacks also cover the rounding of all products and sums in the two compared scores, in any order and
    with tensor cores (an error of up to 2^-21 per term).
    """
    k = k.float()
    if mean is None:
        mean = k.mean(dim=2)
    centred = k - mean[:, :, None]
    steps = centred.abs().amax(dim=-1) / LARGEST_CODE
    steps = steps.masked_fill(steps < torch.finfo(torch.float32).tiny, 1.0)
    codes = (centred / steps[..., None]).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    copy = codes * steps[..., None]
    rounding = k.shape[3] * 2.0**-21
    sizes = k.norm(dim=-1) + copy.norm(dim=-1) + mean.norm(dim=-1)[..., None]
    slacks = (centred - copy).norm(dim=-1) * (1 + rounding) + sizes * rounding + TINY
    return Int8Keys(codes.to(torch.int8), steps, slacks, mean)


def rounded_query(q: Tensor) -> Tensor:
    """q rounded to step * (high + low / 254): high and low are integers up to 127, with one step per row."""
    q = q.float()
    steps = q.abs().amax(dim=-1, keepdim=True) / LARGEST_CODE
    steps = torch.where(steps > torch.finfo(torch.float32).tiny, steps, 1.0)
    high = (q / steps + 0.5).floor()
    low = ((q / steps - high) * (2 * LARGEST_CODE) + 0.5).floor()
    return steps * (high + low / (2 * LARGEST_CODE))


def estimates(q: Tensor, keys: Int8Keys, scale: float) -> tuple[Tensor, Tensor]:
    """Estimated scores and the bounds of their errors, both `[B, H, N]`. q: `[B, H, 1, D]`."""
    batch, num_heads, _, head_dim = q.shape
    q = q.float().view(batch, keys.codes.shape[1], -1, head_dim)
    coded, steps = rounded_query(q), keys.steps[:, :, None]
    estimated = coded @ keys.codes.float().transpose(2, 3) * steps
    estimated = (estimated + q @ keys.mean[..., None]) * scale
    largest = LARGEST_CODE * head_dim**0.5  # the largest norm of a key's codes
    max_error = (q.norm(dim=-1, keepdim=True) + TINY) * keys.slacks[:, :, None]
    max_error = (max_error + ((q - coded).norm(dim=-1, keepdim=True) + TINY) * largest * steps) * abs(scale)
    return estimated.view(batch, num_heads, -1), max_error.view(batch, num_heads, -1)


def candidate_keys(q: Tensor, keys: Int8Keys, theta: Tensor, rows: Rows, scale: float) -> Tensor:
    """Keys that must be read for each KV head, `[B, H_kv, N]` bool: some head of the group may keep them."""
    estimated, max_error = estimates(q, keys, scale)
    candidate = estimated + max_error > per_row(theta, rows.n)[:, :, 0]
    if rows.mask is not None:
        candidate &= rows.mask[:, :, 0]
    batch, num_kv_heads = keys.mean.shape[:2]
    return candidate.view(batch, num_kv_heads, -1, estimated.shape[-1]).any(dim=2)


def serves(spec: KernelSpec) -> bool:
    """Whether the copy can be used for this selection: for thresholds on scores."""
    return spec.sparse and (spec.selection, spec.placement) == (Selection.THRESHOLD, "pre-softmax")


def _scores_and_candidates(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Scores `[B, H, N]`, the keys that are read for each KV head `[B, H_kv, N]` bool, and the visible keys
    `[B or 1, 1, N]` bool."""
    q, k, rows, keys, theta = call.q, call.k, call.rows, call.int8, call.theta
    assert keys is not None and theta is not None
    (batch, num_heads, _, head_dim), (num_kv_heads, kv_len) = q.shape, k.shape[1:3]
    exact = (q.float().view(batch, num_kv_heads, -1, head_dim) @ k.float().transpose(2, 3)) * call.scale
    exact = exact.view(batch, num_heads, kv_len)
    visible = exact.new_ones(1, 1, kv_len, dtype=torch.bool) if rows.mask is None else rows.mask[:, :, 0]
    candidates = candidate_keys(q, keys, theta, rows, call.scale)
    of_heads = candidates.repeat_interleave(num_heads // num_kv_heads, dim=1) & visible
    # A row without a score above its threshold keeps its largest score, so its group reads all of K.
    empty = ~(exact.masked_fill(~of_heads, NEG_INF) > per_row(theta, rows.n)[:, :, 0]).any(dim=-1)
    empty = empty.view(batch, num_kv_heads, -1).any(dim=-1, keepdim=True)
    return exact, (candidates | empty) & visible, visible


def keys_read_of(call: AttentionCall) -> Tensor:
    """`[B, H_kv]` int64, the number of K rows that a decode step with this copy reads."""
    return _scores_and_candidates(call)[1].sum(dim=-1)


def two_tier_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention of the only row of each sequence, `[B, H, 1, D]` float32, and the kept keys, `[B, H, N]`
    bool.

    call: with thresholds on scores and an int8 copy, without capk and VMC. This is the reference for the
    kernel: it has all of K, but uses only the keys that the kernel reads. Raises ValueError for other calls.
    """
    q, k, v, rows, keys, spec, theta = call.q, call.k, call.v, call.rows, call.int8, call.kernel, call.theta
    if spec is None or keys is None or theta is None or not serves(spec) or spec.capk or spec.vmc:
        raise ValueError(f"two tiers of K need thresholds on scores, not {call.spec}")
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    exact, candidates, visible = _scores_and_candidates(call)
    tables = call.tables_of(rows.n)
    assert tables.theta is not None
    candidates = candidates.repeat_interleave(group, dim=1)
    known = exact.masked_fill(~candidates, NEG_INF)
    estimated = estimates(q, keys, call.scale)[0]
    whole = torch.where(candidates, exact, estimated).masked_fill(~visible, NEG_INF)[:, :, None]
    row_max = whole.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    keep = keep_above(known[:, :, None], tables.theta, row_max)
    exps = (whole - row_max).exp()
    kept_exps = exps.masked_fill(~keep, 0.0)
    denominator = kept_exps.sum(dim=-1, keepdim=True)
    if spec.sdc != "none":
        missing = missing_denominator(spec.sdc, exps, keep, row_max, rows.n, tables)
        denominator = denominator + spec.sdc_scale * missing
    weights = kept_exps / denominator.clamp_min(torch.finfo(torch.float32).tiny)
    out = weights.view(batch, num_kv_heads, group, kv_len) @ v.float()
    return out.view(batch, num_heads, 1, head_dim), keep[:, :, 0]
