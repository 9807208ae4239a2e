"""The second stage of decode on the GPU, where selection needs the whole row first: thresholds on weights,
Top-k, and all thresholds with a copy of K in few bits. Shapes as in decode.py.
"""

import triton
import triton.language as tl

from toptheta.kernels.triton.online import (
    both,
    compared,
    exp,
    keys_of_split,
    lookup,
    next_above,
    smallest_kept_exp,
    smallest_kept_weighed,
    whole_row,
)

VARYING = ["kv_len", "theta_len", "splits"]  # one build serves every length


@triton.jit
def kept_keys(
    s, element, here, keep, factor, row_max, cutoff, KEEP_GIVEN: tl.constexpr, ON_SCORES: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """Which keys of a tile each row keeps, `[G, N]` bool, and exp(score - row_max) of those, 0 elsewhere.

    s: scores `[G, N]`; element: their places in `[B, H, N]` tensors; cutoff `[G]`: the smallest that is kept
    of what is `compared`.
    """
    exps = exp(s - row_max[:, None])
    if KEEP_GIVEN:
        kept = tl.load(keep + element, mask=here, other=0) != 0
    else:
        candidates = compared(s, element, here, factor, row_max, ON_SCORES, WEIGHED)
        kept = (s > float("-inf")) & (candidates >= cutoff[:, None])
    return kept, tl.where(kept, exps, 0.0)


@triton.jit(do_not_specialize=VARYING)
def gather_kernel(
    v, span, n, theta, factor, scores, listed, keep, part_max, part_sum, part_kept_sum, part_count, part_acc,
    part_best, kv_len, splits, num_kv_heads, theta_len, theta_stride, n_stride, v_batch, v_head, v_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, HAS_MASK: tl.constexpr,
    KEEP_GIVEN: tl.constexpr, STORE_KEEP: tl.constexpr, ON_SCORES: tl.constexpr, WEIGHED: tl.constexpr,
    BY_COPY: tl.constexpr,
):  # fmt: skip
    """The sum of exp times V over the kept keys, from the scores, part_max and part_sum.

    KEEP_GIVEN: keep `[B, H, N]` says which keys are kept. Otherwise keys are kept whose weight (WEIGHED:
    times factor `[B, H, N]`; ON_SCORES, with BY_COPY only: whose score) is above theta, or the row's largest,
    and STORE_KEEP writes them to keep. First the keys that some head keeps are listed (listed: scratch `[B,
    H_kv, N]` int32), so that V is read and multiplied in full tiles. part_kept_sum, part_count and part_acc
    are as in `split_kernel`, but relative to the maximum of the whole row. BY_COPY: the scores are those of
    `candidates_kernel`, and only keys that it read are kept.
    """
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    g, d, i = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    head = kv_head * GROUP + g
    in_group, in_dim = g < GROUP, d < HEAD_DIM
    row = batch * (num_kv_heads * GROUP) + head
    parts, in_parts = row[:, None] * splits + i[None, :], in_group[:, None] & (i < splits)[None, :]
    row_max, row_sum = whole_row(part_max, part_sum, parts, in_parts)
    row_n = tl.load(n + batch * n_stride)
    row_theta = lookup(theta, head, row_n, theta_stride, theta_len, in_group)
    if WEIGHED or BY_COPY:
        best = tl.max(tl.load(part_best + parts, mask=in_parts, other=float("-inf")), axis=1)
    if ON_SCORES:
        cutoff = tl.minimum(next_above(row_theta), best)
    elif WEIGHED:
        cutoff = smallest_kept_weighed(row_theta, row_max, row_sum, best)
    else:
        cutoff = smallest_kept_exp(row_theta, row_sum)
        if BY_COPY:
            cutoff = tl.minimum(cutoff, exp(best - row_max))
    v += batch * v_batch + tl.cast(kv_head, tl.int64) * v_head  # can exceed 32 bits
    start, stop, _length = keys_of_split(span, batch, kv_len, splits, HAS_MASK, BLOCK_N)
    listed += (batch * num_kv_heads + kv_head) * kv_len + start

    kept_sum = tl.zeros((BLOCK_G, BLOCK_F), tl.float32)
    count = tl.zeros((BLOCK_G, BLOCK_F), tl.int32)
    num_listed = 0
    for at in range(start, stop, BLOCK_F):
        key = at + tl.arange(0, BLOCK_F)
        here = in_group[:, None] & (key < stop)[None, :]
        element = row[:, None] * kv_len + key[None, :]
        s = tl.load(scores + element, mask=here, other=float("-inf"))
        kept, exps = kept_keys(
            s, element, here, keep, factor, row_max, cutoff, KEEP_GIVEN, ON_SCORES, WEIGHED
        )  # fmt: skip
        if STORE_KEEP and not KEEP_GIVEN:
            tl.store(keep + element, kept.to(tl.int8), mask=here)
        kept_sum += exps
        count += kept.to(tl.int32)
        needed = (tl.max(exps, axis=0) > 0).to(tl.int32)
        place = tl.cumsum(needed, axis=0)
        tl.store(listed + num_listed + place - 1, key, mask=needed > 0)
        num_listed += tl.max(place, axis=0)
    tl.debug_barrier()  # each thread reads entries of the list that other threads wrote

    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for at in range(0, num_listed, BLOCK_N):
        in_list = at + tl.arange(0, BLOCK_N) < num_listed
        key = tl.load(listed + at + tl.arange(0, BLOCK_N), mask=in_list, other=0)
        here = in_group[:, None] & in_list[None, :]
        element = row[:, None] * kv_len + key[None, :]
        s = tl.load(scores + element, mask=here, other=float("-inf"))
        _kept, exps = kept_keys(
            s, element, here, keep, factor, row_max, cutoff, KEEP_GIVEN, ON_SCORES, WEIGHED
        )  # fmt: skip
        v_tile = tl.load(
            v + key[:, None].to(tl.int64) * v_row + d[None, :],
            mask=both(in_list[:, None], in_dim[None, :], HEAD_DIM == BLOCK_D),
            other=0.0,
        )
        acc += tl.dot(exps.to(v_tile.dtype), v_tile, input_precision="ieee")

    part = row * splits + split
    tl.store(part_kept_sum + part, tl.sum(kept_sum, axis=1), mask=in_group)
    tl.store(part_count + part, tl.sum(count, axis=1), mask=in_group)
    tl.store(part_acc + part[:, None] * HEAD_DIM + d[None, :], acc, mask=in_group[:, None] & in_dim[None, :])
