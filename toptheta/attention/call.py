"""One attention call, as the attention function passes it to the reference and to every backend.

Shapes: B sequences, H query heads, H_kv key/value heads, G = H / H_kv query heads per group, Q query rows, N
keys, D head_dim. The group of a head is `head // G`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from toptheta.attention.rows import Rows
from toptheta.methods.base import Block, KernelSpec, RowTables, ValueNorms
from toptheta.methods.key_codes import KeyCodes
from toptheta.methods.key_copy import any_head, codes_of
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.methods.top_theta import value_factors


@dataclass(frozen=True)
class Int8Keys:
    """An int8 copy of K; see kernels/int8_keys.py. codes: `[B, H_kv, N, D]` int8; steps, slacks: `[B, H_kv,
    N]` float32; mean: `[B, H_kv, D]` float32."""

    codes: Tensor
    steps: Tensor
    slacks: Tensor
    mean: Tensor


class Calibrator(Protocol):
    """Observes the rows of every block while a layer is calibrated; see calibration/sampler.py."""

    def observe(self, block: Block) -> None: ...


@dataclass
class AttentionCall:
    """The inputs of one attention call.

    q: `[B, H, Q, D]`; k, v: `[B, H_kv, N, D]`.
    theta, sdc_table: `[H, L]`, calibrated values by row length, looked up at min(n, L - 1), with -inf and 0
    for lengths up to K; None if the spec does not need them.
    count: whether to count what is kept; count_rows: also for each row.
    decode: whether the query rows are decode steps; else they belong to a prompt.
    softcap: scores are first capped to softcap * tanh(scores / softcap).
    sinks: `[H]`, a score for each head that belongs to every row's denominator but to no key.
    values: the norms of value-aware thresholds, for a method that uses them.

    From the cache, where it has them: v_sum, `[B, H_kv, D]` float32, the sum of V over the visible keys of
    the only query row, so that the kernels need not read all of V; int8, the copy of K, so that the Triton
    kernels need not read all of K; state, that of the method; factor, `[B, H, N]` float32, the relative norm
    of each key's value.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Rows
    spec: LayerSpec
    scale: float
    theta: Tensor | None = None
    sdc_table: Tensor | None = None
    count: bool = False
    count_rows: bool = False
    v_sum: Tensor | None = None
    int8: Int8Keys | None = None
    state: State | None = None
    values: ValueNorms | None = None
    factor: Tensor | None = None
    decode: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def count_steps(self) -> bool:
        """Whether the rows are several decode steps that are counted separately."""
        return self.count and self.decode and self.q.shape[2] > 1

    @property
    def kernel(self) -> KernelSpec | None:
        """The spec in the form that kernels support; None: reference path only."""
        return self.spec.kernel

    def check_shapes(self) -> None:
        """Raise ValueError if shapes do not match: kernels do not check addresses."""
        q, k, v, num_heads = self.q, self.k, self.v, self.q.shape[1]
        if (
            v.shape != k.shape
            or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3])
            or num_heads % k.shape[1]
        ):
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not match")
        for name, table, needed in (
            ("theta", self.theta, self.reads_theta),
            ("sdc_table", self.sdc_table, self.reads_sdc_table),
        ):
            if needed and (table is None or table.shape[0] != num_heads):
                raise ValueError(f"{self.spec} needs a {name} of shape [{num_heads}, L]")

    @property
    def reads_theta(self) -> bool:
        return self.spec.sparse and (self.spec.method.needs_thresholds or self.spec.sdc == "exp-threshold")

    @property
    def reads_sdc_table(self) -> bool:
        return self.spec.sparse and self.spec.sdc == "offline-calibrated"

    def tables_of(self, n: Tensor) -> RowTables:
        """The calibrated values of rows with lengths n `[B or 1, R]`."""
        return RowTables(*(None if t is None else per_row(t, n) for t in (self.theta, self.sdc_table)))

    def value_factors(self) -> Tensor:
        """`[B, H, N]` float32, the relative norm of each key's value, for value-aware thresholds: from the
        cache or, with `state`, computed for the keys of these rows only."""
        if self.factor is not None:
            return self.factor
        assert self.values is not None
        state = self.state if self.state is not None else State()
        state.belong_to(self.spec.method)
        kv_len, q_len = self.k.shape[2], self.q.shape[2]
        end, own = self.rows.end(q_len, kv_len), None if self.rows.first is None else q_len
        value_factors(state, self.values, self.v[:, :, :end], own)
        state.grow(kv_len)
        return state.tensors["factor"][:, :, :kv_len]

    @property
    def key_bits(self) -> int:
        """Bits of the copy of K by which decode steps choose what to read of K; 0: they read all."""
        return self.spec.method.key_bits if self.decode and self.spec.sparse else 0

    def key_codes(self) -> KeyCodes:
        """The copy of K, up to the keys of these rows."""
        state = self.state if self.state is not None else State()
        state.belong_to(self.spec.method)
        rows, (q_len, kv_len) = self.rows, (self.q.shape[2], self.k.shape[2])
        visible = rows.visible(q_len - 1, q_len, kv_len)
        return codes_of(
            state,
            self.k[:, :, : rows.end(q_len, kv_len)],
            None if visible is None else visible[:, 0, 0],
            q_len if self.decode else 0,
            rows.first is not None,
            self.spec.method.key_bits,
        )

    @property
    def grows_when_compiled(self) -> bool:
        """Whether the call has a copy of K that would grow in a compiled model."""
        return bool(self.key_bits and torch.compiler.is_compiling() and not (self.state and self.state.room))

    @property
    def needs_gradient(self) -> bool:
        tensors = (self.q, self.k, self.v) if self.sinks is None else (self.q, self.k, self.v, self.sinks)
        return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)

    @property
    def reference_only(self) -> str | None:
        """Why no kernel supports this call, or None."""
        if self.softcap is not None:
            return "the kernels do not support capped scores (softcap)"
        return "the kernels do not support attention sinks" if self.sinks is not None else None

    def capped(self, scores: Tensor) -> Tensor:
        """Scores after the cap, in place unless a gradient is needed."""
        if self.softcap is None:
            return scores
        if scores.requires_grad:
            return (scores / self.softcap).tanh() * self.softcap
        return scores.div_(self.softcap).tanh_().mul_(self.softcap)


@dataclass
class Counts:
    """Counts of what selection kept; padding rows count as 0.

    attn: `[B, H]`, kept elements. vrow: `[B, H_kv, N]`, how many (row, head) pairs keep each V row. row:
    `[B, H, Q]` int32, kept elements of each row, or None if not counted. row_vrows: `[B, H_kv, Q]` int32, V
    rows that any head of a group keeps for each row, or None if not counted. keys: `[B, H_kv, Q]` int32, K
    rows that are read for each row, or None if all are.
    """

    attn: Tensor
    vrow: Tensor
    row: Tensor | None = None
    row_vrows: Tensor | None = None
    keys: Tensor | None = None

    @cached_property
    def vrows(self) -> Tensor:
        """`[B, H_kv]`, V rows that any (row, head) pair keeps; use it only when counting is complete."""
        return (self.vrow > 0).sum(dim=-1)

    def steps(self) -> "Counts":
        """The counts of each decode step, as if it were a separate sequence: `[B * Q, ...]`."""
        if self.row is None or self.row_vrows is None:
            return self
        keys = None if self.keys is None else self.keys.transpose(1, 2).flatten(0, 1)[..., None]
        steps = Counts(self.row.transpose(1, 2).flatten(0, 1).long(), self.vrow, keys=keys)
        steps.vrows = self.row_vrows.transpose(1, 2).flatten(0, 1)
        return steps

    @classmethod
    def zeros(cls, call: AttentionCall) -> "Counts":
        batch, num_heads, q_len, _ = call.q.shape
        ints: dict[str, Any] = {"dtype": torch.int32, "device": call.q.device}
        return cls(
            attn=torch.zeros(batch, num_heads, dtype=torch.int64, device=call.q.device),
            vrow=torch.zeros(batch, call.k.shape[1], call.k.shape[2], **ints),
            row=torch.zeros(batch, num_heads, q_len, **ints) if call.count_rows or call.count_steps else None,
            row_vrows=torch.zeros(batch, call.k.shape[1], q_len, **ints) if call.count_steps else None,
        )

    def add(self, keep: Tensor, real: Tensor | None, start: int, read: Tensor | None = None) -> None:
        """Add what the rows from `start` on keep, `[B, H, R, E]` bool; rows where `real` is False do not
        count. read: the keys that they read, in the same form; None: all."""
        if real is not None:
            keep = keep & real[:, None, :, None]
            read = None if read is None else read & real[:, None, :, None]
        batch, _, _, end = keep.shape
        per_key = keep.sum(dim=2, dtype=torch.int32)
        self.attn += per_key.sum(dim=-1)
        self.vrow[:, :, :end] += per_key.view(batch, self.vrow.shape[1], -1, end).sum(dim=2)
        stop = start + keep.shape[2]
        if self.row is not None:
            self.row[:, :, start:stop] = keep.sum(dim=-1, dtype=torch.int32)
        if read is not None:
            keys = read[:, :: read.shape[1] // self.vrow.shape[1]].sum(dim=-1, dtype=torch.int32)
            self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        if self.row_vrows is not None:
            by_group = any_head(keep, self.vrow.shape[1])
            self.row_vrows[:, :, start:stop] = by_group.sum(dim=-1, dtype=torch.int32)


def per_row(table: Tensor, n: Tensor) -> Tensor:
    """The values `[B or 1, H, R, 1]` of a `[H, L]` table at the row lengths `n` `[B or 1, R]`."""
    return table[:, n.clamp(max=table.shape[1] - 1)].transpose(0, 1).unsqueeze(-1)
