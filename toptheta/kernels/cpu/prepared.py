"""A call of the library, made of torch tensors."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall
from toptheta.attention.reference import mean_of_visible
from toptheta.kernels.cpu import library
from toptheta.methods.base import KernelSpec, Selection
from toptheta.methods.compensation import SDC_METHODS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of kernel.cpp's numbers


def inputs(call: AttentionCall, spec: KernelSpec) -> tuple[Any, ...]:
    """The tensors of a call that computes `spec`, and `first`, in the order of `Prepared`."""
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


class Prepared:
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
