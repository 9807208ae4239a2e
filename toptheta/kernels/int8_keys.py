"""Two tiers of K for decode: an int8 copy tells which keys a threshold may keep; K is read only for those.

A threshold is known before the scores are, so an upper bound on a score is enough to drop its key. The copy
holds k as `mean + step * code + rest`: the product of q with the first two is the estimated score, and the
rest moves it by at most |q| times the norm of the rest (Cauchy-Schwarz), its slack. For the product with the
codes q itself is two int8 codes, so that it is one of whole numbers, and exact; what they leave of q, 1/64516
of its largest channel at most, is bounded in the same way. No key above the threshold can be missed, so what
is kept is *identical* to what the scores themselves keep; where nothing passes, the whole row is computed
from K. Only the sum over all keys, which SDC 'exact' wants, takes the estimates of the keys that were not
read: its error is at most exp(reach) - 1 of their share (`estimates`), and estimates err both ways.

Memory: head_dim + 8 bytes for each token and KV head, beside the 4 head_dim of 16-bit K and V: +27% of the
cache at head_dim 128. Bytes read in a decode step, with a share c of keys in question and f kept, for each
element of K: 1 + 2c + 2f instead of 2 + 2f, or 4 dense. Off unless asked for.

Plain PyTorch: the copy itself, and what the kernel in triton/filtered.py computes from it, as the reference.
"""

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall, Int8Keys, per_row
from toptheta.attention.rows import Rows
from toptheta.methods.base import NEG_INF, KernelSpec, Selection
from toptheta.methods.compensation import missing_denominator
from toptheta.methods.top_theta import keep_above

LARGEST_CODE = 127
TINY = 2e-18  # what squares below the smallest float may add up to in a norm


def followed_by(keys: Int8Keys, k: Tensor) -> Int8Keys:
    """The copy of these keys and then those of `k` `[B, H_kv, M, D]`."""
    new = quantized(k, keys.mean)
    return Int8Keys(
        torch.cat([keys.codes, new.codes], dim=2),
        torch.cat([keys.steps, new.steps], dim=2),
        torch.cat([keys.slacks, new.slacks], dim=2),
        keys.mean,
    )


def quantized(k: Tensor, mean: Tensor | None = None) -> Int8Keys:
    """The int8 copy of `k` `[B, H_kv, N, D]`, around `mean` or, if None, the mean of these keys.

    A slack covers the rounding of every product and sum that leads to the two scores compared, in any order
    and with tensor cores (an error of up to 2^-21 a term).
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


def two_codes(q: Tensor) -> Tensor:
    """q as step * (high + low / 254), with whole numbers up to 127 and a step for each row."""
    q = q.float()
    steps = q.abs().amax(dim=-1, keepdim=True) / LARGEST_CODE
    steps = torch.where(steps > torch.finfo(torch.float32).tiny, steps, 1.0)
    high = (q / steps + 0.5).floor()
    low = ((q / steps - high) * (2 * LARGEST_CODE) + 0.5).floor()
    return steps * (high + low / (2 * LARGEST_CODE))


def estimates(q: Tensor, keys: Int8Keys, scale: float) -> tuple[Tensor, Tensor]:
    """Estimated scores and how far the true ones may be from them, both `[B, H, N]`. q: `[B, H, 1, D]`."""
    batch, num_heads, _, head_dim = q.shape
    q = q.float().view(batch, keys.codes.shape[1], -1, head_dim)
    coded, steps = two_codes(q), keys.steps[:, :, None]
    about = coded @ keys.codes.float().transpose(2, 3) * steps
    about = (about + q @ keys.mean[..., None]) * scale
    largest = LARGEST_CODE * head_dim**0.5  # norm that the codes of a key can have
    reach = (q.norm(dim=-1, keepdim=True) + TINY) * keys.slacks[:, :, None]
    reach = (reach + ((q - coded).norm(dim=-1, keepdim=True) + TINY) * largest * steps) * abs(scale)
    return about.view(batch, num_heads, -1), reach.view(batch, num_heads, -1)


def wanted_keys(q: Tensor, keys: Int8Keys, theta: Tensor, rows: Rows, scale: float) -> Tensor:
    """Keys that each KV head must be read for, `[B, H_kv, N]` bool: some head of the group may keep them."""
    about, reach = estimates(q, keys, scale)
    in_question = about + reach > per_row(theta, rows.n)[:, :, 0]
    if rows.mask is not None:
        in_question &= rows.mask[:, :, 0]
    batch, num_kv_heads = keys.mean.shape[:2]
    return in_question.view(batch, num_kv_heads, -1, about.shape[-1]).any(dim=2)


def serves(spec: KernelSpec) -> bool:
    """Whether the copy can tell what this selection may keep: thresholds on scores."""
    return spec.sparse and (spec.selection, spec.placement) == (Selection.THRESHOLD, "pre-softmax")


def two_tier_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention of the only row of each sequence, `[B, H, 1, D]` float32, and what it keeps, `[B, H, N]`.

    call: with thresholds on scores, an int8 copy, without capk and VMC. The reference of the kernel: it reads
    all of K, but uses only what the kernel reads.
    """
    q, k, v, rows, keys, spec, theta = call.q, call.k, call.v, call.rows, call.int8, call.kernel, call.theta
    if spec is None or keys is None or theta is None or not serves(spec) or spec.capk or spec.vmc:
        raise ValueError(f"two tiers of K compute thresholds on scores, not {call.spec}")
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    exact = (q.float().view(batch, num_kv_heads, group, head_dim) @ k.float().transpose(2, 3)) * call.scale
    exact = exact.view(batch, num_heads, kv_len)
    tables = call.tables_of(rows.n)
    assert tables.theta is not None
    seen = torch.ones_like(exact, dtype=torch.bool) if rows.mask is None else rows.mask[:, :, 0]
    wanted = wanted_keys(q, keys, theta, rows, call.scale).repeat_interleave(group, dim=1)
    # A row that passes nowhere needs its largest score: its group reads all of K.
    empty = ~(exact.masked_fill(~(wanted & seen), NEG_INF) > tables.theta[:, :, 0]).any(dim=-1)
    empty = empty.view(batch, num_kv_heads, group).any(dim=-1).repeat_interleave(group, dim=1)
    wanted = (wanted | empty[..., None]) & seen
    known = exact.masked_fill(~wanted, NEG_INF)
    about = estimates(q, keys, call.scale)[0]
    whole = torch.where(wanted, exact, about).masked_fill(~seen, NEG_INF)[:, :, None]
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
