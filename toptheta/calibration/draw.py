"""Sampling a share of the rows of a prompt."""

from math import ceil

import torch
from torch import Tensor

from toptheta.methods.base import NEG_INF


def draw_rows(eligible: Tensor, seen: Tensor, frac: float, generator: torch.Generator) -> Tensor:
    """Draw ceil(frac * eligible) rows of each sequence without replacement, `[B, Q]` bool.

    The weight of a row is 1 + max(seen) - seen of its length, so that the lengths sampled least so far are
    preferred. Weighted sampling without replacement takes the largest log(weight) + Gumbel noise (Efraimidis
    and Spirakis 2006), without synchronising with the device.
    """
    weight = 1.0 + (seen.amax(dim=-1, keepdim=True) - seen).double()
    uniform = torch.rand(seen.shape, generator=generator, device=seen.device, dtype=torch.float64)
    key = weight.log() - torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    key = key.masked_fill(~eligible, NEG_INF)
    wanted = torch.ceil(frac * eligible.sum(dim=-1, keepdim=True).double() - 1e-9).long()
    rank = key.argsort(dim=-1, descending=True).argsort(dim=-1)
    return eligible & (rank < wanted)


def sample_count(eligible: int, frac: float) -> int:
    """The number of rows that `draw_rows` samples from `eligible` rows."""
    return ceil(frac * eligible - 1e-9)
