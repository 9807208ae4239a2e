"""Top-p: the smallest set of keys whose weights sum to at least p; the oracle of Twilight (Lin et al. 2025,
arXiv 2502.02770).

Twilight estimates the weights of keys that another method has preselected from 4-bit keys, and finds the
threshold by bisection. Here the weights are exact and cover all visible keys, and the set is the smallest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toptheta.methods.base import Block, Method, RowTables, register
from toptheta.methods.top_k import keep_first
from toptheta.util.errors import UsageError


@register
@dataclass(frozen=True)
class TopP(Method):
    """p: the minimum share of a row's weight that is kept. Nothing else limits what a row keeps, so there is
    no K."""

    p: float = 0.85

    name = "top_p"
    title = "Top-p"
    source = "Twilight, arXiv 2502.02770, without its estimator"
    uses_k = False

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        weights = block.weights.detach()
        largest = sorted_values(weights).flip(-1)
        before = largest.cumsum(dim=-1, dtype=torch.float64) - largest  # of all that are larger
        count = (before < self.p).sum(dim=-1, keepdim=True)
        return keep_first(weights, largest.gather(-1, count - 1), count) & block.visible

    def check(self, flag: Callable[[str], str] = str) -> None:
        if not 0.0 < self.p <= 1.0:
            raise UsageError(f"{flag('p')} is {self.p}: give a share of the weight above 0 and up to 1.")


def sorted_values(x: Tensor) -> Tensor:
    """`x` sorted along its last dimension, without indices: on a CPU numpy takes a tenth of torch's time."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(dim=-1).values
