"""Drawing a share of the rows of a prompt."""

from math import ceil

import torch
from torch import Tensor

from toptheta.methods.base import NEG_INF


def draw_rows(eligible: Tensor, seen: Tensor, frac: float, generator: torch.Generator) -> Tensor:
    """Draw ceil(frac * eligible) rows of each sequence without replacement, `[B, Q]` bool.

    A row's weight is 1 + (most seen - seen) of its length, so that lengths sampled least so far come first.
    Weighted drawing without replacement is the top of log(weight) + Gumbel noise (Efraimidis and Spirakis
    2006); nothing here waits for the device.
    """
    weight = 1.0 + (seen.amax(dim=-1, keepdim=True) - seen).double()
    uniform = torch.rand(seen.shape, generator=generator, device=seen.device, dtype=torch.float64)
    key = weight.log() - torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    key = key.masked_fill(~eligible, NEG_INF)
    wanted = torch.ceil(frac * eligible.sum(dim=-1, keepdim=True).double() - 1e-9).long()
    rank = key.argsort(dim=-1, descending=True).argsort(dim=-1)
    return eligible & (rank < wanted)


def sample_count(eligible: int, frac: float) -> int:
    """How many of `eligible` rows `draw_rows` samples."""
    return ceil(frac * eligible - 1e-9)
