"""StreamingLLM: the first keys, which act as attention sinks, and the most recent ones (Xiao et al. 2023,
arXiv 2309.17453).

The official code assigns new positions to the keys in its cache; here every key keeps its own, so that only
the selection is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toptheta.methods.base import Block, Method, RowTables, register
from toptheta.util.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class StreamingLLM(Method):
    """sinks: how many of the K kept keys are the first visible keys of a row, at most K - 1; the others are
    the most recent."""

    sinks: int = 4

    name = "streaming_llm"
    title = "StreamingLLM"
    reads_all_keys = False
    source = "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        visible = block.visible[:, :1]  # all heads see the same keys
        sinks = min(self.sinks, block.budget - 1)
        place = visible.cumsum(dim=-1)  # among the row's visible keys, from 1 on: padding has none
        recent = place > block.n[:, None, :, None] - (block.budget - sinks)
        return (visible & ((place <= sinks) | recent)).expand_as(block.x)

    def check(self, flag: Callable[[str], str] = str) -> None:
        if self.sinks < 0:
            raise UsageError(f"{flag('sinks')} is {self.sinks}: give a whole number of at least 0.")

    def check_k(self, k: int, flag: Callable[[str], str] = str) -> None:
        if k <= self.sinks:
            raise UsageError(
                f"{flag('K')} {k} leaves no recent key next to the {self.sinks} sinks of streaming_llm: give "
                "more, or fewer sinks."
            )
