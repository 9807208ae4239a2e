"""Top-k: the K largest scores or weights of each row; the oracle that Top-theta approximates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toptheta.methods.base import NEG_INF, Block, KernelSpec, Method, RowTables, Selection, register


@register
@dataclass(frozen=True)
class TopK(Method):
    name = "top_k"
    title = "Top-k"
    source = "Gupta et al. 2021, arXiv 2106.06899; the baseline of arXiv 2502.08363"
    mode = 1

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        return keep_largest(block.x, block.budget)

    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(Selection.LARGEST)


def keep_largest(x: Tensor, k: int, earlier: bool = False) -> Tensor:
    """Keep the k largest of `x` `[..., E]`; exactly k, also with ties. -inf (not visible) is never kept.
    earlier: among ties keep the earlier keys, on every device; otherwise unspecified."""
    if k >= x.shape[-1]:
        return x > NEG_INF
    if k <= 0:
        return torch.zeros_like(x, dtype=torch.bool)
    if earlier:
        least = x.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        return keep_first(x, least, k) & (x > NEG_INF)
    index = x.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, index, True) & (x > NEG_INF)


def keep_first(x: Tensor, least: Tensor, count: Tensor | int) -> Tensor:
    """Keep `count` of `x` `[..., E]`: all above `least`, and the first of those that equal it. least: `[...,
    1]`, the value of the last one kept; count: `[..., 1]`."""
    above, tied = x > least, x == least
    return above | (tied & (tied.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))
