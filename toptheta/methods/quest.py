"""Quest: whole pages of keys, chosen for each query by what their keys could score at most (Tang et al. 2024,
arXiv 2406.10774).

Decode steps only: prompts are dense, as in the official code, and so are the first two layers. The page of
the newest keys is chosen like any other. The budget is max(3, K // page) pages, as in the official code.
Pages begin at the first key of a sequence, padding aside, so that they do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from toptheta.methods.base import NEG_INF, Block, Method, RowTables, register
from toptheta.methods.top_k import keep_largest
from toptheta.util.errors import UsageError

LEAST_PAGES = 3


@register
@dataclass(frozen=True)
class Quest(Method):
    """page: keys of a page. group: the heads of a KV head choose together, by the sum of their page scores
    (the official code has no shared KV heads: each query head chooses for itself). dense_layers: how many of
    the first layers are dense."""

    page: int = 16
    group: bool = False
    dense_layers: int = 2

    name = "quest"
    title = "Quest"
    source = "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774"
    samples_sdc = False
    decode_only = True
    by_row = False
    reads_all_keys = False
    stores = "the largest and smallest key of each page: as much as K / 8 with pages of 16"

    def leaves_dense(self, layer: int) -> bool:
        return layer < self.dense_layers

    def extra_bytes(self, n: Tensor, kept: Tensor, head_dim: int, element_size: int) -> Tensor:
        return (n + self.page - 1) // self.page * (2 * head_dim * element_size)

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        if not block.decode:
            return block.visible
        assert block.q is not None and block.k is not None
        batch, num_heads, _, end = block.x.shape
        num_kv_heads = block.k.shape[1]
        visible = block.visible[:, 0, 0]  # all heads see the same keys
        page, pages = self._pages(visible)
        scores = self._scores(block.q[:, :, 0], block.k, visible, page, pages)
        if self.group:
            scores = scores.view(batch, num_kv_heads, -1, pages).sum(dim=2)
        chosen = keep_largest(scores, max(LEAST_PAGES, block.budget // self.page), earlier=True)
        chosen = chosen.repeat_interleave(num_heads // chosen.shape[1], dim=1)
        keep = chosen.gather(-1, page[:, None].expand(-1, num_heads, -1)) & visible[:, None]
        return keep[:, :, None]

    def _pages(self, visible: Tensor) -> tuple[Tensor, int]:
        """The page of each key, `[B, E]`, and how many there are: of visible `[B, E]`, in order."""
        place = (visible.cumsum(dim=-1) - 1).clamp_min(0)
        return place // self.page, -(-visible.shape[-1] // self.page)

    def _scores(self, q: Tensor, k: Tensor, visible: Tensor, page: Tensor, pages: int) -> Tensor:
        """Upper bounds of the scores of each page's keys, `[B, H, pages]`, -inf for a page without keys: the
        sum over channels of max(q * largest k, q * smallest k). q: `[B, H, D]`, k: `[B, H_kv, E, D]`."""
        batch, num_kv_heads, _, head_dim = k.shape
        index = page[:, None, :, None].expand_as(k)
        bounds = []
        for how, neutral in (("amax", NEG_INF), ("amin", -NEG_INF)):
            start = k.new_full((batch, num_kv_heads, pages, head_dim), neutral)
            hidden = k.masked_fill(~visible[:, None, :, None], neutral)
            bounds.append(start.scatter_reduce(2, index, hidden, how))
        exists = bounds[0][..., 0] > NEG_INF
        largest, smallest = (bound.masked_fill(~exists[..., None], 0.0).transpose(2, 3) for bound in bounds)
        grouped = q.view(batch, num_kv_heads, -1, head_dim)
        scores = grouped.clamp_min(0.0) @ largest + grouped.clamp_max(0.0) @ smallest
        return scores.masked_fill(~exists[:, :, None], NEG_INF).view(batch, -1, pages)

    def check(self, flag: Callable[[str], str] = str) -> None:
        if self.page < 1:
            raise UsageError(f"{flag('page')} is {self.page}: give a whole number of keys of at least 1.")
        if self.dense_layers < 0:
            raise UsageError(f"{flag('dense_layers')} is {self.dense_layers}: give a number of at least 0.")
