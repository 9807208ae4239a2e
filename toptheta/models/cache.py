"""A static cache that also keeps what a decode step would otherwise compute from all of K and V: the sum of
V, for V-mean compensation; the relative norms of values, for value-aware thresholds; and an int8 copy of K
(kernels/int8_keys.py).

These tensors have fixed addresses and are changed in place, like the keys and values, so that torch.compile
and CUDA graphs work. For other caches value_sum.py keeps the sum; the int8 copy needs this cache.
"""

import operator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

from toptheta.attention.call import Int8Keys
from toptheta.attention.rows import Rows
from toptheta.kernels.int8_keys import quantized
from toptheta.kernels.triton import cache_updates
from toptheta.kernels.triton.backend import HAS_TRITON, INTERPRETED
from toptheta.methods.base import ValueNorms
from toptheta.util.errors import UsageError


class TopThetaLayer(StaticLayer):
    """One layer of a TopThetaCache. int8: the copy of the keys, or None; factor: `[B, H, N]` float32, the
    relative norm of each key's value, or None."""

    def __init__(self, max_cache_len: int, two_tier: bool = False):
        super().__init__(max_cache_len)
        self.two_tier = two_tier
        self.int8: Int8Keys | None = None
        self.factor: Tensor | None = None
        self.weighing: ValueNorms | None = None  # what the caller of `update` weighs values by
        self._weighed_by: ValueNorms | None = None  # what all entries of `factor` were weighed by
        self._empty = True
        self.summing = False  # whether the caller of `update` will ask for the sum
        self._sum: Tensor  # `[B, H_kv, D]` float64, of all visible rows of V if `_known`
        self._known = True
        self._new: Tensor | None = None  # rows of V that are not in the sum yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.two_tier and (not HAS_TRITON or key_states.device.type != "cuda" and not INTERPRETED):
            raise UsageError("TopThetaCache: two_tier=True needs a GPU and Triton; leave it out.")
        super().lazy_initialization(key_states, value_states)
        batch, num_kv_heads, first, head_dim = key_states.shape
        options: dict[str, Any] = {"device": key_states.device}
        self._sum = torch.zeros(batch, num_kv_heads, head_dim, dtype=torch.float64, **options)
        self._finished = torch.zeros(1, dtype=torch.int32, **options)
        fixed = [self._sum]
        if self.two_tier:
            shape = (batch, num_kv_heads, self.max_cache_len)
            codes = torch.zeros(*shape, head_dim, dtype=torch.int8, **options)
            steps, slacks = (torch.zeros(shape, **options) for _ in range(2))
            # The copy is around the mean of the first keys from here on; around 0 if it begins without any.
            mean = key_states.float().mean(dim=2) if first else key_states.new_zeros(*shape[:2], head_dim)
            self.int8 = Int8Keys(codes, steps, slacks, mean.float())
            fixed += [codes, steps, slacks, self.int8.mean]
        if not torch.compiler.is_compiling():
            for tensor in fixed:
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        by_kernel = cache_updates.appends(key_states, value_states)
        if self.int8 is not None and not by_kernel:
            at = torch.arange(key_states.shape[2], device=self.device) + self.cumulative_length
            new = quantized(key_states, self.int8.mean)
            self.int8.codes.index_copy_(2, at, new.codes)
            self.int8.steps.index_copy_(2, at, new.steps)
            self.int8.slacks.index_copy_(2, at, new.slacks)
        if not self.summing or self._new is not None:  # these rows, or the last ones, never come to the sum
            self._known = False
        self._new = value_states.detach() if self.summing else None
        if by_kernel:
            copy = self.int8
            tiers = (None,) * 4 if copy is None else (copy.codes, copy.steps, copy.slacks, copy.mean)
            whole = (self.keys, self.values, self.cumulative_length, self._finished)
            cache_updates.append(key_states.detach(), value_states.detach(), *whole, *tiers)
        else:
            super().update(key_states, value_states, *args, **kwargs)
        self._weigh(value_states)
        return self.keys, self.values

    def _weigh(self, new: Tensor) -> None:
        """Keep `factor` up to date after an update by the rows `new` `[B, H_kv, M, D]` of V."""
        by, empty, self._empty = self.weighing, self._empty, False
        if by is None:
            self._weighed_by = None
            return
        if self._weighed_by is not by:
            # Of an empty cache the new rows suffice; else rows came that were not weighed, or in another way.
            shape = (self.values.shape[0], by.gram.shape[0], self.max_cache_len)
            anew = torch.zeros(shape, device=new.device) if empty else by.of(self.values)
            if self.factor is not None and self.factor.shape == anew.shape:
                self.factor.copy_(anew)
            else:
                self.factor = anew
                if not torch.compiler.is_compiling():
                    torch._dynamo.mark_static_address(anew)
            self._weighed_by = by
        assert self.factor is not None
        at = torch.arange(new.shape[2], device=new.device) + (self.cumulative_length - new.shape[2])
        self.factor.index_copy_(2, at, by.of(new))

    def at(self, value: Tensor, rows: Rows) -> Tensor | None:
        """`[B, H_kv, D]` float32, sum of V over the visible keys of the only row, or None for more rows.

        Call it once after `update`. value: the cache's V, `[B, H_kv, N, D]`. Under torch.compile masks are
        assumed to be causal, apart from padding.
        """
        new, self._new = self._new, None
        q_len, mask = rows.n.shape[1], rows.mask
        if not rows.causal and not torch.compiler.is_compiling():
            self._known = False
            return None
        if self._known:
            assert new is not None
            if cache_updates.appends(new, new):
                return cache_updates.add_value(self.values, self.cumulative_length, mask, self._sum)
            if mask is not None:  # what is real sees itself
                at = torch.arange(q_len, device=new.device) + (self.cumulative_length - q_len)
                real = mask[:, 0].gather(-1, at[None, :, None].expand(mask.shape[0], -1, 1))
                new = torch.where(real[:, None], new, 0.0)
            self._sum.add_(new.sum(dim=2, dtype=torch.float64))
        elif q_len == 1:
            seen = value.detach()
            seen = seen if mask is None else torch.where(mask[:, :, 0, :, None], seen, 0.0)
            self._sum.copy_(seen.sum(dim=2, dtype=torch.float64))
            self._known = True
        return self._sum.float() if q_len == 1 else None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` keys, at most all: their memory is hidden, and overwritten by
        the next keys. Raises ValueError for a positive number, as other caches do."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number, of tokens to remove.")
        if tokens_to_remove < 0 and self.is_initialized:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
            self._known = False

    def reset(self) -> None:
        super().reset()
        self._known, self._new = True, None
        self._weighed_by, self._empty = None, True
        if self.is_initialized:
            self._sum.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._known = False
        if self.factor is not None:
            self.factor = self.factor.index_select(0, beam_idx.to(self.factor.device))
        if self.int8 is not None:
            old = self.int8
            parts = (old.codes, old.steps, old.slacks, old.mean)
            self.int8 = Int8Keys(*(part.index_select(0, beam_idx.to(part.device)) for part in parts))


class TopThetaCache(StaticCache):
    """A StaticCache for `model(..., past_key_values=cache)` or `model.generate(..., past_key_values=cache)`:
    decode steps with VMC read only the V rows that they keep. Layers with a sliding window are those of a
    StaticCache. On a GPU a step beyond `max_cache_len` is dropped in silence, unless TRITON_DEBUG=1.

    two_tier: also keep an int8 copy of K, which lets a decode step with thresholds on scores read K only
    where the copy leaves it open whether a key is kept; what is kept stays the same. It costs head_dim + 8
    bytes for each token and KV head. GPUs with Triton only: raises UsageError elsewhere, at the first use.

    Raises UsageError for another object than the model's config, and for a length that is not above 0.
    """

    def __init__(self, config: PretrainedConfig, max_cache_len: int, two_tier: bool = False):
        if not isinstance(config, PretrainedConfig):
            raise UsageError(
                f"TopThetaCache: config is of type {type(config).__name__}: give the model's config, as in "
                "TopThetaCache(model.config, 4096)."
            )
        try:
            length = operator.index(max_cache_len)
        except TypeError:
            length = 0
        if length < 1:
            raise UsageError(
                f"TopThetaCache: max_cache_len is {max_cache_len!r}, but must be a whole number of tokens "
                "above 0."
            )
        stock: Any = StaticCache(config=config, max_cache_len=length)
        Cache.__init__(
            self,
            layers=[
                TopThetaLayer(length, two_tier) if type(layer) is StaticLayer else layer
                for layer in stock.layers
            ],
        )
