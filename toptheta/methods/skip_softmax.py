"""Skip softmax (BLASST): all tiles of scores except those far below the running maximum (arXiv 2512.12087).

A tile is 128 rows by 128 keys in a prompt, and one row by 128 keys in a decode step, of one query head. From
left to right, a tile is skipped if in each of its rows its largest score is below the running maximum
(including this tile) by at least ln(1 / lambda). Skipped scores are not in the denominator either. The first
tile of a row, and the one with its largest score, are never skipped.

As in a kernel, tiles of rows begin at the first row of a call, so that a prompt computed in chunks that are
not multiples of 128 has other tiles than the whole prompt. Tiles of keys begin at a sequence's first key
after padding; padding rows do not affect a tile. With placement post-softmax the same tiles are dropped, by
the ratio of weights.

lambda: given for each phase, or calibrated for a share S of skipped scores: lambda = a * exp(b * S) / L,
where L is the length of the sequence so far including the whole call, and `fit` finds a and b for each phase.
The paper's S is a share of tiles; ours is a share of scores, which is how all methods are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from toptheta.methods.base import NEG_INF, Block, Method, RowTables, register
from toptheta.util.errors import UsageError

LARGEST_LAMBDA = 1.0 - 1e-6
FITTED = (0.05, 0.95)  # shares outside are uninformative: next to nothing or next to everything is skipped


@register
@dataclass(frozen=True)
class SkipSoftmax(Method):
    """prefill, decode: lambda of each phase. share: if above 0, the share of scores to skip; lambda then
    follows from prefill_a, prefill_b, decode_a and decode_b, which `bench/skip_softmax.py` prints. tile: rows
    and keys of a tile."""

    prefill: float = 1e-3
    decode: float = 1e-4
    share: float = 0.0
    prefill_a: float = 0.0
    prefill_b: float = 0.0
    decode_a: float = 0.0
    decode_b: float = 0.0
    tile: int = 128

    name = "skip_softmax"
    title = "skip softmax"
    source = "BLASST: Dynamic Blocked Attention Sparsity via Softmax Thresholding, arXiv 2512.12087"
    uses_k = False
    by_call = True

    def rows_of_block(self, rows: int) -> int:
        return max(rows // self.tile, 1) * self.tile

    def log_lambda(self, block: Block) -> Tensor | float:
        """ln lambda, a number or `[B or 1, 1, 1 or R, 1]`."""
        if not self.share:
            return math.log(self.decode if block.decode else self.prefill)
        a, b = (self.decode_a, self.decode_b) if block.decode else (self.prefill_a, self.prefill_b)
        assert block.longest is not None
        length = block.n if block.decode else block.longest[:, None]
        found = math.log(a) + b * self.share - length.clamp_min(1).log()
        return found.clamp_max(math.log(LARGEST_LAMBDA))[:, None, :, None]

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        scores = block.x.clamp_min(0.0).log() if block.are_weights else block.x
        batch, num_heads, rows, end = scores.shape
        height = 1 if block.decode else self.tile
        high, wide = -(-rows // height), -(-end // self.tile)
        missing = high * height - rows  # of the last tile
        counted = block.visible[:, 0]  # all heads see the same keys
        if block.real is not None:
            counted = counted & block.real[..., None]
        seen = pad(counted, (0, 0, 0, missing)).view(batch, high, height, end).any(dim=2)
        column = (seen.cumsum(dim=-1) - 1).clamp_min(0) // self.tile
        column = column.repeat_interleave(height, dim=1)[:, None, :rows].expand(-1, num_heads, -1, -1)
        largest = scores.new_full((batch, num_heads, rows, wide), NEG_INF)
        largest = largest.scatter_reduce(3, column, scores, "amax")
        wanted = largest - largest.cummax(dim=-1).values > self.log_lambda(
            block
        )  # False where nothing is seen
        if block.real is not None:
            wanted &= block.real[:, None, :, None]
        by_tile = pad(wanted, (0, 0, 0, missing)).view(batch, num_heads, high, height, wide).any(dim=3)
        return by_tile.repeat_interleave(height, dim=2)[:, :, :rows].gather(3, column) & block.visible

    def check(self, flag: Callable[[str], str] = str) -> None:
        for name in ("prefill", "decode"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise UsageError(f"{flag(name)} is {getattr(self, name)}: give a lambda between 0 and 1.")
        if not 0.0 <= self.share < 1.0:
            raise UsageError(f"{flag('share')} is {self.share}: give a share of scores from 0 to below 1.")
        if self.share and min(self.prefill_a, self.decode_a) <= 0.0:
            raise UsageError(
                f"{flag('share')} {self.share} needs prefill_a, prefill_b, decode_a and decode_b: "
                "bench/skip_softmax.py measures them."
            )
        if self.tile < 1:
            raise UsageError(f"{flag('tile')} is {self.tile}: give a whole number of at least 1.")


def fit(lambdas: Sequence[float], lengths: Sequence[int], shares: Sequence[float]) -> tuple[float, float]:
    """a and b of lambda = a * exp(b * S) / L, by least squares of ln(lambda * L), from the shares S of scores
    that these lambdas skipped at these lengths. Raises UsageError when fewer than two different shares are
    within FITTED."""
    used = [
        (share, math.log(one * length))
        for one, length, share in zip(lambdas, lengths, shares)
        if FITTED[0] <= share <= FITTED[1]
    ]
    x = torch.tensor(used, dtype=torch.float64).reshape(-1, 2)
    if len(x[:, 0].unique()) < 2:
        raise UsageError(
            f"of {len(shares)} measured shares of skipped scores, {len(used)} are between {FITTED[0]} and "
            f"{FITTED[1]}, but two different ones are needed: use longer prompts, or other lambdas."
        )
    share, log = x[:, 0] - x[:, 0].mean(), x[:, 1] - x[:, 1].mean()
    b = float((share * log).sum() / (share * share).sum())
    return math.exp(float(x[:, 1].mean() - b * x[:, 0].mean())), b
