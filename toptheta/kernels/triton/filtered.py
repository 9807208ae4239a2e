"""Decode from two tiers of K (int8_keys.py) on the GPU: an int8 copy decides for which keys K has to be read.

`filtered_kernel` replaces `split_kernel` of decode.py. Each program first goes over the int8 copy of its keys
and lists the candidates: the keys that some head of the group may keep. Then it goes over that list and reads
K and, where a head does keep the key, V. Shapes as in toptheta/attention/reference.py; S: number of splits.
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


@triton.jit
def int8_query(q_tile, in_dim, scale, HEAD_DIM: tl.constexpr):
    """q `[G, D]` as step * (high + low / 254), whose products with the codes of K are exact integer products.

    Returns high, low `[G, D]` int8, step `[G]`, and the largest error of a score per unit of a key's slack
    and per unit of a key's step, both `[G]`: see `int8_keys.estimates`.
    """
    q_tile = q_tile.to(tl.float32)
    step = tl.max(tl.abs(q_tile), axis=1) / 127
    step = tl.where(step > 1.1754943508222875e-38, step, 1.0)
    codes = q_tile / step[:, None]
    high = tl.floor(codes + 0.5)
    low = tl.floor((codes - high) * 254 + 0.5)
    rest = tl.where(in_dim[None, :], q_tile - step[:, None] * (high + low / 254), 0.0)
    norm = tl.sqrt(tl.sum(q_tile * q_tile, axis=1)) + 2e-18  # squares below 1e-38 underflow
    rest_norm = tl.sqrt(tl.sum(rest * rest, axis=1)) + 2e-18
    largest = tl.sqrt(HEAD_DIM * 16129.0)  # the largest norm of a key's codes
    return high.to(tl.int8), low.to(tl.int8), step, norm * tl.abs(scale), rest_norm * largest * tl.abs(scale)


@triton.jit(do_not_specialize=VARYING)
def filtered_kernel(
    q, k, v, mask, span, n, theta, listed, scores, part_max, part_sum, part_kept_sum, part_count, part_acc,
    scale, kv_len, splits, num_kv_heads, theta_len, theta_stride, n_stride, mask_stride,
    q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row,
    codes, steps, slacks, k_mean, codes_batch, codes_head, steps_batch, steps_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, HAS_MASK: tl.constexpr, COUNT: tl.constexpr,
    STORE_SCORES: tl.constexpr,
):  # fmt: skip
    """As `split_kernel`, but K is read only of candidates: keys that, by the int8 copy, some head may keep.

    listed: scratch `[B, H_kv, N]` int32. STORE_SCORES writes the scores of candidates only. A row without a
    score above its threshold keeps its largest score, which need not be a candidate: what is written for such
    a row is wrong, except that its counts are not positive; `split_kernel` with FALLBACK computes it again.
    """
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    g, d, i = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + g
    at_head = tl.cast(kv_head, tl.int64)  # offsets of heads can exceed 32 bits
    in_group, in_dim = g < GROUP, d < HEAD_DIM
    row = batch * (num_kv_heads * GROUP) + head
    group = batch * num_kv_heads + kv_head
    q_tile = tl.load(
        q + batch * q_batch + head[:, None] * q_head + d[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )
    row_n = tl.load(n + batch * n_stride)
    # Rows that only fill up the tile keep nothing, because no score reaches their threshold.
    smallest_kept = next_above(lookup(theta, head, row_n, theta_stride, theta_len, in_group))
    smallest_kept = tl.where(in_group, smallest_kept, float("inf"))
    start, stop, _length = keys_of_split(span, batch, kv_len, splits, HAS_MASK, BLOCK_N)
    k += batch * k_batch + at_head * k_head
    v += batch * v_batch + at_head * v_head
    codes += batch * codes_batch + at_head * codes_head
    steps += batch * steps_batch + at_head * steps_head
    slacks += batch * steps_batch + at_head * steps_head
    listed += group * kv_len + start

    # First the int8 copy. All other keys score below the threshold, which stands for their maximum here.
    running_max = tl.minimum(tl.maximum(smallest_kept, LOWEST), -LOWEST)
    high, low, q_step, slack_factor, step_factor = int8_query(q_tile, in_dim, scale, HEAD_DIM)
    mean = tl.load(k_mean + group * HEAD_DIM + d, mask=in_dim, other=0.0)
    q_mean = tl.sum(q_tile.to(tl.float32) * mean[None, :], axis=1) * scale
    q_step = q_step * scale
    skipped_sum = tl.zeros((BLOCK_G, BLOCK_F), tl.float32)
    f = tl.arange(0, BLOCK_F)
    in_codes = f[None, :] * HEAD_DIM + d[:, None]
    num_listed = 0
    for at in range(start, stop, BLOCK_F):
        inside = at + f < stop
        code_tile = tl.load(
            codes + tl.cast(at, tl.int64) * HEAD_DIM + in_codes,
            mask=both(inside[None, :], in_dim[:, None], HEAD_DIM == BLOCK_D),
            other=0,
        )
        visible = inside
        if HAS_MASK:
            visible = tl.load(mask + batch * mask_stride + at + f, mask=inside, other=0) != 0
        step = tl.load(steps + at + f, mask=inside, other=0.0)
        slack = tl.load(slacks + at + f, mask=inside, other=0.0)
        products = tl.dot(high, code_tile, out_dtype=tl.int32).to(tl.float32)
        products += tl.dot(low, code_tile, out_dtype=tl.int32).to(tl.float32) * (1 / 254)
        estimated = products * (q_step[:, None] * step[None, :]) + q_mean[:, None]
        error = slack_factor[:, None] * slack[None, :] + step_factor[:, None] * step[None, :]
        upper_bound = estimated + error
        candidate = visible & (tl.max(upper_bound - smallest_kept[:, None], axis=0) >= 0)
        skipped = visible & ~candidate
        skipped_sum += tl.where(skipped[None, :], exp(estimated - running_max[:, None]), 0.0)
        place = tl.cumsum(candidate.to(tl.int32), axis=0)
        tl.store(listed + num_listed + place - 1, at + f, mask=candidate)
        num_listed += tl.max(place, axis=0)
    tl.debug_barrier()  # each thread reads entries of the list that other threads wrote

    # Then the candidates.
    running_sum = tl.where(i[None, :] == 0, tl.sum(skipped_sum, axis=1)[:, None], 0.0)
    passed = tl.zeros((BLOCK_G,), tl.int1)
    kept_sum = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    count = tl.zeros((BLOCK_G, BLOCK_N), tl.int32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for at in range(0, num_listed, BLOCK_N):
        in_list = at + i < num_listed
        key = tl.load(listed + at + i, mask=in_list, other=0)
        k_tile = tl.load(
            k + key[None, :].to(tl.int64) * k_row + d[:, None],
            mask=both(in_list[None, :], in_dim[:, None], HEAD_DIM == BLOCK_D),
            other=0.0,
        )
        s = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
        s = tl.where(in_list[None, :], s, float("-inf"))
        if STORE_SCORES:
            at_score = scores + row[:, None] * kv_len + key[None, :]
            tl.store(at_score, s, mask=in_group[:, None] & in_list[None, :])
        running_max, running_sum, kept_sum, count, passed, kept_exps, _, rescale = softmax_step(
            s, smallest_kept, running_max, running_sum, kept_sum, count, passed, True, COUNT, True
        )
        v_needed = tl.max(kept_exps, axis=0) > 0
        v_tile = tl.load(
            v + key[:, None].to(tl.int64) * v_row + d[None, :],
            mask=both(v_needed[:, None], in_dim[None, :], HEAD_DIM == BLOCK_D),
            other=0.0,
        )
        acc = acc * rescale[:, None] + tl.dot(kept_exps.to(v_tile.dtype), v_tile, input_precision="ieee")

    part = row * splits + split
    tl.store(part_max + part, running_max, mask=in_group)
    tl.store(part_sum + part, tl.sum(running_sum, axis=1), mask=in_group)
    store_kept(
        part_kept_sum, part_count, part_acc, part, in_group, kept_sum, count, passed, acc,
        HEAD_DIM, BLOCK_D, COUNT,
    )  # fmt: skip
