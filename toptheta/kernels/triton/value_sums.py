"""Sums of V over blocks of keys, from which prefill makes the mean of V over each row's visible keys.

A running sum over all keys would be one long chain of additions for each channel; here that chain has one
link for each BLOCK keys. Shapes as in toptheta/attention/reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toptheta.kernels.triton.online import both

BLOCK = 128


@triton.jit(do_not_specialize=["kv_len"])
def block_sums_kernel(
    v, key_real, first, sums, kv_len, q_len, num_kv_heads, key_real_batch, v_batch, v_head, v_row,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, HAS_KEY_REAL: tl.constexpr,
):  # fmt: skip
    """sums `[B, H_kv, blocks + 1, D]`: at 1 + i, the sum over the keys of block i that are not padding; 0 of
    blocks that no row sees, which are not read."""
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    key = tl.program_id(1) * BLOCK + i
    seen = key < tl.minimum(kv_len, tl.load(first) + q_len)
    if HAS_KEY_REAL:
        seen = seen & (tl.load(key_real + batch * key_real_batch + key, mask=seen, other=0) != 0)
    v_tile = tl.load(
        v + batch * v_batch + kv_head * v_head + key[:, None].to(tl.int64) * v_row + d[None, :],
        mask=both(seen[:, None], (d < HEAD_DIM)[None, :], HEAD_DIM == BLOCK_D),
        other=0.0,
    )
    place = (tl.program_id(0).to(tl.int64) * (tl.num_programs(1) + 1) + tl.program_id(1) + 1) * HEAD_DIM
    tl.store(sums + place + d, tl.sum(v_tile.to(tl.float32), axis=0), mask=d < HEAD_DIM)


def sums_before(v: Tensor, key_real: Tensor | None, first: Tensor, q_len: int) -> Tensor:
    """`[B, H_kv, blocks + 1, D]` float32: at i, the sum of V over the keys before i * BLOCK that are not
    padding, as far as the rows see them.

    v: `[B, H_kv, N, D]`, its last dimension contiguous; key_real: `[B, N]` bool, contiguous, or None; first:
    `[1]` int64, the position of the first of the `q_len` rows.
    """
    batch, num_kv_heads, kv_len, head_dim = v.shape
    blocks = triton.cdiv(kv_len, BLOCK)
    sums = torch.zeros(batch, num_kv_heads, blocks + 1, head_dim, device=v.device, dtype=torch.float32)
    block_sums_kernel[(batch * num_kv_heads, blocks)](
        v, first if key_real is None else key_real, first, sums, kv_len, q_len, num_kv_heads,
        0 if key_real is None or key_real.shape[0] == 1 else key_real.stride(0), *v.stride()[:3],
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK=BLOCK,
        HAS_KEY_REAL=key_real is not None, num_warps=4,
    )  # fmt: skip
    return sums.cumsum(dim=2, dtype=torch.float64).float()
