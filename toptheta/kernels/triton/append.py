"""What a decode step adds to a TopThetaCache (models/cache.py): rows of K and V, the key's int8 code, the
number of keys, and the sum of V. Two launches take the place of many small ones; the same is stored, except
that norms may be rounded otherwise. The sum is apart, for only the attention's mask says what is padding.

The row's place in the cache stays on the device. Shapes as in toptheta/attention/reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toptheta.attention.call import Int8Keys
from toptheta.kernels.int8_keys import LARGEST_CODE, TINY
from toptheta.kernels.triton.online import both


@triton.jit
def append_kernel(
    new_k, new_v, keys, values, end, finished, codes, steps, slacks, k_mean, num_kv_heads, room,
    new_k_batch, new_k_head, new_v_batch, new_v_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INT8: tl.constexpr, LARGEST: tl.constexpr,
    TINY: tl.constexpr,
):  # fmt: skip
    """One (sequence, KV head): new_k, new_v `[B, H_kv, 1, D]` become the row `end` of keys, values `[B, H_kv,
    room, D]`, and INT8 of the copy. The program that finishes last adds 1 to end `[]`; finished `[1]` is 0
    before and after."""
    group = tl.program_id(0).to(tl.int64)
    batch, kv_head = group // num_kv_heads, group % num_kv_heads
    d = tl.arange(0, BLOCK_D)
    in_dim = d < HEAD_DIM
    at = tl.load(end)
    tl.device_assert(at < room, "the cache is full")
    row = group * room + at
    in_room = in_dim & (at < room)  # only debug builds have the assertion
    k = tl.load(new_k + batch * new_k_batch + kv_head * new_k_head + d, mask=in_dim, other=0.0)
    v = tl.load(new_v + batch * new_v_batch + kv_head * new_v_head + d, mask=in_dim, other=0.0)
    tl.store(keys + row * HEAD_DIM + d, k, mask=in_room)
    tl.store(values + row * HEAD_DIM + d, v, mask=in_room)
    if INT8:  # see `quantized` of int8_keys.py
        k = k.to(tl.float32)
        mean = tl.load(k_mean + group * HEAD_DIM + d, mask=in_dim, other=0.0)
        centred = k - mean
        step = tl.math.div_rn(tl.max(tl.abs(centred), axis=0), LARGEST * 1.0)
        step = tl.where(step < 1.1754943508222875e-38, 1.0, step)
        code = tl.math.div_rn(centred, tl.zeros_like(centred) + step)
        code = (code + 12582912.0) - 12582912.0  # to the nearest integer, ties to even: 1.5 * 2^23
        code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
        copy = code * step
        rest = centred - copy
        rounding = HEAD_DIM * 4.76837158203125e-07  # 2^-21
        sizes = tl.sqrt(tl.sum(k * k, axis=0)) + tl.sqrt(tl.sum(copy * copy, axis=0))
        sizes += tl.sqrt(tl.sum(mean * mean, axis=0))
        slack = tl.sqrt(tl.sum(rest * rest, axis=0)) * (1 + rounding) + sizes * rounding + TINY
        tl.store(codes + row * HEAD_DIM + d, code.to(tl.int8), mask=in_room)
        tl.store(steps + row, step, mask=at < room)
        tl.store(slacks + row, slack, mask=at < room)
    if tl.atomic_add(finished, 1) == tl.num_programs(0) - 1:  # all have read `end`
        tl.store(finished, 0)
        tl.store(end, at + 1)


@triton.jit
def add_value_kernel(
    values, end, mask, total, v_sum, num_kv_heads, room, mask_batch,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """total `[B, H_kv, D]` float64 += the last row of values, unless the mask hides it; v_sum: total in
    float32."""
    group = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_dim = d < HEAD_DIM
    at = tl.load(end) - 1
    seen = both(in_dim, at < room, False)  # a step beyond a full cache has no row
    if HAS_MASK:
        at_mask = mask + group // num_kv_heads * mask_batch + at
        seen = both(seen, tl.load(at_mask, mask=at < room, other=0) != 0, False)
    v = tl.load(values + (group * room + at) * HEAD_DIM + d, mask=seen, other=0.0)
    place = group * HEAD_DIM + d
    result = tl.load(total + place, mask=in_dim, other=0.0) + v.to(tl.float64)
    tl.store(total + place, result, mask=in_dim)
    tl.store(v_sum + place, result.to(tl.float32), mask=in_dim)


def append(
    new_k: Tensor,
    new_v: Tensor,
    keys: Tensor,
    values: Tensor,
    end: Tensor,
    finished: Tensor,
    int8: Int8Keys | None,
) -> None:
    """`append_kernel` on contiguous keys and values; the last dimension of new_k and new_v is contiguous."""
    batch, num_kv_heads, room, head_dim = keys.shape
    copy = (keys, keys, keys, keys) if int8 is None else (int8.codes, int8.steps, int8.slacks, int8.mean)
    append_kernel[(batch * num_kv_heads,)](
        new_k, new_v, keys, values, end, finished, *copy, num_kv_heads, room,
        *new_k.stride()[:2], *new_v.stride()[:2],
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), INT8=int8 is not None,
        LARGEST=LARGEST_CODE, TINY=TINY, num_warps=1,
    )  # fmt: skip


def add_value(values: Tensor, end: Tensor, mask: Tensor | None, total: Tensor) -> Tensor:
    """`add_value_kernel`; returns v_sum. mask: `[B or 1, 1, 1, room]` bool, or None."""
    batch, num_kv_heads, room, head_dim = values.shape
    v_sum = torch.empty(total.shape, dtype=torch.float32, device=total.device)
    add_value_kernel[(batch * num_kv_heads,)](
        values, end, values if mask is None else mask, total, v_sum, num_kv_heads, room,
        0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), HAS_MASK=mask is not None, num_warps=1,
    )  # fmt: skip
    return v_sum
