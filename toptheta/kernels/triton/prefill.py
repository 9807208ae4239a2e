"""Threshold attention of many rows on the GPU: flash attention that leaves out keys below the thresholds.

One program per (block of rows, head, sequence) goes over the keys that its rows can see. Memory is O(N),
because no score is written. Where no row of a tile keeps any key, V is not read and its product not computed.
Thresholds on weights need each row's logsumexp first: a first sweep over K finds it. Shapes as in
toptheta/attention/reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toptheta.attention.call import Counts
from toptheta.kernels.triton.chips import Chip, chip_of
from toptheta.kernels.triton.decode import row_stride, sdc_code
from toptheta.kernels.triton.online import (
    LOWEST,
    both,
    exp,
    final_denominator,
    lookup,
    next_above,
    smallest_kept_exp,
    smallest_kept_weighed,
    softmax_step,
)
from toptheta.kernels.triton.value_sums import BLOCK as SUM_BLOCK
from toptheta.kernels.triton.value_sums import sums_before
from toptheta.methods.base import KernelSpec

# Rows and keys of a tile, warps and pipeline stages, for 16-bit types and head_dim up to 128.
TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
SKIP = True  # `prefill_kernel`'s SKIP in sparse attention; dense attention never skips
VARYING = ["q_len", "kv_len", "theta_len", "table_len"]  # one build serves every length


@triton.jit
def tile_scores(
    q_tile, k, at, stop, query, batch, mask, key_real,
    scale, q_len, first, k_row, mask_batch, mask_row, real_batch,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_KEY_REAL: tl.constexpr, ALL_VISIBLE: tl.constexpr,
):  # fmt: skip
    """Scores `[M, BLOCK_N]` of the tile of keys at `at`, -inf where a key is not visible."""
    i, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key = at + i
    inside = key < stop
    k_tile = tl.load(
        k + tl.cast(at, tl.int64) * k_row + (i[None, :] * k_row + d[:, None]),
        mask=both((d < HEAD_DIM)[:, None], inside[None, :], ALL_VISIBLE),
        other=0.0,
    )
    s = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
    if not ALL_VISIBLE:
        visible = (query < q_len)[:, None] & inside[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= first + query[:, None])
            if HAS_KEY_REAL:
                real = tl.load(key_real + batch * real_batch + key, mask=inside, other=0) != 0
                visible = visible & real[None, :]
        else:
            at_mask = mask + batch * mask_batch + query[:, None].to(tl.int64) * mask_row + key[None, :]
            visible = visible & (tl.load(at_mask, mask=visible, other=0) != 0)
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
def tile_of_v(
    v, at, stop, v_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
):  # fmt: skip
    i, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    return tl.load(
        v + tl.cast(at, tl.int64) * v_row + (i[:, None] * v_row + d[None, :]),
        mask=both((d < HEAD_DIM)[None, :], (at + i < stop)[:, None], ALL_VISIBLE),
        other=0.0,
    )


@triton.jit
def means_of_rows(
    v, sums, key_real, query, row_n, first, block, group, batch, kv_len, v_row, key_real_batch,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUM_BLOCK: tl.constexpr, HAS_KEY_REAL: tl.constexpr,
):  # fmt: skip
    """Mean of V over the visible keys of a block of causal rows, `[M, D]`: what lies before the block of keys
    that holds the first row is summed already (sums), the rest is a product with ones."""
    d = tl.arange(0, BLOCK_D)
    before = (first + block * BLOCK_M) // SUM_BLOCK
    place = (group * (tl.cdiv(kv_len, SUM_BLOCK) + 1) + before) * HEAD_DIM
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total += tl.load(sums + place + d, mask=d < HEAD_DIM, other=0.0)[None, :]
    stop = tl.minimum(kv_len, first + (block + 1) * BLOCK_M)
    for at in range(before * SUM_BLOCK, stop, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        seen = (key < stop)[None, :] & (key[None, :] <= first + query[:, None])
        if HAS_KEY_REAL:
            real = tl.load(key_real + batch * key_real_batch + key, mask=key < stop, other=0) != 0
            seen = seen & real[None, :]
        v_tile = tile_of_v(v, at, stop, v_row, HEAD_DIM, BLOCK_D, BLOCK_N, False)
        total += tl.dot(seen.to(v_tile.dtype), v_tile, input_precision="ieee")
    return total / tl.maximum(row_n, 1).to(tl.float32)[:, None]


@triton.jit
def weighed_scores(s, factor, at, stop, BLOCK_N: tl.constexpr):
    """score + log(factor) of a tile, `[M, N]`; factor: of this head, `[N]`."""
    key = at + tl.arange(0, BLOCK_N)
    return s + tl.log(tl.load(factor + key, mask=key < stop, other=0.0))[None, :]


@triton.jit
def add_counts(keep, vrow, attn, at, BLOCK_N: tl.constexpr, FLAT: tl.constexpr):
    """Add what a tile keeps, `[M, N]` bool, to vrow `[N]` and to attn, one number."""
    per_key = tl.sum(keep.to(tl.int32), axis=0)
    tl.atomic_add(vrow + at + tl.arange(0, BLOCK_N), per_key, mask=per_key > 0)
    total = tl.sum(keep.to(tl.int32)) if FLAT else tl.sum(per_key, axis=0)
    tl.atomic_add(attn, total.to(tl.int64))


@triton.jit(do_not_specialize=VARYING)
def prefill_kernel(
    q, k, v, mask, key_real, real_rows, n, theta, table, v_mean, factor, first_at, out, attn, vrow,
    scale, sdc_scale, k_keep, q_len, kv_len, num_kv_heads, theta_len, table_len,
    theta_stride, table_stride, n_stride, mask_batch, mask_row, key_real_batch, real_rows_batch,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_KEY_REAL: tl.constexpr, HAS_REAL_ROWS: tl.constexpr,
    POST: tl.constexpr, SDC: tl.constexpr, VMC: tl.constexpr, SUM_BLOCK: tl.constexpr, COUNT: tl.constexpr,
    SKIP: tl.constexpr, FLAT: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """out `[B, Q, H, D]`, and what is kept added to attn `[B, H]` and vrow `[B, H_kv, N]`.

    first_at: `[1]` int64, the position of the first row, if CAUSAL. VMC: with CAUSAL v_mean holds
    `sums_before`, for blocks of SUM_BLOCK keys, else the mean of each row `[B, H_kv, Q, D]`.

    SKIP: V of a tile where no row keeps any key is not read. Without SKIP it is read and multiplied with
    zeros, but Triton can then prefetch V, which it cannot do behind a condition. FLAT: one number from a tile
    is reduced from all its elements, not from the rows' own numbers: where products go through tensor memory,
    Triton (3.7.1) cannot reduce a vector that was itself reduced from a product.
    """
    num_heads = num_kv_heads * GROUP
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // GROUP
    at_head, at_kv_head = tl.cast(head, tl.int64), tl.cast(kv_head, tl.int64)  # offsets can exceed 32 bits
    # The last rows see the most keys and take longest, so their blocks start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    query, d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_rows, in_dim = query < q_len, d < HEAD_DIM
    in_tile = in_rows[:, None] & in_dim[None, :]
    q_tile = tl.load(
        q + batch * q_batch + at_head * q_head + query[:, None].to(tl.int64) * q_row + d[None, :],
        mask=in_tile,
        other=0.0,
    )
    row_n = tl.load(n + batch * n_stride + query, mask=in_rows, other=0)
    row_theta = lookup(theta, head, row_n, theta_stride, theta_len, in_rows)
    smallest_kept = next_above(row_theta)
    k += batch * k_batch + at_kv_head * k_head
    v += batch * v_batch + at_kv_head * v_head
    stop, full, first = kv_len, 0, 0
    if CAUSAL:
        first = tl.load(first_at).to(tl.int32)
        stop = tl.minimum(kv_len, first + (block + 1) * BLOCK_M)
        if not HAS_KEY_REAL:  # every row of the block sees every key of the tiles before this one
            full = tl.minimum(kv_len, first + block * BLOCK_M + 1) // BLOCK_N * BLOCK_N
    counted = in_rows
    if HAS_REAL_ROWS:
        real_row = tl.load(real_rows + batch * real_rows_batch + query, mask=in_rows, other=0)
        counted = counted & (real_row != 0)
    attn += batch * num_heads + head
    vrow += (batch * num_kv_heads + kv_head) * kv_len

    # Rows beyond the last start with a maximum above every score, so that they keep nothing.
    running_max = tl.where(in_rows, LOWEST, -LOWEST)
    passed = tl.zeros((BLOCK_M,), tl.int1)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    factor += (batch * num_heads + head) * kv_len
    kept_sum = tl.zeros((BLOCK_M,), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(2):  # 0: tiles that are visible as a whole
        for at in range(0 if phase == 0 else full, full if phase == 0 else stop, BLOCK_N):
            s = tile_scores(
                q_tile, k, at, stop, query, batch, mask, key_real,
                scale, q_len, first, k_row, mask_batch, mask_row, key_real_batch,
                HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, HAS_KEY_REAL, phase == 0,
            )  # fmt: skip
            if POST:
                new_max = tl.maximum(running_max, tl.max(s, axis=1))
                rescale = exp(running_max - new_max)
                running_sum = running_sum * rescale + tl.sum(exp(s - new_max[:, None]), axis=1)
                running_max = new_max
                if WEIGHED:
                    best = tl.maximum(best, tl.max(weighed_scores(s, factor, at, stop, BLOCK_N), axis=1))
            else:
                running_max, running_sum, kept_sum, count, passed, kept_exps, keeps, rescale = softmax_step(
                    s, smallest_kept, running_max, running_sum, kept_sum, count, passed,
                    SDC == 1, SDC == 2, False,
                )  # fmt: skip
                # Where no row keeps a key of the tile, no running_max changes either: every rescale is 1.
                some = tl.max((kept_exps > 0).to(tl.int32)) if FLAT else tl.max(keeps.to(tl.int32), axis=0)
                if (not SKIP) or some > 0:
                    v_tile = tile_of_v(v, at, stop, v_row, HEAD_DIM, BLOCK_D, BLOCK_N, phase == 0)
                    acc = acc * rescale[:, None]
                    acc += tl.dot(kept_exps.to(v_tile.dtype), v_tile, input_precision="ieee")
                if COUNT:
                    add_counts(
                        (s >= smallest_kept[:, None]) & counted[:, None], vrow, attn, at, BLOCK_N, FLAT
                    )

    # The second sweep compares weights with their thresholds or, for thresholds on scores, counts the keys of
    # rows without a score above the threshold: which rows those are is known only now.
    if COUNT and not POST:
        counted = counted & (passed == 0) & (row_n > 0)
        # Where there are none the range is empty: a condition around products does not compile for Blackwell.
        any_counted = tl.max(counted.to(tl.int32), axis=0)
        full, stop = full * any_counted, stop * any_counted
    if POST or COUNT:
        if WEIGHED:
            smallest_kept = smallest_kept_weighed(row_theta, running_max, running_sum, best)
        else:
            smallest_kept = smallest_kept_exp(row_theta, running_sum) if POST else running_max
        for phase in tl.static_range(2):
            for at in range(0 if phase == 0 else full, full if phase == 0 else stop, BLOCK_N):
                s = tile_scores(
                    q_tile, k, at, stop, query, batch, mask, key_real,
                    scale, q_len, first, k_row, mask_batch, mask_row, key_real_batch,
                    HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, HAS_KEY_REAL, phase == 0,
                )  # fmt: skip
                if POST:
                    exps = exp(s - running_max[:, None])
                    compared = weighed_scores(s, factor, at, stop, BLOCK_N) if WEIGHED else exps
                    keep = (s > float("-inf")) & (compared >= smallest_kept[:, None])
                    exps = tl.where(keep, exps, 0.0)
                    kept_sum += tl.sum(exps, axis=1)
                    some = tl.max(keep.to(tl.int32)) if FLAT else tl.max(tl.max(exps, axis=1), axis=0)
                    if (not SKIP) or some > 0:
                        v_tile = tile_of_v(v, at, stop, v_row, HEAD_DIM, BLOCK_D, BLOCK_N, phase == 0)
                        acc += tl.dot(exps.to(v_tile.dtype), v_tile, input_precision="ieee")
                else:
                    keep = s >= smallest_kept[:, None]
                if COUNT:
                    add_counts(keep & counted[:, None], vrow, attn, at, BLOCK_N, FLAT)

    row_table = tl.zeros((BLOCK_M,), tl.float32)
    if SDC == 3:
        row_table = lookup(table, head, row_n, table_stride, table_len, in_rows)
    denominator = final_denominator(
        running_sum, kept_sum, count, running_max, row_n, row_theta, row_table, sdc_scale, SDC
    )
    result = acc / denominator[:, None]
    if VMC:
        missing_weight = tl.where(row_n > k_keep, 1.0 - kept_sum / denominator, 0.0)
        group = batch * num_kv_heads + kv_head
        if CAUSAL:
            means = means_of_rows(
                v, v_mean, key_real, query, row_n, first, block, group, batch, kv_len, v_row, key_real_batch,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, SUM_BLOCK, HAS_KEY_REAL,
            )  # fmt: skip
        else:
            at_mean = (group * q_len + query)[:, None] * HEAD_DIM + d[None, :]
            means = tl.load(v_mean + at_mean, mask=in_tile, other=0.0)
        result += missing_weight[:, None] * means
    at_out = ((batch * q_len + query)[:, None] * num_heads + head) * HEAD_DIM + d[None, :]
    tl.store(out + at_out, result.to(out.dtype.element_ty), mask=in_tile)


def options(chip: Chip, dtype: torch.dtype, block_d: int, skip: bool) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages. skip: `prefill_kernel`'s SKIP. TILE, which may be tuned on
    builds with SKIP, gets fewer stages, then fewer keys, until it fits in shared memory."""
    if dtype == torch.float32:  # products without tensor cores
        tile = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
        rows = 2 * tile["BLOCK_N"] + (0 if chip.backend == "hip" else tile["BLOCK_M"])  # K, V, and q
        if 4 * block_d * rows + 4 * 32 * 32 + 1024 > chip.shared:
            tile["BLOCK_N"] = 16
        return tile
    if block_d > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    tile = dict(TILE)
    while tile["num_stages"] > 2 and shared_bytes(chip, tile, block_d, skip) > chip.shared:
        tile["num_stages"] -= 1
    while tile["BLOCK_N"] > 32 and shared_bytes(chip, tile, block_d, skip) > chip.shared:
        tile["BLOCK_N"] //= 2
    return tile


def shared_bytes(chip: Chip, tile: dict[str, int], block_d: int, skip: bool) -> int:
    """About how many bytes of shared memory a program of a 16-bit type takes at most, by what Triton 3.7.1
    builds: q (not on AMD chips), K for each stage of the pipeline, and V for one or, unless skip, for each;
    AMD chips have one stage less."""
    keys, stages = tile["BLOCK_N"], tile["num_stages"]
    if chip.backend == "hip":
        rows = keys * (stages if skip else 2 * stages - 1)
    else:
        rows = tile["BLOCK_M"] + keys * (stages + 1 if skip else 2 * stages)
    return 2 * block_d * rows


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: Tensor,
    first: Tensor | None,
    mask: Tensor | None,
    key_real: Tensor | None,
    real: Tensor | None,
    theta: Tensor,
    table: Tensor | None,
    v_mean: Tensor | None,
    factor: Tensor | None,
    spec: KernelSpec,
    scale: float,
    count: bool,
) -> tuple[Tensor, Counts | None]:
    """Attention of any rows (not Top-k), `[B, Q, H, D]`, and counts if `count`.

    n, real: `[B or 1, Q]`. Visible are the keys that are causal from position `first`, `[1]` int64, and
    `key_real` `[B, N]` or, if first is None, those of mask `[B, Q, N]` bool. theta, table: `[H or 1, L]`;
    v_mean, needed by VMC where first is None: `[B, H_kv, Q, D]` float32; factor: as in `decode`. The last
    dimension of every tensor is contiguous.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    out = torch.empty(batch, q_len, num_heads, head_dim, device=q.device, dtype=q.dtype)
    counts = None
    if count:
        counts = Counts(
            attn=torch.zeros(batch, num_heads, dtype=torch.int64, device=q.device),
            vrow=torch.zeros(batch, num_kv_heads, kv_len, dtype=torch.int32, device=q.device),
        )
    block_d = triton.next_power_of_2(head_dim)
    chip = chip_of(q.device)
    skip = SKIP and spec.sparse
    tile = options(chip, q.dtype, block_d, skip)
    grid = (triton.cdiv(q_len, tile["BLOCK_M"]), num_heads, batch)
    if spec.vmc and first is not None:
        v_mean = sums_before(v, key_real, first, q_len)
    # Arguments that a build does not use still need an address: that of q, n or theta.
    prefill_kernel[grid](
        q, k, v,
        q if mask is None else mask,
        q if key_real is None else key_real,
        q if real is None else real,
        n, theta,
        theta if table is None else table,
        theta if v_mean is None else v_mean,
        theta if factor is None else factor,
        n if first is None else first,
        out,
        n if counts is None else counts.attn,
        n if counts is None else counts.vrow,
        scale, spec.sdc_scale, spec.k, q_len, kv_len, num_kv_heads,
        theta.shape[1], 1 if table is None else table.shape[1],
        row_stride(theta), 0 if table is None else row_stride(table), row_stride(n),
        0 if mask is None else row_stride(mask), 0 if mask is None else mask.stride(1),
        0 if key_real is None else row_stride(key_real), 0 if real is None else row_stride(real),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, **tile,
        CAUSAL=first is not None, HAS_KEY_REAL=key_real is not None, HAS_REAL_ROWS=real is not None,
        POST=spec.sparse and spec.placement == "post-softmax", SDC=sdc_code(spec), VMC=v_mean is not None,
        SUM_BLOCK=SUM_BLOCK,
        COUNT=count, SKIP=skip, FLAT=chip.blackwell,
        WEIGHED=factor is not None,
    )  # fmt: skip
    return out, counts
