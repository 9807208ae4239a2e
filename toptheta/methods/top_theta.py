"""Top-theta: what is strictly greater than a calibrated threshold (arXiv 2502.08363, section 3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from toptheta.methods.base import (
    NEG_INF,
    Block,
    KernelSpec,
    Method,
    RowTables,
    Selection,
    State,
    ValueNorms,
    register,
)
from toptheta.methods.top_k import TopK, keep_largest
from toptheta.util.errors import UsageError


@register
@dataclass(frozen=True)
class TopTheta(Method):
    """capk: of what passes the threshold, keep the K most recent only. value_aware (ours, not the paper's):
    compare weight times what the key's value can move the output, see `ValueNorms`; one number a key and head
    is stored in addition to the cache. floor (ours, too): how many of its largest a row keeps at least, where
    a threshold alone guarantees one."""

    capk: bool = False
    value_aware: bool = False
    floor: int = 1

    name = "top_theta"
    title = "Top-theta"
    source = "Top-Theta Attention, arXiv 2502.08363"
    mode = 0
    needs_thresholds = True
    aims_at_k = True

    @property
    def has_state(self) -> bool:  # type: ignore[override]
        return self.value_aware

    @property
    def needs_values(self) -> bool:  # type: ignore[override]
        return self.value_aware

    def extra_bytes(self, n: Tensor, kept: Tensor, head_dim: int, element_size: int) -> Tensor:
        return n * (4 * kept.shape[-1] if self.value_aware else 0)

    @property
    def stores(self) -> str:  # type: ignore[override]
        return "4 for each query head of the group: its value's factor" if self.value_aware else "nothing"

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        assert tables.theta is not None
        x, row_max = block.x, block.row_max
        if self.value_aware:
            factor = block.factor
            if factor is None:
                assert block.state is not None and block.values is not None and block.v is not None
                own = block.x.shape[2] if block.own else None
                factor = value_factors(block.state, block.values, block.v, own)
            x = torch.where(block.visible, x * factor[:, :, None], NEG_INF)  # -inf times 0 is no number
            row_max = x.amax(dim=-1, keepdim=True)
        keep = keep_above(x, tables.theta, row_max)
        if self.floor > 1:
            keep |= keep_largest(x, self.floor)
        return keep_recent(keep, block.budget) if self.capk else keep

    def kernel_spec(self) -> KernelSpec | None:
        if self.floor > 1:
            return None
        return KernelSpec(Selection.THRESHOLD, capk=self.capk, weighed=self.value_aware)

    def check(self, flag: Callable[[str], str] = str) -> None:
        if self.floor < 1:
            raise UsageError(f"{flag('floor')} is {self.floor}: give a whole number of at least 1.")

    def while_calibrating(self, tac: bool) -> Method:
        return TopK() if tac else super().while_calibrating(tac)

    def for_sdc_samples(self) -> Method:
        return TopTheta()  # as the published project: no cap while calibrating


def value_factors(state: State, values: ValueNorms, v: Tensor, own: int | None) -> Tensor:
    """`[B, H, E]`, how much each key's value counts: known from earlier steps, but for the last `own` keys.

    v: `[B, H_kv, E, D]`. own None: it is not known which keys are new.
    """
    end = v.shape[2]
    if own is None or "factor" not in state.tensors:  # another method was at work before: weigh all keys
        state.tensors["factor"] = values.of(v)
        return state.tensors["factor"]
    state.grow(end)
    first = end - own
    state.tensors["factor"][:, :, first:end] = values.of(v[:, :, first:])
    return state.tensors["factor"][:, :, :end]


def keep_above(x: Tensor, theta: Tensor, row_max: Tensor) -> Tensor:
    """Keep what is strictly greater than theta; where nothing is, keep the row's largest (all of them on a
    tie).

    x: `[..., R, E]` scores or weights, theta and row_max: `[..., R, 1]`. theta of -inf keeps every visible
    key.
    """
    below_max = torch.nextafter(row_max, torch.full_like(row_max, NEG_INF))
    return x > torch.minimum(theta, below_max)


def keep_recent(keep: Tensor, k: int) -> Tensor:
    """Of the kept keys `[..., R, E]` keep only the k most recent."""
    newer = keep.sum(dim=-1, keepdim=True) - keep.cumsum(dim=-1)
    return keep & (newer < k)
