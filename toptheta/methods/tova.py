"""TOVA: the keys with the most weight in the last row (Oren et al. 2024, arXiv 2401.06104).

After the prompt, which is dense for any chunking, and after each step, keys are ranked by the weights of the
last row, averaged over all query heads of the layer; the K highest stay, for all heads, and the others are
dropped permanently. A step reads those and its own key, which is ranked like any other, as in the official
code. Keys keep their positions, which is also the default there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toptheta.methods.base import NEG_INF, Block, Method, RowTables, register
from toptheta.methods.state import State, drops_any
from toptheta.methods.top_k import keep_largest
from toptheta.methods.top_theta import keep_recent


@register
@dataclass(frozen=True)
class TOVA(Method):
    """State, each `[B, N]`: last, the mean weights of a sequence's last row; dropped, bool."""

    name = "tova"
    title = "TOVA"
    source = "Transformers are Multi-State RNNs, arXiv 2401.06104"
    has_state = True
    samples_sdc = False
    decode_only = True
    needs_prompt = True
    by_row = False
    reads_all_keys = False
    stores = "nothing: keys are ranked by the weights of the previous step"

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        assert block.state is not None
        x = block.x[:, 0, 0]
        dropped = block.state.tensor("dropped", x, torch.bool)
        if block.decode:
            last = block.state.tensor("last", x)
            seen = block.visible[:, 0, 0]  # all heads see the same keys
            cached = seen & ~keep_recent(seen, 1) & ~dropped
            ranked = last.masked_fill(~cached, NEG_INF)
            dropped |= cached & ~keep_largest(ranked, block.budget, earlier=True)
        return block.visible & ~dropped[:, None, None]

    def prompt_rows(self, budget: int, state: State | None) -> int | None:
        return None if drops_any(state) else 1  # what steps have dropped stays away from a prompt, too

    def after(self, block: Block, weights: Tensor) -> None:
        assert block.state is not None
        mean = weights.detach().mean(dim=1)  # [B, R, E]
        last = block.state.tensor("last", mean[:, 0])
        if block.real is None:
            last.copy_(mean[:, -1])
            return
        numbers = torch.arange(1, mean.shape[1] + 1, device=mean.device)
        row = (block.real * numbers).amax(dim=1).expand(mean.shape[0])  # from 1 on; 0: none
        newest = mean[torch.arange(mean.shape[0], device=mean.device), (row - 1).clamp_min(0)]
        last.copy_(torch.where(row[:, None] > 0, newest, last))
