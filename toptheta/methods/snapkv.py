"""SnapKV: the prompt keys with the most weight in the prompt's last rows, and all keys from there on (Li et
al. 2024, arXiv 2404.14469).

The prompt is dense. If it is longer than K, then before the first step each head permanently drops all but
the last `window` keys and the K - window other keys with the largest score: the sum of a key's weights in the
last `window` rows, pooled over its neighbours. All generated keys stay. We follow the official code, where
each query head chooses separately although the KV heads are shared, in its configuration for LongBench
(window 32, max pooling over 7; the class's own defaults are 64 and mean pooling over 5). Padding and the
window's keys are excluded from the pooling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from toptheta.methods.base import NEG_INF, Block, Method, RowTables, register
from toptheta.methods.state import State, drops_any
from toptheta.methods.top_k import keep_largest
from toptheta.methods.top_theta import keep_recent
from toptheta.util.errors import UsageError

POOLS: dict[str, Callable[..., Tensor]] = {"max": max_pool1d, "mean": avg_pool1d}


@register
@dataclass(frozen=True)
class SnapKV(Method):
    """window: the number of last rows, and last keys, of the prompt, at most K - 1. pool_size: keys that are
    pooled, an odd number; pool: max or mean. group: the query heads of a KV head choose together, by their
    mean score.

    State, `[B, H, ..., N]`: until the first step window, the weights of a sequence's last rows so far, the
    newest last; from then on dropped, bool.
    """

    window: int = 32
    pool_size: int = 7
    pool: str = "max"
    group: bool = False

    name = "snapkv"
    title = "SnapKV"
    source = "SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469"
    has_state = True
    samples_sdc = False
    decode_only = True
    needs_prompt = True
    reads_all_keys = False

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        state = block.state
        assert state is not None
        if block.decode and "dropped" not in state.tensors:
            seen = block.visible[:, :, 0]
            groups = 1 if block.k is None else block.k.shape[1]
            self._drop(state, seen & ~keep_recent(seen, 1), block.budget, groups)
        if "dropped" not in state.tensors:
            return block.visible
        return block.visible & ~state.tensor("dropped", block.x[:, :, 0])[:, :, None]

    def _drop(self, state: State, prompt: Tensor, budget: int, groups: int) -> None:
        """Drop keys of the prompt, `[B, H, E]` bool."""
        end, size = prompt.shape[-1], self._size(budget)
        rows = state.tensors.pop("window", None)
        if rows is None:  # a call of its own, without a cache: nothing is known of the keys
            rows = prompt.new_zeros(1, 1, 1, end, dtype=torch.float32)
        else:
            state.chosen_by["window"] = rows
        window = keep_recent(prompt, size)
        others = prompt & ~window
        scores = rows[..., :end].sum(dim=2).masked_fill(~others, 0.0)
        if self.group:
            mean = scores.unflatten(1, (groups, -1)).mean(dim=2)
            scores = mean.repeat_interleave(scores.shape[1] // groups, dim=1)
        pooled = POOLS[self.pool](scores, self.pool_size, stride=1, padding=self.pool_size // 2)
        heavy = keep_largest(pooled.masked_fill(~others, NEG_INF), budget - size, earlier=True)
        state.tensors["dropped"], state.numbers["chosen"] = others & ~heavy, end

    def prompt_rows(self, budget: int, state: State | None) -> int | None:
        # What steps have dropped stays away from a prompt, too.
        return None if drops_any(state) else self._size(budget)

    def after(self, block: Block, weights: Tensor) -> None:
        state = block.state
        assert state is not None
        if block.decode or "dropped" in state.tensors:
            return
        weights, size = weights.detach(), self._size(block.budget)
        old = state.tensor("window", weights.new_zeros(1).expand(*weights.shape[:2], size, weights.shape[3]))
        rows = torch.cat([old, weights], dim=2)
        if block.real is None:
            old.copy_(rows[:, :, -size:])
            return
        real = torch.cat([block.real.new_ones(block.real.shape[0], size), block.real], dim=1)
        chosen = keep_recent(real, size).expand(rows.shape[0], -1)  # `size` of each sequence
        at = chosen.nonzero()[:, 1].view(-1, 1, size, 1)
        old.copy_(rows.gather(2, at.expand(-1, rows.shape[1], -1, rows.shape[3])))

    def _size(self, budget: int) -> int:
        return max(1, min(self.window, budget - 1))

    def check(self, flag: Callable[[str], str] = str) -> None:
        if self.window < 1:
            raise UsageError(f"{flag('window')} is {self.window}: give a whole number of at least 1.")
        if self.pool_size < 1 or self.pool_size % 2 == 0:
            raise UsageError(f"{flag('pool_size')} is {self.pool_size}: give an odd number of keys.")
        if self.pool not in POOLS:
            raise UsageError(f"{flag('pool')} is {self.pool!r}: choose {' or '.join(POOLS)}.")
