"""The divergence between two predictions of the next token."""

import torch
from torch import Tensor

SMALL = 0.5  # differences of log p, see `kl_divergence`


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, `[...]`, of log-probabilities `[..., V]` float32.

    Each term is computed as q - p + p (log p - log q), which has the same sum and is never negative; where q
    is near p, as p (gap + expm1(-gap)) with gap = log p - log q. The sum is therefore accurate to a few
    digits even far below the float32 resolution at 1, as between two kernels.
    """
    p, gap = log_p.exp(), log_p - log_q
    terms = torch.where(gap.abs() < SMALL, p * (gap + torch.expm1(-gap)), log_q.exp() - p + p * gap)
    return terms.sum(dim=-1)
