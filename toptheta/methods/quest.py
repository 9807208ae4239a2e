"""Quest: whole pages of keys, chosen for each query by an upper bound of their scores (Tang et al. 2024,
arXiv 2406.10774).

Decode steps only: prompts are dense, as in the official code, and so are the first two layers. The page with
the newest keys is chosen like any other. The budget is max(3, K // page) pages, as in the official code.
Pages begin at the first key of a sequence after padding, so that they do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from toptheta.methods.base import NEG_INF, Block, Method, RowTables, register
from toptheta.methods.top_k import keep_largest
from toptheta.util.errors import UsageError

LEAST_PAGES = 3


@register
@dataclass(frozen=True)
class Quest(Method):
    """page: keys per page. group: the query heads of a KV head choose together, by the sum of their page
    scores (the official code has no shared KV heads: each query head chooses separately). dense_layers: the
    number of first layers that are dense."""

    page: int = 16
    group: bool = False
    dense_layers: int = 2

    name = "quest"
    title = "Quest"
    source = "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774"
    samples_sdc = False
    decode_only = True
    reads_all_keys = False
    stores = "the channel-wise minimum and maximum key of each page: 1/8 of K with pages of 16"

    def leaves_dense(self, layer: int) -> bool:
        return layer < self.dense_layers

    def extra_bytes(self, n: Tensor, kept: Tensor, head_dim: int, element_size: int) -> Tensor:
        return (n + self.page - 1) // self.page * (2 * head_dim * element_size)

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        if not block.decode:
            return block.visible
        assert block.q is not None and block.k is not None
        visible, rows = block.visible[:, 0], block.x.shape[2]  # all heads see the same keys
        if block.own:  # each row sees what the one before sees, and itself
            return self._keep(block.q, block.k, visible, block.budget)
        each = (slice(i, i + 1) for i in range(rows))
        kept = [self._keep(block.q[:, :, at], block.k, visible[:, at], block.budget) for at in each]
        return torch.cat(kept, dim=2)

    def _keep(self, q: Tensor, k: Tensor, visible: Tensor, budget: int) -> Tensor:
        """`[B, H, R, E]` bool. q: `[B, H, R, D]`, k: `[B, H_kv, E, D]`, visible: `[B, R, E]`."""
        num_heads, num_kv_heads = q.shape[1], k.shape[1]
        place = (visible[:, -1].cumsum(dim=-1) - 1).clamp_min(0)
        scores = self._scores(q, k, visible, place)
        if self.group:
            scores = scores.unflatten(1, (num_kv_heads, -1)).sum(dim=2)
        chosen = keep_largest(scores, max(LEAST_PAGES, budget // self.page), earlier=True)
        chosen = chosen.repeat_interleave(num_heads // chosen.shape[1], dim=1)
        page = (place // self.page)[:, None, None].expand(-1, *chosen.shape[1:3], -1)
        return chosen.gather(-1, page) & visible[:, None]

    def _scores(self, q: Tensor, k: Tensor, visible: Tensor, place: Tensor) -> Tensor:
        """Upper bounds of the scores of each page's keys, `[B, H, R, pages]`: the sum over channels of
        max(q * largest k, q * smallest k); -inf for a page of which a row sees no key. In a row's newest page
        only the visible keys count. place: `[B, E]`, the position of each key in its sequence."""
        batch, num_kv_heads, end, head_dim = k.shape
        pages, count = -(-end // self.page), visible.sum(dim=-1)
        newest = (count - 1).clamp_min(0)  # [B, R]
        page = newest // self.page
        # The visible keys in their order, by page; places behind the last one are empty.
        seen, index = visible[:, -1], place.new_zeros(len(place), pages * self.page + 1)
        number = torch.arange(end, device=k.device).expand_as(place)
        index.scatter_(1, place.masked_fill(~seen, pages * self.page), number)
        at = index[:, None, :-1, None].expand(batch, num_kv_heads, -1, head_dim)
        by_page = k.gather(2, at).unflatten(2, (pages, self.page))
        empty = torch.arange(pages * self.page, device=k.device) >= seen.sum(dim=-1, keepdim=True)
        empty = empty.view(-1, 1, pages, self.page, 1)
        of_newest = page[:, None, :, None, None].expand(batch, num_kv_heads, -1, self.page, head_dim)
        inside = torch.arange(self.page, device=k.device) <= (newest % self.page)[..., None]  # [B, R, page]
        grouped = q.view(batch, num_kv_heads, -1, *q.shape[2:])
        whole, newest_page = [], []
        for sign in (1.0, -1.0):  # the largest, and the largest of -k
            keys = (sign * by_page).masked_fill(empty, NEG_INF)
            largest = keys.amax(dim=3)
            part = (sign * grouped).clamp_min(0.0)
            whole.append(part @ largest.masked_fill(largest == NEG_INF, 0.0).transpose(2, 3)[:, :, None])
            own = keys.gather(2, of_newest).masked_fill(~inside[:, None, ..., None], NEG_INF)
            bound = own.amax(dim=3)
            newest_page.append((part * bound.masked_fill(bound == NEG_INF, 0.0)[:, :, None]).sum(dim=-1))
        scores = (whole[0] + whole[1]).flatten(1, 2)
        own_page = page[:, None, :, None].expand(batch, scores.shape[1], -1, 1)
        scores = scores.scatter(-1, own_page, sum(newest_page).flatten(1, 2)[..., None])
        beyond = torch.arange(pages, device=q.device) * self.page >= count[..., None]
        return scores.masked_fill(beyond[:, None], NEG_INF)

    def check(self, flag: Callable[[str], str] = str) -> None:
        if self.page < 1:
            raise UsageError(f"{flag('page')} is {self.page}: give a whole number of keys of at least 1.")
        if self.dense_layers < 0:
            raise UsageError(f"{flag('dense_layers')} is {self.dense_layers}: give a number of at least 0.")
