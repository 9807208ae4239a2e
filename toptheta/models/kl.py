"""The divergence between two predictions of the next token."""

import torch
from torch import Tensor

FAR = -20.0  # differences of log p, see `kl_divergence`
IN_CACHE = 1 << 18  # elements that a CPU computes at once, so that its caches hold what is between


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, `[...]`, of log-probabilities `[..., V]` float32.

    Each term is computed as p (gap + expm1(-gap)) with gap = log p - log q, which has the same sum as p gap
    and is never negative. The sum is therefore accurate to a few digits even far below the float32 resolution
    at 1, as between two kernels. Where q is so far above p that the exponential could overflow, the same is
    q - p + p gap.
    """
    shape = log_p.shape
    log_p, log_q = log_p.reshape(-1, shape[-1]), log_q.reshape(-1, shape[-1])
    rows = IN_CACHE // shape[-1] if log_p.device.type == "cpu" else len(log_p)
    parts = [_sums(*block) for block in zip(log_p.split(max(1, rows)), log_q.split(max(1, rows)))]
    return torch.cat(parts).reshape(shape[:-1])


def _sums(log_p: Tensor, log_q: Tensor) -> Tensor:
    p, gap = log_p.exp(), log_p - log_q
    terms = torch.expm1(-gap).add_(gap).mul_(p)
    far = gap < FAR
    if bool(far.any()):
        terms = torch.where(far, log_q.exp() - p + p * gap, terms)
    return terms.sum(dim=-1)
