"""The GPU path: which calls the Triton kernels support, and the kernels as PyTorch operators. probe.py tries
them, cache_updates.py has those that update a cache.

The operators have fakes (`register_fake`) and nothing here waits for the device, so torch.compile and CUDA
graphs work with them. The kernels are in decode.py and prefill.py, which are imported on first use: this
module can be imported without Triton. TRITON_INTERPRET=1 runs them on the CPU.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall, Counts, Int8Keys
from toptheta.attention.reference import mean_of_visible
from toptheta.kernels.int8_keys import keys_read_of, serves
from toptheta.kernels.triton.chips import chip_of, too_old
from toptheta.methods.base import KernelSpec, Selection
from toptheta.methods.key_codes import KeyCodes
from toptheta.methods.key_copy import first_and_last

MAX_HEAD_DIM, MAX_GROUP = 256, 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read at import, as Triton itself does


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernels cannot compute this call, or None if they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    kinds = {x.device.type for x in (call.q, call.k, call.v)}
    if kinds != {"cuda"} and not (INTERPRETED and kinds == {"cpu"}):
        return "the tensors are not on a GPU"
    dtype, head_dim, spec = call.q.dtype, call.q.shape[3], call.kernel
    if not (dtype == call.k.dtype == call.v.dtype and dtype in DTYPES):
        return f"the kernels do float32, float16 and bfloat16, the same in q, k and v, not {dtype}"
    if kinds == {"cuda"}:
        old = too_old_here(call.q.device)
        if old is not None:
            return old
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if call.needs_gradient:
        return "the kernels have no backward pass"
    if head_dim > MAX_HEAD_DIM or head_dim % 8 or call.v.shape[3] != head_dim:
        return f"head_dim is {head_dim}, and the kernels do multiples of 8 up to {MAX_HEAD_DIM}"
    if call.q.shape[1] > MAX_GROUP * call.k.shape[1]:
        return f"more than {MAX_GROUP} query heads share a KV head"
    if spec is None:
        return f"{call.spec.method.title} has no kernel"
    if spec.sparse and spec.capk:
        return "the kernels have no capk"
    if call.key_bits and call.q.shape[2] > 1:
        return "the kernels read a copy of K for one decode step at a time"
    if call.grows_when_compiled:
        return "torch.compile cannot trace a copy of K that grows with the cache: use a static cache"
    if spec.sparse and spec.selection == Selection.LARGEST and call.q.shape[2] > 1:
        return "Top-k of many rows has no kernel"
    if call.count_rows or call.count_steps:
        return "the kernels do not count what single rows keep"
    return None


@torch.compiler.assume_constant_result  # asking the driver cannot be traced
def too_old_here(device: torch.device) -> str | None:
    return too_old(chip_of(device))


def run(call: AttentionCall) -> tuple[Tensor, Counts | None]:
    """`sparse_attention` of attention/reference.py, computed by the kernels.

    The output is a view of a `[B, Q, H, D]` tensor. The int8 copy is used for one row and thresholds on
    scores, otherwise it is ignored. Raises ValueError where shapes do not fit.
    """
    call.check_shapes()
    spec, rows, count, q_len = call.kernel, call.rows, call.count, call.q.shape[2]
    assert spec is not None
    theta, table = call.theta, call.sdc_table
    if theta is None or not spec.sparse or spec.selection != Selection.THRESHOLD:
        theta = torch.full((1, 1), float("-inf"), device=call.q.device)
    if not spec.sparse or spec.sdc != "offline-calibrated":
        table = None
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    factor = call.value_factors().contiguous() if spec.sparse and spec.weighed else None
    theta = theta.float().contiguous()
    table = None if table is None else table.float().contiguous()
    settings = (
        call.scale, int(spec.selection), spec.placement, spec.k, spec.sdc, spec.sdc_scale,
        spec.vmc, count,
    )  # fmt: skip
    if q_len == 1:
        v_sum = call.v_sum if spec.vmc else None
        if spec.vmc and v_sum is None:
            visible_v = v if rows.mask is None else torch.where(rows.mask[:, :, 0, :, None], v, 0.0)
            v_sum = visible_v.sum(dim=2, dtype=torch.float32)
        mask, span = None, rows.span()
        if rows.mask is not None:
            mask = rows.mask[:, 0, 0].contiguous()
            assert span is not None
            span = span.expand(q.shape[0], 2).contiguous()
        v_sum = None if v_sum is None else v_sum.float().contiguous()
        tiers: tuple[Tensor | None, ...] = (None, None, None, None)
        int8 = call.int8
        if int8 is not None and serves(spec):
            if int8.codes.shape != k.shape:
                raise ValueError(f"the int8 copy {tuple(int8.codes.shape)} is not of k {tuple(k.shape)}")
            tiers = (int8.codes, int8.steps, int8.slacks, int8.mean)
        always, bits = None, call.key_bits
        if bits:
            copy = call.key_codes()
            tiers = (copy.codes, copy.steps, None, copy.mean)
            always = None if mask is None else first_and_last(mask).expand(q.shape[0], -1).contiguous()
        out, keep, read = _decode(
            q, k, v, rows.n, mask, span, theta, table, v_sum, *tiers, factor, always, *settings, bits
        )
        counts = _counts(keep, rows.real, k.shape[1]) if count else None
        if counts is not None and bits:
            counts.keys = (read if rows.real is None else read * rows.real)[..., None]
        return out, counts
    first, mask = rows.first_tensor(), None
    if first is None:
        assert rows.mask is not None
        mask = rows.mask[:, 0].contiguous()
    real = None if rows.real is None else rows.real.contiguous()
    key_real = None if rows.key_real is None else rows.key_real.contiguous()
    v_mean = mean_of_visible(v, rows).contiguous() if spec.vmc and first is None else None
    out, attn, vrow = _prefill(
        q, k, v, rows.n.contiguous(), first, mask, key_real, real, theta, table, v_mean, factor, *settings
    )
    return out.transpose(1, 2), Counts(attn, vrow) if count else None


def keys_read(call: AttentionCall) -> Tensor | None:
    """`[B, H_kv]` K rows that a decode step reads with the int8 copy, None where that is not used."""
    used = call.int8 is not None and call.q.shape[2] == 1 and call.kernel is not None and serves(call.kernel)
    return keys_read_of(call) if used else None


def _counts(keep: Tensor, real: Tensor | None, num_kv_heads: int) -> Counts:
    """Counts of `keep` `[B, H, N]` bool, the only row of each sequence."""
    if real is not None:
        keep = keep & real[:, :, None]
    batch, num_heads, kv_len = keep.shape
    vrow = keep.view(batch, num_kv_heads, -1, kv_len).sum(dim=2, dtype=torch.int32)
    return Counts(attn=keep.sum(dim=-1), vrow=vrow)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors: the layers of a model may
    be spread over several GPUs."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@torch.library.custom_op("toptheta::triton_decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: Tensor,
    mask: Tensor | None,
    span: Tensor | None,
    theta: Tensor,
    table: Tensor | None,
    v_sum: Tensor | None,
    codes: Tensor | None,
    steps: Tensor | None,
    slacks: Tensor | None,
    k_mean: Tensor | None,
    factor: Tensor | None,
    always: Tensor | None,
    scale: float,
    selection: int,
    placement: str,
    k_keep: int,
    sdc: str,
    sdc_scale: float,
    vmc: bool,
    count: bool,
    key_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode` of decode.py as an operator; the other outputs, which keys were kept and how many K rows were
    read, are empty unless `count`, the last one also without a copy in `key_bits`."""
    # Imported here because this module must import without Triton.
    from toptheta.kernels.triton import decode as triton_decode

    spec = KernelSpec(Selection(selection), placement, k_keep, sdc, sdc_scale, vmc)
    int8 = copy = None
    if key_bits:
        assert codes is not None and steps is not None and k_mean is not None
        copy = KeyCodes(codes, steps, k_mean, key_bits)
    elif codes is not None:
        assert steps is not None and slacks is not None and k_mean is not None
        int8 = Int8Keys(codes, steps, slacks, k_mean)
    with on_device_of(q):
        out, keep, read = triton_decode.decode(
            q, k, v, n, mask, span, theta, table, v_sum, spec, scale, count, int8, factor, copy, always
        )
    keep = q.new_empty(0, dtype=torch.bool) if keep is None else keep
    return out, keep, q.new_empty(0, dtype=torch.int32) if read is None else read


@_decode.register_fake
def _(
    q, k, v, n, mask, span, theta, table, v_sum, codes, steps, slacks, k_mean, factor, always,
    scale, selection, placement, k_keep, sdc, sdc_scale, vmc, count, key_bits,
):  # fmt: skip
    shape = (q.shape[0], q.shape[1], k.shape[2]) if count else (0,)
    read = k.shape[:2] if count and key_bits else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.bool), q.new_empty(read, dtype=torch.int32)


@torch.library.custom_op("toptheta::triton_prefill", mutates_args=())
def _prefill(
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
    scale: float,
    selection: int,
    placement: str,
    k_keep: int,
    sdc: str,
    sdc_scale: float,
    vmc: bool,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`prefill` of prefill.py as an operator: output `[B, Q, H, D]`, and counts, empty unless `count`."""
    from toptheta.kernels.triton import prefill as triton_prefill

    spec = KernelSpec(Selection(selection), placement, k_keep, sdc, sdc_scale, vmc)
    with on_device_of(q):
        out, counts = triton_prefill.prefill(
            q, k, v, n, first, mask, key_real, real, theta, table, v_mean, factor, spec, scale, count
        )
    if counts is None:
        return out, n.new_empty(0), n.new_empty(0, dtype=torch.int32)
    return out, counts.attn, counts.vrow


@_prefill.register_fake
def _(
    q, k, v, n, first, mask, key_real, real, theta, table, v_mean, factor,
    scale, selection, placement, k_keep, sdc, sdc_scale, vmc, count,
):  # fmt: skip
    batch, num_heads, q_len, head_dim = q.shape
    attn = (batch, num_heads) if count else (0,)
    vrow = (batch, k.shape[1], k.shape[2]) if count else (0,)
    return (
        q.new_empty(batch, q_len, num_heads, head_dim),
        n.new_empty(attn, dtype=torch.int64),
        n.new_empty(vrow, dtype=torch.int32),
    )
