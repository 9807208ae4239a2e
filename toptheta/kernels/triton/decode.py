"""Decode on the GPU: one query row against the cache, the keys split among the processors.

`split_kernel` of split.py, one program per (sequence, KV head, split), reads its keys and, for thresholds on
scores, the V rows that some head of the group keeps; with an int8 copy of K, `filtered_kernel` of filtered.py
does this. `gather_kernel` of gather.py is the second stage where selection needs the whole row first:
thresholds on weights, and Top-k. `merge_kernel` joins the splits. The group's query heads are the rows of one
tile. Shapes as in toptheta/attention/reference.py; S is the number of splits. With a copy of K in few bits
the two kernels of copied.py are the first stage, for all thresholds, and `gather_kernel` is the second.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toptheta.attention.call import Int8Keys, per_row
from toptheta.kernels.triton.chips import Chip, chip_of
from toptheta.kernels.triton.copied import candidates_kernel, estimate_kernel
from toptheta.kernels.triton.filtered import filtered_kernel
from toptheta.kernels.triton.gather import gather_kernel
from toptheta.kernels.triton.online import LOWEST, exp, final_denominator, lookup
from toptheta.kernels.triton.split import split_kernel
from toptheta.methods.base import KernelSpec, Selection
from toptheta.methods.compensation import SDC_METHODS
from toptheta.methods.key_codes import KeyCodes
from toptheta.methods.key_copy import FIRST, LAST
from toptheta.methods.top_theta import keep_above

# Keys of a tile, warps and pipeline stages; BLOCK_F: keys of a tile of the int8 copy, or of scores. Those of
# 16-bit types and head_dim up to 128 may be set to others (tiles.py), the rest keeps PLAIN.
PLAIN, PLAIN_F = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2}, 128
TILE = PLAIN
BLOCK_F = PLAIN_F
MAX_SPLITS = 512  # a power of 2
REGISTERS = 168  # per thread of TILE: the most with which three programs fit on a processor
VARYING = ["theta_len", "table_len", "splits"]  # one build serves every length


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


def options(chip: Chip, dtype: torch.dtype, block_d: int, group: int) -> dict[str, int]:
    """Keys of a tile and compile options."""
    if dtype == torch.float32:  # products without tensor cores, unrolled: long tiles take minutes to compile
        return PLAIN | {"BLOCK_N": max(16, min(PLAIN["BLOCK_N"], 4096 // block_d))}
    if block_d > 128:
        tile = dict(PLAIN)
        while 4 * block_d * tile["BLOCK_N"] >= chip.shared:  # K and V, and some bytes
            tile["BLOCK_N"] //= 2
        return tile
    if chip.backend == "cuda" and group <= 16:
        return TILE | {"maxnreg": REGISTERS}
    return TILE


_residents: dict[Any, int] = {}


def resident(chip: Chip, key: Any, stage: Callable[[], "Stage"]) -> int:
    """How many programs of a build one processor runs at the same time, from its registers and its shared
    memory; compiled for that once for each key."""
    if key not in _residents:
        kernel, args, constants = stage()
        made = kernel.warmup(*args, grid=(1,), **constants)
        made._init_handles()
        _residents[key] = chip.resident(made.n_regs, made.metadata.shared, made.metadata.num_warps)
    return _residents[key]


def forget_builds() -> None:
    """To be called when tiles or options have changed."""
    _residents.clear()


@cache
def split_count(batch_heads: int, tiles: int, at_once: int) -> int:
    """How many splits share the `tiles` tiles of each of `batch_heads` (sequence, KV head) pairs, where
    `at_once` programs run at the same time.

    The time is that of the waves of programs, each as long as a split. Of the numbers of splits within 5 % of
    the shortest time this is the smallest, for every split has to be merged.
    """
    most = max(1, min(MAX_SPLITS, tiles))
    times = [-(-batch_heads * n // at_once) * -(-tiles // n) for n in range(1, most + 1)]
    return next(n for n, time in enumerate(times, 1) if time <= 1.05 * min(times))


Stage = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a kernel, its arguments, its constants and options


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
    factor: Tensor | None = None,
    copy: KeyCodes | None = None,
    always: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention of one row per sequence, `[B, H, 1, D]`; if `count`, what was kept, `[B, H, N]` bool, and
    with `copy` how many K rows were read, `[B, H_kv]`.

    n: `[B or 1, 1]`; mask: `[B or 1, N]` bool, True = visible, and span: `[B, 2]` int32, the first visible
    key and the one after the last, or both None; theta, table: `[H or 1, L]` (one row serves all heads);
    v_sum: `[B, H_kv, D]`, needed by VMC; int8: the copy of k, for thresholds on scores only; factor: `[B, H,
    N]` float32 contiguous, how much each key's value counts, for value-aware thresholds on weights; copy: a
    copy of k in few bits, for thresholds, and always: with a mask, the keys `[B, N]` bool that are
    read whatever it says. The last dimension of q, k, v, theta, table and v_sum is contiguous.
    """
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    chip = chip_of(q.device)
    block_d = max(32, triton.next_power_of_2(head_dim))
    largest = spec.selection == Selection.LARGEST
    on_scores = spec.placement != "post-softmax"
    two_stages = spec.sparse and (largest or not on_scores or copy is not None)
    keep_scores, weighed = two_stages or (count and spec.sparse), factor is not None
    floats: dict[str, Any] = {"device": q.device, "dtype": torch.float32}
    ints: dict[str, Any] = {"device": q.device, "dtype": torch.int32}
    scores = torch.empty((batch, num_heads, kv_len) if keep_scores else (0,), **floats)
    if mask is not None or int8 is not None:
        scores.fill_(float("-inf"))  # the kernels write no scores of keys that they skip
    listed = torch.empty((batch, num_kv_heads, kv_len) if two_stages or int8 is not None else (0,), **ints)
    tile = {
        "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_G": max(16, triton.next_power_of_2(group)),
        "BLOCK_D": block_d, "HAS_MASK": mask is not None, **options(chip, q.dtype, block_d, group),
    }  # fmt: skip
    block_f = PLAIN_F if q.dtype == torch.float32 or block_d > 128 else BLOCK_F
    # Arguments that a build does not use still need an address: that of q, n or theta.
    some_span, factors = n if span is None else span, theta if factor is None else factor
    rows = (q if mask is None else mask, some_span, n, theta)
    thetas = (theta.shape[1], row_stride(theta), row_stride(n))
    strides = (
        *thetas, 0 if mask is None else row_stride(mask), q.stride(0), q.stride(1), *k.stride()[:3],
        *v.stride()[:3],
    )  # fmt: skip
    stores = {"COUNT": spec.sparse and spec.sdc == "exp-threshold", "STORE_SCORES": keep_scores}

    def part_tensors(splits: int) -> tuple[Tensor, ...]:
        """part_max, part_sum, part_kept_sum, part_count, part_acc; part_best."""
        shape = (batch, num_heads, splits)
        part_max, part_sum, part_kept_sum, part_best = torch.empty((4, *shape), **floats)
        part_count, part_acc = torch.empty(shape, **ints), torch.empty((*shape, head_dim), **floats)
        return part_max, part_sum, part_kept_sum, part_count, part_acc, part_best

    def split_stage(splits: int, parts: tuple[Tensor, ...]) -> Stage:
        args = (q, k, v, *rows, factors, scores, *parts, scale, kv_len, splits, num_kv_heads, *strides)
        flags = {"WITH_V": not two_stages, "FALLBACK": int8 is not None, "WEIGHED": weighed}
        return split_kernel, args, {**tile, **stores, "BLOCK_S": part_block(splits), **flags}

    def filtered_stage(splits: int, parts: tuple[Tensor, ...]) -> Stage:
        assert int8 is not None
        copy = (int8.codes, int8.steps, int8.slacks, int8.mean)
        args = (q, k, v, *rows, listed, scores, *parts[:-1], scale, kv_len, splits, num_kv_heads, *strides)
        more = (*copy, *int8.codes.stride()[:2], *int8.steps.stride()[:2])
        return filtered_kernel, (*args, *more), {**tile, **stores, "BLOCK_F": block_f}

    def copied_stage(splits: int, parts: tuple[Tensor, ...]) -> Stage:
        assert copy is not None
        of_copy = (copy.codes, copy.steps, copy.mean.contiguous())
        args = (q, *of_copy, *rows[:2], scores, *parts[:2], scale, kv_len, splits, num_kv_heads)
        more = (strides[3], *strides[4:6], *copy.codes.stride()[:2], *copy.steps.stride()[:2])
        return estimate_kernel, (*args, *more), {**tile, "BITS": copy.bits}

    def candidates_stage(splits: int, of_copy: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> Stage:
        args = (q, k, q if always is None else always, *rows[1:], factors, listed, scores, *of_copy)
        more = (scale, kv_len, splits, num_kv_heads, *thetas, *strides[4:9])
        flags = {
            "BLOCK_F": block_f, "BLOCK_S": part_block(splits), "FIRST": FIRST, "LAST": LAST,
            "ON_SCORES": on_scores, "WEIGHED": weighed,
        }  # fmt: skip
        return candidates_kernel, (*args, *parts[:2], parts[-1], *more), {**tile, **flags}

    first_stage = copied_stage if copy is not None else split_stage if int8 is None else filtered_stage
    at_once = 3 * chip.processors  # where there is no GPU
    if q.device.type == "cuda":
        key = (
            q.device,
            q.dtype,
            head_dim,
            group,
            mask is None,
            int8 is None,
            0 if copy is None else copy.bits,
            two_stages,
            weighed,
            *stores.values(),
        )
        at_once = chip.processors * resident(chip, key, lambda: first_stage(1, part_tensors(1)))
    splits = split_count(batch * num_kv_heads, triton.cdiv(kv_len, tile["BLOCK_N"]), at_once)
    parts = part_tensors(splits)
    grid = (batch * num_kv_heads, splits)
    if int8 is not None:
        launch(grid, filtered_stage(splits, parts))
    if copy is None:
        launch(grid, split_stage(splits, parts))
    else:
        of_copy = tuple(torch.empty((2, batch, num_heads, splits), **floats))
        launch(grid, copied_stage(splits, of_copy))
        launch(grid, candidates_stage(splits, of_copy, parts))
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
            v, some_span, n, theta, factors, scores, listed, scores if keep is None else keep, *parts,
            kv_len, splits, num_kv_heads, *thetas, *v.stride()[:3], **tile, BLOCK_F=block_f,
            BLOCK_S=part_block(splits), KEEP_GIVEN=largest, STORE_KEEP=keep is not None,
            ON_SCORES=on_scores and not largest, WEIGHED=weighed, BY_COPY=copy is not None,
        )  # fmt: skip
    out = torch.empty(batch, num_heads, 1, head_dim, device=q.device, dtype=q.dtype)
    merge_kernel[(batch * num_heads,)](
        out, n, theta, theta if table is None else table, theta if v_sum is None else v_sum, *parts[:-1],
        spec.sdc_scale, spec.k, splits, num_heads, theta.shape[1], 1 if table is None else table.shape[1],
        row_stride(theta), 0 if table is None else row_stride(table), row_stride(n),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=part_block(splits), STEP=16,
        SDC=sdc_code(spec), VMC=v_sum is not None, ONE_MAX=two_stages, num_warps=4,
    )  # fmt: skip
    if not count:
        return out, None, None
    if not spec.sparse:
        visible = torch.ones(1, kv_len, dtype=torch.bool, device=q.device) if mask is None else mask
        return out, visible[:, None].expand(batch, num_heads, kv_len).clone(), None
    if keep is None:
        row_max = scores.amax(dim=-1, keepdim=True)
        kept = keep_above(scores, per_row(theta, n)[:, :, 0], row_max) & (scores > float("-inf"))
        return out, kept, None
    read = None if copy is None else (scores[:, ::group] > float("-inf")).sum(dim=-1, dtype=torch.int32)
    return out, keep.bool(), read


def launch(grid: tuple[int, int], stage: Stage) -> None:
    kernel, args, constants = stage
    kernel[grid](*args, **constants)


def part_block(splits: int) -> int:
    """Places for the splits in the kernels that read all of them: few sizes, for each is a build."""
    return max(64, triton.next_power_of_2(splits))


def sdc_code(spec: KernelSpec) -> int:
    """SDC as `final_denominator` takes it."""
    if not spec.sparse:
        return 0
    return -1 if spec.placement == "post-softmax" else SDC_METHODS.index(spec.sdc)


def row_stride(table: Tensor) -> int:
    """Stride of the first dimension, 0 where one row serves all."""
    return table.stride(0) if table.shape[0] > 1 else 0
