"""A dynamic cache with room for the keys to come: a decode step writes its own key and value, where a stock
DynamicCache copies the keys and values of all tokens (torch.cat).

For generation without gradients. What a layer returns are views of its memory, the leading part of it.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

LEAST_ROOM, SHARE = 256, 8  # tokens, and of those there are: a token is copied some SHARE times in all


class GrowingLayer(DynamicLayer):
    """A DynamicLayer that grows in place, as far as its memory goes."""

    keys: Tensor
    values: Tensor

    _room: tuple[Tensor, Tensor] | None = None  # `[B, H_kv, R, D]`, whose leading parts are keys and values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and key_states.requires_grad:  # what was read must not change afterwards
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if not self._has_room(stop):
            size = stop + max(LEAST_ROOM, stop // SHARE)
            news = (key_states, value_states)
            room = tuple(new.new_empty(*new.shape[:2], size, new.shape[3]) for new in news)
            if start:
                room[0][:, :, :start] = self.keys
                room[1][:, :, :start] = self.values
            self._room = room  # type: ignore[assignment]
        assert self._room is not None
        for memory, new in zip(self._room, (key_states, value_states)):
            memory[:, :, start:stop] = new
        self.keys, self.values = (memory[:, :, :stop] for memory in self._room)
        return self.keys, self.values

    def _has_room(self, stop: int) -> bool:
        """Whether keys and values are still the leading part of the memory: sequences may have been selected,
        repeated or reordered, or moved to another device."""
        if self._room is None or stop > self._room[0].shape[2] or not self.get_seq_length():
            return False
        compiling = torch.compiler.is_compiling()  # cannot ask
        if not compiling and self._room[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # there it cannot be changed in place
        return all(
            memory.data_ptr() == own.data_ptr() and memory.shape[0] == own.shape[0]
            for memory, own in zip(self._room, (self.keys, self.values))
        )

    def reset(self) -> None:
        super().reset()
        self._room = None


def growing_cache(config: Any) -> DynamicCache:
    """An empty DynamicCache for a model; its layers grow in place, but for those with a sliding window."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def own_copy(cache: Cache) -> Cache:
    """A copy that shares the tensors there are, but writes none of them."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in own.layers:
        if isinstance(layer, GrowingLayer):
            layer._room = None
    return own
