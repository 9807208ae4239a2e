"""Decode with a copy of K in few bits (methods/key_copy.py) on the GPU.

In place of `split_kernel`, `estimate_kernel` scores all keys by their codes, and `candidates_kernel`, which
knows the whole row then, lists the keys that some head of the group may keep and reads K for those. They
leave what `split_kernel` leaves without V: scores, here -inf of keys that are not read, and the softmax's
maxima and sums; `gather_kernel` goes on. Shapes as in decode.py.
"""

import triton
import triton.language as tl

from toptheta.kernels.triton.online import (
    LOWEST,
    both,
    compared,
    exp,
    keys_of_split,
    lookup,
    next_above,
    smallest_kept_weighed,
    whole_row,
)

VARYING = ["kv_len", "theta_len", "splits"]  # one build serves every length


@triton.jit(do_not_specialize=VARYING)
def estimate_kernel(
    q, codes, key_steps, k_mean, mask, span, scores, part_max, part_sum,
    scale, kv_len, splits, num_kv_heads, mask_stride, q_batch, q_head,
    codes_batch, codes_head, steps_batch, steps_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Scores by the copy of one split's keys, their maximum and the sum of exp(score - maximum).

    codes, key_steps, k_mean: see `KeyCodes`. scores: `[B, H, N]`; part_*: `[B, H, S]`.
    """
    WIDTH: tl.constexpr = HEAD_DIM * BITS // 8  # bytes of a key
    BLOCK_W: tl.constexpr = BLOCK_D * BITS // 8
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    g, w, i = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + g
    at_head = tl.cast(kv_head, tl.int64)  # offsets of heads can exceed 32 bits
    in_group, in_width = g < GROUP, w < WIDTH
    row = batch * (num_kv_heads * GROUP) + head
    start, stop, _length = keys_of_split(span, batch, kv_len, splits, HAS_MASK, BLOCK_N)
    in_q = in_group[:, None] & in_width[None, :]
    q += batch * q_batch + head[:, None] * q_head + w[None, :]
    k_mean += (batch * num_kv_heads + kv_head) * HEAD_DIM + w
    low = tl.load(q, mask=in_q, other=0.0)
    of_mean = tl.sum(low.to(tl.float32) * tl.load(k_mean, mask=in_width, other=0.0)[None, :], axis=1)
    if BITS == 4:
        high = tl.load(q + WIDTH, mask=in_q, other=0.0)
        mean = tl.load(k_mean + WIDTH, mask=in_width, other=0.0)
        of_mean += tl.sum(high.to(tl.float32) * mean[None, :], axis=1)
    codes += batch * codes_batch + at_head * codes_head
    key_steps += batch * steps_batch + at_head * steps_head
    in_codes = i[None, :] * WIDTH + w[:, None]
    running_max = tl.where(in_group, LOWEST, -LOWEST)
    running_sum = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    for at in range(start, stop, BLOCK_N):
        inside = at + i < stop
        visible = inside
        if HAS_MASK:
            visible = tl.load(mask + batch * mask_stride + at + i, mask=inside, other=0) != 0
        code = tl.load(
            codes + tl.cast(at, tl.int64) * WIDTH + in_codes,
            mask=both(inside[None, :], in_width[:, None], WIDTH == BLOCK_W),
            other=0,
        )
        if BITS == 4:
            s = tl.dot(low, ((code << 4) >> 4).to(low.dtype), input_precision="ieee")
            s += tl.dot(high, (code >> 4).to(low.dtype), input_precision="ieee")
        else:
            s = tl.dot(low, code.to(low.dtype), input_precision="ieee")
        step = tl.load(key_steps + at + i, mask=inside, other=0.0).to(tl.float32)
        s = (s * step[None, :] + of_mean[:, None]) * scale
        s = tl.where(visible[None, :], s, float("-inf"))
        at_score = row[:, None] * kv_len + (at + i)[None, :]
        tl.store(scores + at_score, s, mask=in_group[:, None] & inside[None, :])
        new_max = tl.maximum(running_max, tl.max(s, axis=1))
        running_sum = running_sum * exp(running_max - new_max)[:, None] + exp(s - new_max[:, None])
        running_max = new_max
    part = row * splits + tl.program_id(1)
    tl.store(part_max + part, running_max, mask=in_group)
    tl.store(part_sum + part, tl.sum(running_sum, axis=1), mask=in_group)


@triton.jit(do_not_specialize=VARYING)
def candidates_kernel(
    q, k, always, span, n, theta, factor, listed, scores, copy_max, copy_sum, part_max, part_sum, part_best,
    scale, kv_len, splits, num_kv_heads, theta_len, theta_stride, n_stride,
    q_batch, q_head, k_batch, k_head, k_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, HAS_MASK: tl.constexpr,
    ON_SCORES: tl.constexpr, WEIGHED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """From the scores by the copy (copy_max and copy_sum are their part_max and part_sum): the scores
    themselves of the keys that are read, and -inf of the others.

    Read are keys whose estimated weight (WEIGHED: times factor `[B, H, N]`; ON_SCORES: estimated score) is
    above theta for some head of the group, and the first and last ones: those of `always` `[B, N]` bool with
    HAS_MASK, else FIRST and LAST of all. part_max and part_sum are of all keys, by their estimates where they
    are not read; part_best is the largest score of those that are (WEIGHED: + log(factor)). listed: scratch
    `[B, H_kv, N]` int32.
    """
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    f, i, j = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    head = kv_head * GROUP + g
    at_head = tl.cast(kv_head, tl.int64)  # offsets of heads can exceed 32 bits
    in_group, in_dim = g < GROUP, d < HEAD_DIM
    row = batch * (num_kv_heads * GROUP) + head
    parts, in_parts = row[:, None] * splits + j[None, :], in_group[:, None] & (j < splits)[None, :]
    row_max, row_sum = whole_row(copy_max, copy_sum, parts, in_parts)
    row_n = tl.load(n + batch * n_stride)
    row_theta = lookup(theta, head, row_n, theta_stride, theta_len, in_group)
    if ON_SCORES:
        cutoff = next_above(row_theta)
    elif WEIGHED:
        cutoff = smallest_kept_weighed(row_theta, row_max, row_sum, float("inf"))
    else:
        cutoff = next_above(row_theta * row_sum)
    start, stop, _length = keys_of_split(span, batch, kv_len, splits, HAS_MASK, BLOCK_N)
    listed += (batch * num_kv_heads + kv_head) * kv_len + start

    running_max = tl.where(in_group, LOWEST, -LOWEST)
    unread_sum = tl.zeros((BLOCK_G, BLOCK_F), tl.float32)
    num_listed = 0
    for at in range(start, stop, BLOCK_F):
        key = at + f
        inside = key < stop
        here = in_group[:, None] & inside[None, :]
        element = row[:, None] * kv_len + key[None, :]
        s = tl.load(scores + element, mask=here, other=float("-inf"))
        estimates = compared(s, element, here, factor, row_max, ON_SCORES, WEIGHED)
        if HAS_MASK:
            read = tl.load(always + batch * kv_len + key, mask=inside, other=0) != 0
        else:
            read = inside & ((key < FIRST) | (key >= kv_len - LAST))
        wanted = (s > float("-inf")) & (estimates >= cutoff[:, None])
        read = read | (tl.max(wanted.to(tl.int32), axis=0) > 0)
        tl.store(scores + element, tl.full(s.shape, float("-inf"), tl.float32), mask=here & ~read[None, :])
        s = tl.where(read[None, :], float("-inf"), s)
        new_max = tl.maximum(running_max, tl.max(s, axis=1))
        unread_sum = unread_sum * exp(running_max - new_max)[:, None] + exp(s - new_max[:, None])
        running_max = new_max
        place = tl.cumsum(read.to(tl.int32), axis=0)
        tl.store(listed + num_listed + place - 1, key, mask=read)
        num_listed += tl.max(place, axis=0)
    tl.debug_barrier()  # each thread reads entries of the list that other threads wrote

    q_tile = tl.load(
        q + batch * q_batch + head[:, None] * q_head + d[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )
    k += batch * k_batch + at_head * k_head
    running_sum = tl.where(i[None, :] == 0, tl.sum(unread_sum, axis=1)[:, None], 0.0)
    best = tl.full((BLOCK_G, BLOCK_N), float("-inf"), tl.float32)
    for at in range(0, num_listed, BLOCK_N):
        in_list = at + i < num_listed
        key = tl.load(listed + at + i, mask=in_list, other=0)
        here = in_group[:, None] & in_list[None, :]
        element = row[:, None] * kv_len + key[None, :]
        k_tile = tl.load(
            k + key[None, :].to(tl.int64) * k_row + d[:, None],
            mask=both(in_list[None, :], in_dim[:, None], HEAD_DIM == BLOCK_D),
            other=0.0,
        )
        s = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
        s = tl.where(in_list[None, :], s, float("-inf"))
        tl.store(scores + element, s, mask=here)
        new_max = tl.maximum(running_max, tl.max(s, axis=1))
        running_sum = running_sum * exp(running_max - new_max)[:, None] + exp(s - new_max[:, None])
        running_max = new_max
        if WEIGHED:
            s += tl.log(tl.load(factor + element, mask=here, other=0.0))
        best = tl.maximum(best, s)
    part = row * splits + tl.program_id(1)
    tl.store(part_max + part, running_max, mask=in_group)
    tl.store(part_sum + part, tl.sum(running_sum, axis=1), mask=in_group)
    tl.store(part_best + part, tl.max(best, axis=1), mask=in_group)
