"""Decode on the GPU: one query row against the cache, the keys split among the processors.

Three kernels. `split_kernel`, one program per (sequence, KV head, split), reads its keys and, for thresholds
on scores, the V rows that some head of the group keeps; with an int8 copy of K, `filtered_kernel` of
filtered.py does this. `gather_kernel` is the second stage where selection needs the whole row first:
thresholds on weights, and Top-k. `merge_kernel` joins the splits. The group's query heads are the rows of one
tile. Shapes as in toptheta/attention/reference.py; S is the number of splits.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from toptheta.attention.call import Int8Keys, per_row
from toptheta.kernels.triton.filtered import filtered_kernel
from toptheta.kernels.triton.online import (
    LOWEST,
    both,
    exp,
    final_denominator,
    keys_of_split,
    lookup,
    next_above,
    smallest_kept_exp,
    softmax_step,
    store_kept,
)
from toptheta.methods.base import KernelSpec, Selection
from toptheta.methods.compensation import SDC_METHODS
from toptheta.methods.top_theta import keep_above

# Keys of a tile, warps and pipeline stages; BLOCK_F: keys of a tile of the int8 copy.
TILE = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
BLOCK_F = 128
MAX_SPLITS = 64  # a power of 2
RESIDENT = 3  # programs that one processor (SM) of an H100 runs at the same time
REGISTERS = 168  # per thread: the most with which RESIDENT programs fit
VARYING = ["kv_len", "theta_len", "table_len", "splits"]  # one build serves every length


@triton.jit(do_not_specialize=VARYING)
def split_kernel(
    q, k, v, mask, span, n, theta, scores, part_max, part_sum, part_kept_sum, part_count, part_acc,
    scale, kv_len, splits, num_kv_heads, theta_len, theta_stride, n_stride, mask_stride,
    q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, HAS_MASK: tl.constexpr, WITH_V: tl.constexpr,
    COUNT: tl.constexpr, STORE_SCORES: tl.constexpr, FALLBACK: tl.constexpr,
):  # fmt: skip
    """The state of `softmax_step` over one split's keys, and the sum of exp times V over the kept ones.

    part_*: `[B, H, S]`, part_acc `[B, H, S, D]`. part_count is the number of keys that the split keeps or,
    without COUNT, 1; it is negative where they are kept provisionally. Without WITH_V only part_max and
    part_sum are written; STORE_SCORES writes scores `[B, H, N]`. FALLBACK: compute only the groups that have
    a row where `filtered_kernel` found no score above the threshold.
    """
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    g, d, i = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    head = kv_head * GROUP + g
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
    start, stop = keys_of_split(span, batch, kv_len, splits, HAS_MASK, BLOCK_N)
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    # Rows that only fill up the tile start with a maximum above every score: their exps are 0, no V is read.
    running_max = tl.where(in_group, LOWEST, -LOWEST)
    passed = tl.zeros((BLOCK_G,), tl.int1)
    running_sum = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    kept_sum = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    count = tl.zeros((BLOCK_G, BLOCK_N), tl.int32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    in_k, in_v = i[None, :] * k_row + d[:, None], i[:, None] * v_row + d[None, :]
    for at in range(start, stop, BLOCK_N):
        tile_start = tl.cast(at, tl.int64)
        inside = at + i < stop
        visible = inside
        if HAS_MASK:  # K of masked keys is read too: few lie between the first and the last visible key
            visible = tl.load(mask + batch * mask_stride + at + i, mask=inside, other=0) != 0
        k_tile = tl.load(
            k + tile_start * k_row + in_k,
            mask=both(inside[None, :], in_dim[:, None], HEAD_DIM == BLOCK_D),
            other=0.0,
        )
        s = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
        s = tl.where(visible[None, :], s, float("-inf"))
        if STORE_SCORES:
            at_score = scores + row[:, None] * kv_len + (at + i)[None, :]
            tl.store(at_score, s, mask=in_group[:, None] & inside[None, :])
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
            acc = acc * rescale[:, None] + tl.dot(kept_exps.to(v_tile.dtype), v_tile, input_precision="ieee")
        else:
            new_max = tl.maximum(running_max, tl.max(s, axis=1))
            running_sum = running_sum * exp(running_max - new_max)[:, None] + exp(s - new_max[:, None])
            running_max = new_max

    part = row * splits + split
    tl.store(part_max + part, running_max, mask=in_group)
    tl.store(part_sum + part, tl.sum(running_sum, axis=1), mask=in_group)
    if WITH_V:
        store_kept(
            part_kept_sum, part_count, part_acc, part, in_group, kept_sum, count, passed, acc,
            HEAD_DIM, BLOCK_D, COUNT,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def gather_kernel(
    v, span, n, theta, scores, keep, part_max, part_sum, part_kept_sum, part_count, part_acc,
    kv_len, splits, num_kv_heads, theta_len, theta_stride, n_stride, v_batch, v_head, v_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, HAS_MASK: tl.constexpr, KEEP_GIVEN: tl.constexpr,
    STORE_KEEP: tl.constexpr,
):  # fmt: skip
    """The second stage: the sum of exp times V over the kept keys, from the scores, part_max and part_sum.

    KEEP_GIVEN: keep `[B, H, N]` says which keys are kept. Otherwise keys are kept whose weight is above theta
    or the row's largest, and STORE_KEEP writes them to keep. part_kept_sum, part_count and part_acc are as in
    `split_kernel`, but relative to the maximum of the whole row.
    """
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(1)
    g, d, i = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    head = kv_head * GROUP + g
    in_group, in_dim = g < GROUP, d < HEAD_DIM
    row = batch * (num_kv_heads * GROUP) + head
    parts, in_parts = row[:, None] * splits + i[None, :], in_group[:, None] & (i < splits)[None, :]
    maxima = tl.load(part_max + parts, mask=in_parts, other=LOWEST)
    row_max = tl.max(maxima, axis=1)
    sums = tl.load(part_sum + parts, mask=in_parts, other=0.0)
    row_sum = tl.sum(sums * exp(maxima - row_max[:, None]), axis=1)
    row_n = tl.load(n + batch * n_stride)
    smallest_kept = smallest_kept_exp(lookup(theta, head, row_n, theta_stride, theta_len, in_group), row_sum)
    v += batch * v_batch + kv_head * v_head

    kept_sum = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    count = tl.zeros((BLOCK_G, BLOCK_N), tl.int32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    start, stop = keys_of_split(span, batch, kv_len, splits, HAS_MASK, BLOCK_N)
    for at in range(start, stop, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        here = in_group[:, None] & (key < stop)[None, :]
        element = row[:, None] * kv_len + key[None, :]
        s = tl.load(scores + element, mask=here, other=float("-inf"))
        exps = exp(s - row_max[:, None])
        if KEEP_GIVEN:
            kept = tl.load(keep + element, mask=here, other=0) != 0
        else:
            kept = (s > float("-inf")) & (exps >= smallest_kept[:, None])
            if STORE_KEEP:
                tl.store(keep + element, kept.to(tl.int8), mask=here)
        exps = tl.where(kept, exps, 0.0)
        v_needed = tl.max(exps, axis=0) > 0
        v_tile = tl.load(
            v + key[:, None].to(tl.int64) * v_row + d[None, :],
            mask=v_needed[:, None] & in_dim[None, :],
            other=0.0,
        )
        kept_sum += exps
        count += kept.to(tl.int32)
        acc += tl.dot(exps.to(v_tile.dtype), v_tile, input_precision="ieee")

    part = row * splits + split
    tl.store(part_kept_sum + part, tl.sum(kept_sum, axis=1), mask=in_group)
    tl.store(part_count + part, tl.sum(count, axis=1), mask=in_group)
    tl.store(part_acc + part[:, None] * HEAD_DIM + d[None, :], acc, mask=in_group[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    out, n, theta, table, v_sum, part_max, part_sum, part_kept_sum, part_count, part_acc,
    sdc_scale, k_keep, splits, num_heads, theta_len, table_len, theta_stride, table_stride, n_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    STEP: tl.constexpr, SDC: tl.constexpr, VMC: tl.constexpr, ONE_MAX: tl.constexpr,
):  # fmt: skip
    """Join the splits of one (sequence, head) and compensate: out `[B, H, D]`.

    ONE_MAX: part_kept_sum and part_acc are relative to the whole row's maximum already (`gather_kernel`).
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    i, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    in_parts, in_dim = i < splits, d < HEAD_DIM
    part = row * splits
    maxima = tl.load(part_max + part + i, mask=in_parts, other=LOWEST)
    counts = tl.load(part_count + part + i, mask=in_parts, other=0)
    row_max = tl.max(maxima, axis=0)
    rescale = exp(maxima - row_max)
    row_sum = tl.sum(tl.load(part_sum + part + i, mask=in_parts, other=0.0) * rescale, axis=0)
    passed = tl.max(counts, axis=0) > 0
    # Keys kept provisionally count only if no split has a score above the threshold or a larger maximum.
    use = tl.where(passed, counts > 0, (counts < 0) & (maxima == row_max))
    kept_sums = tl.load(part_kept_sum + part + i, mask=in_parts, other=0.0)
    weight = tl.where(use, 1.0 if ONE_MAX else rescale, 0.0)
    kept_sum = tl.sum(kept_sums * weight, axis=0)
    count = tl.sum(tl.where(use, tl.abs(counts), 0), axis=0)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(0, splits, STEP):
        j = at + tl.arange(0, STEP)
        in_step = j < splits
        step_counts = tl.load(part_count + part + j, mask=in_step, other=0)
        step_maxima = tl.load(part_max + part + j, mask=in_step, other=LOWEST)
        step_use = tl.where(passed, step_counts > 0, (step_counts < 0) & (step_maxima == row_max))
        step_weight = tl.where(step_use, 1.0 if ONE_MAX else exp(step_maxima - row_max), 0.0)
        accs = tl.load(
            part_acc + (part + j)[:, None] * HEAD_DIM + d[None, :],
            mask=step_use[:, None] & in_dim[None, :],
            other=0.0,
        )
        acc += tl.sum(accs * step_weight[:, None], axis=0)

    row_n = tl.load(n + batch * n_stride)
    row_theta, row_table = 0.0, 0.0
    if SDC == 2:
        row_theta = lookup(theta, head, row_n, theta_stride, theta_len, head >= 0)
    if SDC == 3:
        row_table = lookup(table, head, row_n, table_stride, table_len, head >= 0)
    denominator = final_denominator(
        row_sum, kept_sum, count, row_max, row_n, row_theta, row_table, sdc_scale, SDC
    )
    result = acc / denominator
    if VMC:
        missing_weight = tl.where(row_n > k_keep, 1.0 - kept_sum / denominator, 0.0)
        v_sums = tl.load(v_sum + (row // GROUP) * HEAD_DIM + d, mask=in_dim, other=0.0)
        result += missing_weight * v_sums / tl.maximum(row_n, 1).to(tl.float32)
    tl.store(out + row * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=in_dim)


@cache
def processors(device: torch.device) -> int:
    """Number of processors (SMs) that splits are spread over; an H100's where there is no device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def split_count(batch_heads: int, kv_len: int, device: torch.device) -> int:
    """How many splits share the keys of a sequence: as many as run at the same time."""
    at_once = RESIDENT * processors(device) // batch_heads
    return max(1, min(MAX_SPLITS, at_once, triton.cdiv(kv_len, TILE["BLOCK_N"])))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: Tensor,
    mask: Tensor | None,
    span: Tensor | None,
    theta: Tensor,
    table: Tensor | None,
    v_sum: Tensor | None,
    spec: KernelSpec,
    scale: float,
    count: bool,
    int8: Int8Keys | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one row per sequence, `[B, H, 1, D]`, and what was kept, `[B, H, N]` bool, if `count`.

    n: `[B or 1, 1]`; mask: `[B or 1, N]` bool, True = visible, and span: `[B, 2]` int32, the first visible
    key and the one after the last, or both None; theta, table: `[H or 1, L]` (one row serves all heads);
    v_sum: `[B, H_kv, D]`, needed by VMC; int8: the copy of k, for thresholds on scores only. The last
    dimension of q, k, v, theta, table and v_sum is contiguous.
    """
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    splits = split_count(batch * num_kv_heads, kv_len, q.device)
    block_d = max(32, triton.next_power_of_2(head_dim))
    largest = spec.selection == Selection.LARGEST
    two_stages = spec.sparse and (largest or spec.placement == "post-softmax")
    part_max, part_sum, part_kept_sum = torch.empty(
        3, batch, num_heads, splits, device=q.device, dtype=torch.float32
    )
    part_count = torch.empty(batch, num_heads, splits, device=q.device, dtype=torch.int32)
    part_acc = torch.empty(batch, num_heads, splits, head_dim, device=q.device, dtype=torch.float32)
    keep_scores = two_stages or (count and spec.sparse)
    shape = (batch, num_heads, kv_len) if keep_scores else (0,)
    scores = torch.empty(shape, device=q.device, dtype=torch.float32)
    if mask is not None or int8 is not None:
        scores.fill_(float("-inf"))  # the kernels write no scores of keys that they skip
    theta_stride, n_stride = row_stride(theta), row_stride(n)
    tile = {
        "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_G": max(16, triton.next_power_of_2(group)),
        "BLOCK_D": block_d, "HAS_MASK": mask is not None, **TILE,
    }  # fmt: skip
    if q.dtype.itemsize == 2 and block_d <= 128 and group <= 16:
        tile["maxnreg"] = REGISTERS
    parts = (part_max, part_sum, part_kept_sum, part_count, part_acc)
    grid = (batch * num_kv_heads, splits)
    # Arguments that a build does not use still need an address: that of q or n.
    rows = (q if mask is None else mask, n if span is None else span, n, theta)
    numbers = (
        scale, kv_len, splits, num_kv_heads, theta.shape[1], theta_stride, n_stride,
        0 if mask is None else row_stride(mask), q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3],
    )  # fmt: skip
    stores = {"COUNT": spec.sparse and spec.sdc == "exp-threshold", "STORE_SCORES": keep_scores}
    if int8 is not None:
        listed = torch.empty(batch, num_kv_heads, kv_len, device=q.device, dtype=torch.int32)
        filtered_kernel[grid](
            q, k, v, *rows, listed, scores, *parts, *numbers, int8.codes, int8.steps, int8.slacks, int8.mean,
            *int8.codes.stride()[:2], *int8.steps.stride()[:2], **tile, BLOCK_F=BLOCK_F, **stores,
        )  # fmt: skip
    split_kernel[grid](
        q, k, v, *rows, scores, *parts, *numbers,
        **tile, BLOCK_S=MAX_SPLITS, WITH_V=not two_stages, FALLBACK=int8 is not None, **stores,
    )  # fmt: skip
    keep = None
    if two_stages:
        if largest:
            # A row with n <= K has all its visible keys among its K largest, so it is dense as it must be.
            top = scores.topk(min(spec.k, kv_len), dim=-1, sorted=False)
            keep = torch.zeros_like(scores, dtype=torch.int8).scatter_(
                -1, top.indices, (top.values > float("-inf")).to(torch.int8)
            )
        elif count:
            keep = torch.zeros_like(scores, dtype=torch.int8)
        gather_kernel[grid](
            v, n if span is None else span, n, theta, scores, scores if keep is None else keep, *parts,
            kv_len, splits, num_kv_heads, theta.shape[1], theta_stride, n_stride, *v.stride()[:3],
            **tile, BLOCK_S=MAX_SPLITS, KEEP_GIVEN=largest, STORE_KEEP=keep is not None,
        )  # fmt: skip
    out = torch.empty(batch, num_heads, 1, head_dim, device=q.device, dtype=q.dtype)
    merge_kernel[(batch * num_heads,)](
        out, n, theta, theta if table is None else table, theta if v_sum is None else v_sum, *parts,
        spec.sdc_scale, spec.k, splits, num_heads, theta.shape[1], 1 if table is None else table.shape[1],
        theta_stride, 0 if table is None else row_stride(table), n_stride,
        GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=MAX_SPLITS, STEP=16,
        SDC=sdc_code(spec), VMC=v_sum is not None, ONE_MAX=two_stages, num_warps=4,
    )  # fmt: skip
    if not count:
        return out, None
    if not spec.sparse:
        visible = torch.ones(1, kv_len, dtype=torch.bool, device=q.device) if mask is None else mask
        return out, visible[:, None].expand(batch, num_heads, kv_len).clone()
    if keep is None:
        row_max = scores.amax(dim=-1, keepdim=True)
        return out, keep_above(scores, per_row(theta, n)[:, :, 0], row_max) & (scores > float("-inf"))
    return out, keep.bool()


def sdc_code(spec: KernelSpec) -> int:
    """SDC as `final_denominator` takes it."""
    if not spec.sparse:
        return 0
    return -1 if spec.placement == "post-softmax" else SDC_METHODS.index(spec.sdc)


def row_stride(table: Tensor) -> int:
    """Stride of the first dimension, 0 where one row serves all."""
    return table.stride(0) if table.shape[0] > 1 else 0
