"""Decode from two tiers of K (two_tier.py) on the GPU: an int8 copy says for which keys K has to be read.

`filtered_kernel` stands in for `split_kernel` of triton_decode.py. Each program first goes over the int8 copy
of its keys and lists those that some head of the group may keep, then over that list, reading K and, where a
head does keep the key, V. Shapes as in toptheta/attention/reference.py; S splits.
"""

import triton
import triton.language as tl

from toptheta.kernels.triton.online import (
    LOWEST,
    both,
    exp,
    fold,
    keys_of_split,
    least_above,
    lookup,
    store_taken,
)

VARYING = ["kv_len", "theta_len", "splits"]  # one build serves every length


@triton.jit
def int8_query(q_tile, in_dim, scale, HEAD_DIM: tl.constexpr):
    """q `[G, D]` as step * (high + low / 254), for products with the codes of K in whole numbers.

    Returns high, low `[G, D]` int8, step `[G]`, and by how much a score may be moved by a slack of 1 and by
    a step of K of 1, both `[G]`: see `two_tier.estimates`.
    """
    q_tile = q_tile.to(tl.float32)
    step = tl.max(tl.abs(q_tile), axis=1) / 127
    step = tl.where(step > 1.1754943508222875e-38, step, 1.0)
    codes = q_tile / step[:, None]
    high = tl.floor(codes + 0.5)
    low = tl.floor((codes - high) * 254 + 0.5)
    rest = tl.where(in_dim[None, :], q_tile - step[:, None] * (high + low / 254), 0.0)
    norm = tl.sqrt(tl.sum(q_tile * q_tile, axis=1)) + 2e-18  # squares below 1e-38 are lost
    rest_norm = tl.sqrt(tl.sum(rest * rest, axis=1)) + 2e-18
    largest = tl.sqrt(HEAD_DIM * 16129.0)  # norm that the codes of a key can have
    return high.to(tl.int8), low.to(tl.int8), step, norm * tl.abs(scale), rest_norm * largest * tl.abs(scale)


@triton.jit(do_not_specialize=VARYING)
def filtered_kernel(
    q, k, v, mask, span, n, theta, listed, scores, part_peak, part_total, part_taken, part_count, part_acc,
    scale, kv_len, splits, num_kv_heads, theta_len, theta_stride, n_stride, mask_stride,
    q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row,
    codes, steps, slacks, k_mean, codes_batch, codes_head, steps_batch, steps_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, HAS_MASK: tl.constexpr, COUNT: tl.constexpr,
    STORE_SCORES: tl.constexpr,
):  # fmt: skip
    """As `split_kernel`, reading K only where its int8 copy leaves it open whether a head takes the key.

    listed: scratch `[B, H_kv, N]` int32. STORE_SCORES leaves out the scores of keys that are not in question.
    A row that passes its threshold nowhere takes its largest score, which cannot be found so: what is written
    for such a row is void, but for its negative counts, and `split_kernel` with RESCUE computes it.
    """
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    g, d, i = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + g
    in_group, in_dim = g < GROUP, d < HEAD_DIM
    row = batch * (num_kv_heads * GROUP) + head
    group = batch * num_kv_heads + kv_head
    q_tile = tl.load(
        q + batch * q_batch + head[:, None] * q_head + d[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )
    row_n = tl.load(n + batch * n_stride)
    # The rows that fill up the tile take nothing: their threshold, and so their peak, is out of reach.
    least = least_above(lookup(theta, head, row_n, theta_stride, theta_len, in_group))
    least = tl.where(in_group, least, float("inf"))
    start, stop = keys_of_split(span, batch, kv_len, splits, HAS_MASK, BLOCK_N)
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    codes += batch * codes_batch + kv_head * codes_head
    steps += batch * steps_batch + kv_head * steps_head
    slacks += batch * steps_batch + kv_head * steps_head
    listed += group * kv_len + start

    # First the int8 copy. Keys that are not open are below their thresholds, so those are their peak here.
    peak = tl.minimum(tl.maximum(least, LOWEST), -LOWEST)
    high, low, q_step, reach, rest_reach = int8_query(q_tile, in_dim, scale, HEAD_DIM)
    mean = tl.load(k_mean + group * HEAD_DIM + d, mask=in_dim, other=0.0)
    q_mean = tl.sum(q_tile.to(tl.float32) * mean[None, :], axis=1) * scale
    q_step = q_step * scale
    dropped = tl.zeros((BLOCK_G, BLOCK_F), tl.float32)
    f = tl.arange(0, BLOCK_F)
    in_codes = f[None, :] * HEAD_DIM + d[:, None]
    found = 0
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
        about = products * (q_step[:, None] * step[None, :]) + q_mean[:, None]
        bound = about + (reach[:, None] * slack[None, :] + rest_reach[:, None] * step[None, :])
        open_ = visible & (tl.max(bound - least[:, None], axis=0) >= 0)
        dropped += tl.where((visible & ~open_)[None, :], exp(about - peak[:, None]), 0.0)
        place = tl.cumsum(open_.to(tl.int32), axis=0)
        tl.store(listed + found + place - 1, at + f, mask=open_)
        found += tl.max(place, axis=0)
    tl.debug_barrier()  # the list was written by other threads

    # Then the keys on the list.
    total = tl.where(i[None, :] == 0, tl.sum(dropped, axis=1)[:, None], 0.0)
    passed = tl.zeros((BLOCK_G,), tl.int1)
    taken = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    count = tl.zeros((BLOCK_G, BLOCK_N), tl.int32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for at in range(0, found, BLOCK_N):
        here = at + i < found
        key = tl.load(listed + at + i, mask=here, other=0)
        k_tile = tl.load(
            k + key[None, :].to(tl.int64) * k_row + d[:, None],
            mask=both(here[None, :], in_dim[:, None], HEAD_DIM == BLOCK_D),
            other=0.0,
        )
        s = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
        s = tl.where(here[None, :], s, float("-inf"))
        if STORE_SCORES:
            at_score = scores + row[:, None] * kv_len + key[None, :]
            tl.store(at_score, s, mask=in_group[:, None] & here[None, :])
        peak, total, taken, count, passed, kept, _, factor = fold(
            s, least, peak, total, taken, count, passed, True, COUNT, True
        )
        some = tl.max(kept, axis=0) > 0
        v_tile = tl.load(
            v + key[:, None].to(tl.int64) * v_row + d[None, :],
            mask=both(some[:, None], in_dim[None, :], HEAD_DIM == BLOCK_D),
            other=0.0,
        )
        acc = acc * factor[:, None] + tl.dot(kept.to(v_tile.dtype), v_tile, input_precision="ieee")

    part = row * splits + split
    tl.store(part_peak + part, peak, mask=in_group)
    tl.store(part_total + part, tl.sum(total, axis=1), mask=in_group)
    store_taken(
        part_taken, part_count, part_acc, part, in_group, taken, count, passed, acc, HEAD_DIM, BLOCK_D, COUNT
    )
