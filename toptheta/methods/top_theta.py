"""Top-theta: the keys whose score or weight exceeds a calibrated threshold (arXiv 2502.08363, section 3)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toptheta.methods.base import (
    NEG_INF,
    TINY,
    Block,
    KernelSpec,
    Method,
    RowTables,
    Selection,
    ValueNorms,
    register,
)
from toptheta.methods.key_copy import BITS, STEP_BYTES, candidates, estimated
from toptheta.methods.state import State
from toptheta.methods.top_k import TopK, keep_largest
from toptheta.util.errors import UsageError


@register
@dataclass(frozen=True)
class TopTheta(Method):
    """capk: of the keys above the threshold, keep only the K most recent.

    The other options are ours, not the paper's. value_aware: compare the weight times the relative norm of
    the key's projected value (`ValueNorms`), of which one number per key and head is stored in addition to
    the cache. floor: the number of largest keys that a row keeps at least; a threshold alone guarantees one.
    cap: the number of largest keys that a row keeps at most; 0: no limit. running: compare the weight that a
    key has among the keys up to itself, which one pass over the keys can compute (a score against the running
    log-sum-exp); it is never less than the key's weight in the row, so that more keys are kept.
    key_copy: none, int8 or int4; decode steps read K only for keys that a quantized copy of K does not rule
    out, see key_copy.py."""

    capk: bool = False
    value_aware: bool = False
    floor: int = 1
    cap: int = 0
    running: bool = False
    key_copy: str = "none"

    name = "top_theta"
    title = "Top-theta"
    source = "Top-Theta Attention, arXiv 2502.08363"
    mode = 0
    needs_thresholds = True
    aims_at_k = True

    @property
    def has_state(self) -> bool:  # type: ignore[override]
        return self.value_aware or self.key_copy != "none"

    @property
    def needs_values(self) -> bool:  # type: ignore[override]
        return self.value_aware

    @property
    def key_bits(self) -> int:  # type: ignore[override]
        return BITS.get(self.key_copy, 0)

    @property
    def needs_weights(self) -> bool:  # type: ignore[override]
        return self.running

    def extra_bytes(self, n: Tensor, kept: Tensor, head_dim: int, element_size: int) -> Tensor:
        read = n * (4 * kept.shape[-1] if self.value_aware else 0)
        if self.key_copy != "none":  # in proportion to a 16-bit cache, which float32 would make look cheap
            read = read + n * ((head_dim * BITS[self.key_copy] // 8 + STEP_BYTES) * element_size // 2)
        return read

    @property
    def stores(self) -> str:  # type: ignore[override]
        stored = []
        if self.value_aware:
            stored.append("4 for each query head of the group: the value's factor")
        if self.key_copy != "none":
            stored.append(f"a copy of K in {BITS[self.key_copy]} bits, and {STEP_BYTES} for its step size")
        return "; ".join(stored) or "nothing"

    def estimate(self, block: Block, tables: RowTables, placement: str) -> None:
        if self.key_copy == "none":
            return
        assert tables.theta is not None and block.k is not None
        guess = estimated(block)
        seen = replace(block, x=guess, row_max=guess.amax(dim=-1, keepdim=True))
        compared = seen.weights if placement == "post-softmax" else guess
        if self.value_aware:
            compared = compared * self._factor(block)[:, :, None]
        visible = block.visible
        block.read = candidates((compared > tables.theta) & visible, visible[:, :1], block.k.shape[1])
        block.x = torch.where(block.read, block.x, guess)
        block.row_max = block.x.amax(dim=-1, keepdim=True)

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        assert tables.theta is not None
        x, row_max = block.x, block.row_max
        if self.running:
            x = torch.where(block.visible, x / block.weights.cumsum(dim=-1).clamp_min(TINY), NEG_INF)
        if self.value_aware:  # -inf times 0 is not a number
            x = torch.where(block.visible, x * self._factor(block)[:, :, None], NEG_INF)
        if block.read is not None:
            x = x.masked_fill(~block.read, NEG_INF)
        if x is not block.x:
            row_max = x.amax(dim=-1, keepdim=True)
        keep = keep_above(x, tables.theta, row_max)
        if self.floor > 1:
            keep |= keep_largest(x, self.floor)
        if self.cap:
            keep &= keep_largest(x, self.cap)
        return keep_recent(keep, block.budget) if self.capk else keep

    def _factor(self, block: Block) -> Tensor:
        """`[B, H, E]`, the relative norm of each key's value."""
        if block.factor is None:
            assert block.state is not None and block.values is not None and block.v is not None
            own = block.x.shape[2] if block.own else None
            block.factor = value_factors(block.state, block.values, block.v, own)
        return block.factor

    def kernel_spec(self) -> KernelSpec | None:
        if self.floor > 1 or self.cap or self.running:
            return None
        return KernelSpec(
            Selection.THRESHOLD, capk=self.capk, weighed=self.value_aware, key_bits=self.key_bits
        )

    def check(self, flag: Callable[[str], str] = str) -> None:
        if self.floor < 1:
            raise UsageError(f"{flag('floor')} is {self.floor}: give a whole number of at least 1.")
        if self.cap and self.cap < self.floor:
            raise UsageError(
                f"{flag('cap')} is {self.cap}, less than the {self.floor} keys that rows keep: raise it, or "
                "give 0 for no limit."
            )
        if self.key_copy not in ("none", *BITS):
            raise UsageError(f"{flag('key_copy')} is {self.key_copy!r}: choose none, {' or '.join(BITS)}.")
        if self.running and self.key_copy != "none":
            raise UsageError(f"{flag('running')} cannot be combined with {flag('key_copy')}: leave one out.")

    def while_calibrating(self, tac: bool) -> Method:
        return TopK() if tac else super().while_calibrating(tac)

    def for_sdc_samples(self) -> Method:
        return TopTheta()  # as in the published project: no cap while calibrating


@torch.no_grad()
def value_factors(state: State, values: ValueNorms, v: Tensor, own: int | None) -> Tensor:
    """`[B, H, E]`, the relative norm of each key's value: from `state`, except for the last `own` keys, which
    are new, and for those that came while the layer was dense.

    v: `[B, H_kv, E, D]`. own: None if it is unknown which keys are new.
    """
    end, first = v.shape[2], 0
    if own is not None and "factor" in state.tensors and state.weighed_by is values:
        first = min(state.numbers["weighed"], end - own)
    state.numbers["weighed"], state.weighed_by = end, values
    if first == 0:
        state.tensors["factor"] = values.of(v)
        return state.tensors["factor"]
    state.grow(end)
    state.tensors["factor"][:, :, first:end] = values.of(v[:, :, first:])
    return state.tensors["factor"][:, :, :end]


def keep_above(x: Tensor, theta: Tensor, row_max: Tensor) -> Tensor:
    """Keep what is strictly greater than theta; in a row where nothing is, keep the largest (all of them if
    tied).

    x: `[..., R, E]` scores or weights, theta and row_max: `[..., R, 1]`. theta of -inf keeps every visible
    key.
    """
    below_max = torch.nextafter(row_max, torch.full_like(row_max, NEG_INF))
    return x > torch.minimum(theta, below_max)


def keep_recent(keep: Tensor, k: int) -> Tensor:
    """Keep only the k most recent of the kept keys `[..., R, E]`."""
    newer = keep.sum(dim=-1, keepdim=True) - keep.cumsum(dim=-1)
    return keep & (newer < k)
