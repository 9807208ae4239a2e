"""The first stage of decode on the GPU: scores of one query row against the cache, the keys split among the
processors, and in one-stage decode the kept V rows too. Shapes as in decode.py.
"""

import triton
import triton.language as tl

from toptheta.kernels.triton.online import (
    LOWEST,
    both,
    exp,
    keys_of_split,
    lookup,
    next_above,
    softmax_step,
    store_kept,
)

VARYING = ["kv_len", "theta_len", "splits"]  # one build serves every length


@triton.jit(do_not_specialize=VARYING)
def split_kernel(
    q, k, v, mask, span, n, theta, factor, scores, part_max, part_sum, part_kept_sum, part_count, part_acc,
    part_best, scale, kv_len, splits, num_kv_heads, theta_len, theta_stride, n_stride, mask_stride,
    q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, HAS_MASK: tl.constexpr, WITH_V: tl.constexpr,
    COUNT: tl.constexpr, STORE_SCORES: tl.constexpr, FALLBACK: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """The state of `softmax_step` over one split's keys, and the sum of exp times V over the kept ones.

    part_*: `[B, H, S]`, part_acc `[B, H, S, D]`. part_count is the number of keys that the split keeps or,
    without COUNT, 1; it is negative where they are kept provisionally. Without WITH_V only part_max and
    part_sum are written; STORE_SCORES writes scores `[B, H, N]`. FALLBACK: compute only the groups that have
    a row where `filtered_kernel` found no score above the threshold. WEIGHED, without WITH_V: also write
    part_best, the largest score + log(factor), factor being `[B, H, N]`.
    """
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    g, d, i = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + g
    at_head = tl.cast(kv_head, tl.int64)  # offsets of heads can exceed 32 bits
    in_group, in_dim = g < GROUP, d < HEAD_DIM
    row = batch * (num_kv_heads * GROUP) + head  # of [B, H]
    if FALLBACK:
        j = tl.arange(0, BLOCK_S)
        known = in_group[:, None] & (j < splits)[None, :]
        counts = tl.load(part_count + row[:, None] * splits + j[None, :], mask=known, other=0)
        # Other programs of this group may write counts meanwhile, but never a positive one for such a row.
        if tl.min(tl.where(in_group, tl.max(counts, axis=1), 1), axis=0) > 0:
            return
    q_tile = tl.load(
        q + batch * q_batch + head[:, None] * q_head + d[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )
    row_n = tl.load(n + batch * n_stride)
    smallest_kept = next_above(lookup(theta, head, row_n, theta_stride, theta_len, in_group))
    start, stop, length = keys_of_split(span, batch, kv_len, splits, HAS_MASK, BLOCK_N)
    k += batch * k_batch + at_head * k_head
    v += batch * v_batch + at_head * v_head
    # Rows that only fill up the tile start with a maximum above every score: their exps are 0, no V is read.
    running_max = tl.where(in_group, LOWEST, -LOWEST)
    passed = tl.zeros((BLOCK_G,), tl.int1)
    running_sum = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    best = tl.full((BLOCK_G, BLOCK_N), float("-inf"), tl.float32)
    kept_sum = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    count = tl.zeros((BLOCK_G, BLOCK_N), tl.int32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    in_k, in_v = i[None, :] * k_row + d[:, None], i[:, None] * v_row + d[None, :]
    for masked in tl.static_range(2 if HAS_MASK else 1):
        # Of the two loops one has no keys: where all keys of the span are visible, as in a static cache
        # without padding, the mask is not read.
        first = start
        if HAS_MASK:
            first = tl.where((row_n == length) == (masked == 0), start, stop)
        for at in range(first, stop, BLOCK_N):
            tile_start = tl.cast(at, tl.int64)
            inside = at + i < stop
            visible = inside
            if masked:  # K of masked keys is read too: few lie between the first and the last visible key
                visible = tl.load(mask + batch * mask_stride + at + i, mask=inside, other=0) != 0
            k_tile = tl.load(
                k + tile_start * k_row + in_k,
                mask=both(inside[None, :], in_dim[:, None], HEAD_DIM == BLOCK_D),
                other=0.0,
            )
            s = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
            s = tl.where(visible[None, :], s, float("-inf"))
            in_scores = in_group[:, None] & inside[None, :]
            at_score = row[:, None] * kv_len + (at + i)[None, :]
            if STORE_SCORES:
                tl.store(scores + at_score, s, mask=in_scores)
            if WITH_V:
                running_max, running_sum, kept_sum, count, passed, kept_exps, _, rescale = softmax_step(
                    s, smallest_kept, running_max, running_sum, kept_sum, count, passed, True, COUNT, True
                )
                v_needed = tl.max(kept_exps, axis=0) > 0
                v_tile = tl.load(
                    v + tile_start * v_row + in_v,
                    mask=both(v_needed[:, None], in_dim[None, :], HEAD_DIM == BLOCK_D),
                    other=0.0,
                )
                acc = acc * rescale[:, None]
                acc += tl.dot(kept_exps.to(v_tile.dtype), v_tile, input_precision="ieee")
            else:
                new_max = tl.maximum(running_max, tl.max(s, axis=1))
                running_sum = running_sum * exp(running_max - new_max)[:, None] + exp(s - new_max[:, None])
                running_max = new_max
                if WEIGHED:
                    factors = tl.load(factor + at_score, mask=in_scores, other=0.0)
                    best = tl.maximum(best, s + tl.log(factors))

    part = row * splits + split
    tl.store(part_max + part, running_max, mask=in_group)
    tl.store(part_sum + part, tl.sum(running_sum, axis=1), mask=in_group)
    if WEIGHED:
        tl.store(part_best + part, tl.max(best, axis=1), mask=in_group)
    if WITH_V:
        store_kept(
            part_kept_sum, part_count, part_acc, part, in_group, kept_sum, count, passed, acc,
            HEAD_DIM, BLOCK_D, COUNT,
        )  # fmt: skip
