"""The CPU path: which calls the kernel computes, and making them.

attention/reference.py defines what is computed, kernel.cpp how; library.py builds and loads it, prepared.py
makes its arguments, samples.py calibrates.
"""

from typing import Any

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall, Counts
from toptheta.kernels.cpu import library
from toptheta.kernels.cpu.prepared import DTYPES, Prepared, inputs
from toptheta.methods.base import KernelSpec, Selection

MAX_HEAD_DIM = 1024


def unsupported(call: AttentionCall) -> str | None:
    """Why the kernel cannot compute this call, or None if it can. Builds nothing."""
    q, k, v = call.q, call.k, call.v
    if not (q.device.type == k.device.type == v.device.type == "cpu"):
        return "the tensors are not on the CPU"
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        return f"the kernel does float32, bfloat16 and float16, the same in q, k and v, not {q.dtype}"
    if call.needs_gradient:
        return "the kernel has no backward pass"
    head_dim = q.shape[3]
    if head_dim % 16 or head_dim > MAX_HEAD_DIM or v.shape[3] != head_dim:
        return f"head_dim is {head_dim}, and the kernel does multiples of 16 up to {MAX_HEAD_DIM}"
    if call.kernel is None:
        return f"{call.spec.method.title} has no kernel"
    if call.key_bits == 4 and head_dim % 32:
        return f"head_dim is {head_dim}, and the kernel reads 4-bit copies of K in multiples of 32"
    if call.grows_when_compiled:
        return "torch.compile cannot trace a copy of K that grows with the cache: use a static cache"
    return None


def ready(call: AttentionCall) -> str | None:
    """Build and load the library at first use, whatever the call; returns None, or why that failed."""
    return library.ready()


def run(call: AttentionCall) -> tuple[Tensor, Counts | None]:
    """`sparse_attention` of attention/reference.py, computed by the kernel. The output is a view of a `[B, Q,
    H, D]` tensor."""
    spec = call.kernel
    assert spec is not None
    steps = call.key_bits > 0 and call.q.shape[2] > 1
    if not call.count and not steps and not torch.compiler.is_compiling():  # most decode steps
        prepared = Prepared(spec, call.scale, *inputs(call, spec))
        out = prepared.output()
        prepared.run()
        return (out if out.dtype == call.q.dtype else out.to(call.q.dtype)), None
    attend = _operator if torch.compiler.is_compiling() else _attend  # the operator costs microseconds
    out, attn, vrow, row, row_vrows, keys = attend(*_arguments(call, spec))
    if not call.count:
        return out.transpose(1, 2), None
    counts = Counts(attn, vrow)
    if call.count_rows or call.count_steps:
        counts.row = row
    if call.count_steps:
        counts.row_vrows = row_vrows
    if call.key_bits:
        counts.keys = keys if call.rows.real is None else keys * call.rows.real[:, None]
    return out.transpose(1, 2), counts


def _arguments(call: AttentionCall, spec: KernelSpec) -> tuple[Any, ...]:
    """Those of `_attend`."""
    return (
        *inputs(call, spec), call.scale, int(spec.selection), spec.placement, spec.k, spec.sdc,
        spec.sdc_scale, spec.vmc, spec.capk, spec.weighed, spec.key_bits, call.count,
        call.count and call.count_rows, call.count_steps,
    )  # fmt: skip


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: Tensor,
    mask: Tensor | None,
    real: Tensor | None,
    key_real: Tensor | None,
    theta: Tensor | None,
    table: Tensor | None,
    factor: Tensor | None,
    codes: Tensor | None,
    steps: Tensor | None,
    key_mean: Tensor | None,
    v_sum: Tensor | None,
    first: int,
    scale: float,
    selection: int,
    placement: str,
    k_keep: int,
    sdc: str,
    sdc_scale: float,
    vmc: bool,
    capk: bool,
    weighed: bool,
    key_bits: int,
    count: bool,
    count_rows: bool,
    count_steps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output `[B, Q, H, D]`, and attn, vrow, row, row_vrows and keys of `Counts`, empty where they are
    not counted. The tensors and `first` are those of `inputs`, the rest is a `KernelSpec`."""
    spec = KernelSpec(
        Selection(selection), placement, k_keep, sdc, sdc_scale, vmc, capk, weighed, key_bits
    )  # fmt: skip
    tensors = (q, k, v, n, mask, real, key_real, theta, table, factor, codes, steps, key_mean, v_sum)
    if codes is not None and q.shape[2] > 1:
        return _step_by_step(spec, scale, tensors, first, count, count_rows, count_steps)
    prepared = Prepared(spec, scale, *tensors, first)
    out, args = prepared.output(), prepared.args
    (batch, num_heads, q_len, _), (num_kv_heads, kv_len) = q.shape, k.shape[1:3]
    attn = torch.zeros((batch, num_heads) if count else 0, dtype=torch.int64)
    vrow = torch.zeros((batch, num_kv_heads, kv_len) if count else 0, dtype=torch.int32)
    rows = count_rows or count_steps
    row = torch.zeros((batch, num_heads, q_len) if rows else 0, dtype=torch.int32)
    row_vrows = torch.zeros((batch, num_kv_heads, q_len) if count_steps else 0, dtype=torch.int32)
    if count:
        args.attn, args.vrow = attn.data_ptr(), vrow.data_ptr()
    if rows:
        args.row = row.data_ptr()
    if count_steps:
        args.row_vrows = row_vrows.data_ptr()
    prepared.run()
    keys = torch.zeros(0, dtype=torch.int32)
    if count and prepared.read is not None:
        keys = prepared.read.sum(dim=-1, dtype=torch.int32)[..., None]
    return out.to(q.dtype).transpose(1, 2), attn, vrow, row, row_vrows, keys


def _step_by_step(
    spec: KernelSpec,
    scale: float,
    tensors: tuple[Any, ...],
    first: int,
    count: bool,
    count_rows: bool,
    count_steps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_attend` of several decode steps with a copy of K, of which the library takes one at a time."""
    q, k, v, n, mask, real, key_real, theta, table, factor, codes, steps, key_mean, v_sum = tensors
    (batch, num_heads, q_len, head_dim), (num_kv_heads, kv_len) = q.shape, k.shape[1:3]
    out = torch.empty(batch, q_len, num_heads, head_dim, dtype=q.dtype)
    vrow = torch.zeros(batch, num_kv_heads, kv_len, dtype=torch.int32)
    row = torch.zeros(batch, num_heads, q_len, dtype=torch.int32)
    row_vrows, keys = (torch.zeros(batch, num_kv_heads, q_len, dtype=torch.int32) for _ in range(2))
    room: list[Tensor | None] = []
    for i in reversed(range(q_len)):  # the longest step first, so that its memory is enough for the others
        at, end = slice(i, i + 1), kv_len if first < 0 else first + i + 1
        prepared = Prepared(
            spec, scale, q[:, :, at], k[:, :, :end], v[:, :, :end], n[:, at],
            None if mask is None else mask[:, :, at, :end],
            None if real is None else real[:, at],
            None if key_real is None else key_real[:, :end],
            theta, table, factor, codes, steps, key_mean,
            None if v_sum is None else v_sum[:, :, at],
            first if first < 0 else first + i,
        )  # fmt: skip
        step = prepared.output()
        if count:
            attn = torch.zeros(batch, num_heads, dtype=torch.int64)
            kept = torch.zeros(batch, num_kv_heads, end, dtype=torch.int32)
            prepared.args.attn, prepared.args.vrow = attn.data_ptr(), kept.data_ptr()
        prepared.run(room)
        out[:, at] = step.transpose(1, 2)
        if count:
            assert prepared.read is not None
            vrow[:, :, :end] += kept
            row[:, :, i], row_vrows[:, :, i] = attn, (kept > 0).sum(dim=-1)
            keys[:, :, i] = prepared.read.sum(dim=-1)
    return (  # an operator's outputs share no memory
        out,
        row.sum(dim=-1) if count else row.new_zeros(0, dtype=torch.int64),
        vrow if count else vrow.new_zeros(0),
        row if count_rows or count_steps else row.new_zeros(0),
        row_vrows if count_steps else row_vrows.new_zeros(0),
        keys if count else keys.new_zeros(0),
    )


_operator = torch.library.custom_op("toptheta::cpu_attend", mutates_args=())(_attend)


@_operator.register_fake
def _(
    q, k, v, n, mask, real, key_real, theta, table, factor, codes, steps, key_mean, v_sum, first, scale,
    selection, placement, k_keep, sdc, sdc_scale, vmc, capk, weighed, key_bits, count, count_rows,
    count_steps,
):  # fmt: skip
    (batch, num_heads, q_len, head_dim), (num_kv_heads, kv_len) = q.shape, k.shape[1:3]
    return (
        q.new_empty(batch, q_len, num_heads, head_dim),
        q.new_empty((batch, num_heads) if count else 0, dtype=torch.int64),
        q.new_empty((batch, num_kv_heads, kv_len) if count else 0, dtype=torch.int32),
        q.new_empty((batch, num_heads, q_len) if count_rows or count_steps else 0, dtype=torch.int32),
        q.new_empty((batch, num_kv_heads, q_len) if count_steps else 0, dtype=torch.int32),
        q.new_empty((batch, num_kv_heads, q_len) if count and key_bits else 0, dtype=torch.int32),
    )
