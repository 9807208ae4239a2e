"""The CPU path: checking and preparing calls with torch tensors, and making them.

attention/reference.py defines what is computed, kernel.cpp how; library.py builds and loads it.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall, Counts
from toptheta.attention.reference import mean_of_visible
from toptheta.calibration.sampler import LayerCalibration
from toptheta.kernels.cpu import library
from toptheta.methods.base import KernelSpec, Selection
from toptheta.methods.compensation import SDC_METHODS

MAX_HEAD_DIM = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of kernel.cpp's numbers


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
        prepared = _Prepared(spec, call.scale, *_inputs(call, spec))
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
        *_inputs(call, spec), call.scale, int(spec.selection), spec.placement, spec.k, spec.sdc,
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
    not counted. The tensors and `first` are those of `_inputs`, the rest is a `KernelSpec`."""
    spec = KernelSpec(
        Selection(selection), placement, k_keep, sdc, sdc_scale, vmc, capk, weighed, key_bits
    )  # fmt: skip
    tensors = (q, k, v, n, mask, real, key_real, theta, table, factor, codes, steps, key_mean, v_sum)
    if codes is not None and q.shape[2] > 1:
        return _step_by_step(spec, scale, tensors, first, count, count_rows, count_steps)
    prepared = _Prepared(spec, scale, *tensors, first)
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
        prepared = _Prepared(
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


def calibrate(call: AttentionCall, calibration: LayerCalibration) -> Tensor:
    """Attention of `call`, dense or Top-k, `[B, H, Q, D]`, while `calibration` takes its samples."""
    ks, chosen = calibration.ks, calibration.chosen
    assert chosen is not None
    # The missing denominator R of Top-k is computed in the same pass. R of thresholds needs a second pass,
    # after this call's samples have entered the thresholds.
    at_once = calibration.with_sdc and not calibration.thresholds
    got = sample(call, ks, calibration.placement, True, at_once, chosen=chosen)
    calibration.take(got.values, got.missing, call.rows.n)
    if calibration.with_sdc and not at_once:
        thetas = [calibration.running_threshold(k) for k in ks]
        second = sample(call, ks, calibration.placement, False, True, thetas, chosen)
        calibration.take(None, second.missing, call.rows.n)
    assert got.out is not None
    return got.out


@dataclass
class Samples:
    """What a calibration pass returns. values: `[len(ks), B, H, Q]` float32, the (K+1)-th largest score or
    weight of each row; missing: R of SDC 'exact', of the same shape, or None. Both are 0 where n <= K or the
    row was not chosen. out: `[B, H, Q, D]`, or None."""

    values: Tensor
    missing: Tensor | None
    out: Tensor | None


def sample(
    call: AttentionCall,
    ks: Sequence[int],
    placement: str,
    output: bool = True,
    missing: bool = False,
    missing_theta: Sequence[Tensor] | None = None,
    chosen: Tensor | None = None,
) -> Samples:
    """The calibration samples of every row (DESIGN section 4) and, in the same pass, attention.

    call: the attention to compute if `output`: dense, or Top-k with its placement and VMC. missing: also
    compute R of the keys that Top-k would drop or, with missing_theta (a `[H, L]` table for each K), that
    those thresholds would drop. chosen: `[B or 1, Q]` bool, the rows to sample; None: all.
    """
    spec = call.kernel if output else KernelSpec()
    assert spec is not None
    if spec.sparse and spec.placement != placement:
        raise ValueError(f"the output is {spec.placement}, but the samples are {placement}")
    prepared = _Prepared(spec, call.scale, *_inputs(call, spec))
    args, shape = prepared.args, (len(ks), *call.q.shape[:3])
    args.post_softmax = placement == "post-softmax"
    out = prepared.output() if output else None
    args.ks, args.num_ks = prepared.keep(torch.tensor(tuple(ks))).data_ptr(), len(ks)
    values = torch.zeros(shape, dtype=torch.float32)
    args.samples = values.data_ptr()
    missing_sums = torch.zeros(shape, dtype=torch.float32) if missing else None
    if missing_sums is not None:
        args.missing = missing_sums.data_ptr()
        if missing_theta is not None:
            tables = prepared.keep(torch.stack(tuple(missing_theta)).float().contiguous())
            args.missing_theta, args.missing_len = tables.data_ptr(), tables.shape[2]
    if chosen is not None:
        chosen = prepared.keep(chosen.contiguous())
        args.chosen, args.chosen_batch = chosen.data_ptr(), chosen.stride(0) if chosen.shape[0] > 1 else 0
    prepared.run()
    return Samples(values, missing_sums, None if out is None else out.to(call.q.dtype))


def _inputs(call: AttentionCall, spec: KernelSpec) -> tuple[Any, ...]:
    """The tensors of a call that computes `spec`, and `first`, in the order of `_attend`."""
    call.check_shapes()
    rows, (q_len, kv_len) = call.rows, (call.q.shape[2], call.k.shape[2])
    first = rows.first
    if first is None:  # without a mask: plain causal, aligned at the first key
        first = -1 if rows.mask is not None else 0 if q_len > 1 else kv_len - 1
    v_sum = None
    if spec.vmc and call.v_sum is not None and q_len == 1:
        v_sum = call.v_sum
    elif spec.vmc and (first < 0 or call.key_bits and q_len > 1):  # any mask, or once for several steps
        v_sum = mean_of_visible(call.v, rows) * rows.n[:, None, :, None]
    factor = call.value_factors() if spec.sparse and spec.weighed else None
    copy = call.key_codes() if spec.key_bits and call.key_bits else None
    copied = (None, None, None) if copy is None else (copy.codes, copy.steps, copy.mean)
    tables = (call.theta, call.sdc_table)
    return (
        call.q, call.k, call.v, rows.n, rows.mask, rows.real, rows.key_real, *tables, factor, *copied, v_sum,
        first,
    )  # fmt: skip


def _plain(table: Tensor) -> Tensor:
    """As the library reads it. Asking costs less than a conversion that has nothing to do."""
    return table if table.dtype == torch.float32 and table.is_contiguous() else table.float().contiguous()


class _Prepared:
    """A Call of the library, and the tensors that its pointers refer to."""

    def __init__(
        self,
        spec: KernelSpec,
        scale: float,
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
    ):
        (batch, num_heads, q_len, head_dim), (num_kv_heads, kv_len) = q.shape, k.shape[1:3]
        self.kept: list[Tensor] = []
        self.q = q
        q, k, v = (self.keep(x if x.stride(3) == 1 else x.contiguous()) for x in (q, k, v))
        self.args = args = library.Call(
            batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, torch.get_num_threads(),
            DTYPES.index(q.dtype), q.data_ptr(), k.data_ptr(), v.data_ptr(),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        )  # fmt: skip
        args.first, args.scale = first, scale
        args.mode, args.k_keep = (spec.selection, spec.k) if spec.sparse else (Selection.ALL, 0)
        args.post_softmax = spec.placement == "post-softmax"
        args.sdc, args.sdc_scale = SDC_METHODS.index(spec.sdc), spec.sdc_scale
        args.capk, args.vmc = spec.capk, spec.vmc
        n = self.keep(n if n.is_contiguous() else n.contiguous())
        args.n, args.n_batch = n.data_ptr(), self.batch_stride(n)
        if mask is not None:
            mask = self.keep(mask if mask.stride(3) == 1 else mask.contiguous())
            args.mask, args.mask_batch, args.mask_row = (
                mask.data_ptr(),
                self.batch_stride(mask),
                mask.stride(2),
            )
        if real is not None:
            real = self.keep(real.contiguous())
            args.real, args.real_batch = real.data_ptr(), self.batch_stride(real)
        if theta is not None:
            theta = self.keep(_plain(theta))
            args.theta, args.theta_len = theta.data_ptr(), theta.shape[1]
        if table is not None:
            table = self.keep(_plain(table))
            args.table, args.table_len = table.data_ptr(), table.shape[1]
        if factor is not None:
            factor = self.keep(factor)
            args.factor, args.factor_batch = factor.data_ptr(), self.batch_stride(factor)
            args.factor_head = factor.stride(1)
        self.read: Tensor | None = None  # `[B, H_kv, N]` uint8, 1 where K is read, of a call with a copy of K
        if codes is not None:
            assert steps is not None and key_mean is not None
            codes, steps, key_mean = (self.keep(x) for x in (codes, steps, key_mean.contiguous()))
            self.read = torch.zeros(batch, num_kv_heads, kv_len, dtype=torch.uint8)
            args.codes, args.steps, args.key_mean = codes.data_ptr(), steps.data_ptr(), key_mean.data_ptr()
            args.read, args.code_bits = self.read.data_ptr(), spec.key_bits
            args.codes_batch, args.codes_head = codes.stride()[:2]
            args.steps_batch, args.steps_head = steps.stride()[:2]
        if v_sum is not None:
            args.v_sum = self.keep(v_sum.contiguous()).data_ptr()
        elif spec.vmc and key_real is not None:
            key_real = self.keep(key_real.contiguous())
            args.key_real, args.key_real_batch = key_real.data_ptr(), self.batch_stride(key_real)

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor)
        return tensor

    @staticmethod
    def batch_stride(tensor: Tensor) -> int:
        return tensor.stride(0) if tensor.shape[0] > 1 else 0

    def output(self) -> Tensor:
        batch, num_heads, q_len, head_dim = self.q.shape
        out = torch.empty(batch, q_len, num_heads, head_dim, dtype=torch.float32).transpose(1, 2)
        self.args.out = out.data_ptr()
        self.args.out_batch, self.args.out_head, self.args.out_row = out.stride()[:3]
        return out

    def run(self, room: list[Tensor | None] | None = None) -> None:
        """room: working memory of a longer call, or an empty list, to be filled for shorter ones."""
        loaded = library.load()
        if isinstance(loaded, str):
            raise RuntimeError(f"the CPU kernel is missing: {loaded}")
        if not room:
            sizes = (ctypes.c_int64 * 3)()
            loaded.workspace(ctypes.byref(self.args), sizes)
            made = [torch.empty(size, dtype=torch.float32) if size else None for size in sizes]
            if room is None:
                room = made
            else:
                room.extend(made)
        self.args.packed, self.args.sums, self.args.scores = (
            None if memory is None else self.keep(memory).data_ptr() for memory in room
        )
        loaded.run(ctypes.byref(self.args))
