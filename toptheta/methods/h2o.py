"""H2O: the heavy hitters, keys with the most weight summed over all rows so far, and the most recent keys
(Zhang et al. 2023, arXiv 2306.14048).

We follow the official generation code (utils_real_drop): after the prompt, which is dense, and after each
step, K keys stay, and a step reads those and its own. The official budgets are shares of the prompt; ours is
K. The official models have as many KV heads as query heads; here each query head drops keys separately. The
weights are summed per sequence, not over the batch. Keys keep their positions; in the official code they get
new ones. The official code for lm-eval has no steps: it selects heavy hitters over the whole prompt, future
rows included. `prefill=causal` is the causal form of that: every row of a prompt is a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from toptheta.methods.base import NEG_INF, Block, Method, RowTables, register
from toptheta.methods.top_k import keep_largest
from toptheta.methods.top_theta import keep_recent
from toptheta.util.errors import UsageError

PREFILLS = ("dense", "causal")


@register
@dataclass(frozen=True)
class H2O(Method):
    """recent: the share of K for the most recent keys (rounded down). prefill: dense, or causal: each row of
    a prompt drops keys as a decode step does, which is computed row by row.

    State, each `[B, H, N]`: sums, each key's weights summed over all rows so far; dropped, bool.
    """

    recent: float = 0.5
    prefill: str = "dense"

    name = "h2o"
    title = "H2O"
    source = "H2O: Heavy-Hitter Oracle, arXiv 2306.14048"
    has_state = True
    samples_sdc = False
    needs_prompt = True
    by_row = False
    reads_all_keys = False
    stores = "4 for each query head of the group: the sum of weights"

    @property
    def decode_only(self) -> bool:  # type: ignore[override]
        return self.prefill == "dense"

    @property
    def prompt_needs_k(self) -> bool:  # type: ignore[override]
        return self.prefill == "causal"

    def extra_bytes(self, n: Tensor, kept: Tensor, head_dim: int, element_size: int) -> Tensor:
        return 4 * kept.sum(dim=-1)  # the sums of what is there

    def rows_of_block(self, rows: int) -> int:
        return 1 if self.prefill == "causal" else rows

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        assert block.state is not None
        x = block.x[:, :, 0]
        dropped = block.state.tensor("dropped", x, torch.bool)
        if block.decode or self.prefill == "causal":  # the block is a single row
            sums = block.state.tensor("sums", x)
            seen = block.visible[:, :, 0]
            cached = seen & ~keep_recent(seen, 1) & ~dropped
            if block.real is not None:
                cached &= block.real[:, None]
            count = int(self.recent * block.budget)
            recent = keep_recent(cached, count)
            left = sums.masked_fill(~cached | recent, NEG_INF)
            heavy = keep_largest(left, block.budget - count, earlier=True)
            dropped |= cached & ~recent & ~heavy
        return block.visible & ~dropped[:, :, None]

    def after(self, block: Block, weights: Tensor) -> None:
        assert block.state is not None
        if block.real is not None:
            weights = weights * block.real[:, None, :, None]
        given = weights.detach().sum(dim=2)
        sums = block.state.tensor("sums", given)
        sums += given

    def check(self, flag: Callable[[str], str] = str) -> None:
        if not 0.0 <= self.recent <= 1.0:
            raise UsageError(f"{flag('recent')} is {self.recent}: give a share of K from 0 to 1.")
        if self.prefill not in PREFILLS:
            raise UsageError(f"{flag('prefill')} is {self.prefill!r}: choose {' or '.join(PREFILLS)}.")
