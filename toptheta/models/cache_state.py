"""What a method remembers, kept on the layers of a cache: it follows when the cache is cropped, reordered,
repeated, copied or reset.
"""

from functools import cache
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

from toptheta.methods.state import State
from toptheta.models.growing_cache import own_copy
from toptheta.util.errors import UsageError


@cache
def _following(kind: Any) -> type:
    """A subclass of a cache layer's class that applies all changes of the keys to `method_state` too."""

    class Following(kind):
        method_state: State

        def update(self, key_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
            updated = super().update(key_states, *args, **kwargs)
            if isinstance(self, StaticLayer):
                self.method_state.came(key_states.shape[2], self.cumulative_length)
            return updated

        def crop(self, *args, **kwargs) -> None:
            super().crop(*args, **kwargs)
            self.method_state.crop(int(self.get_seq_length()))

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.method_state.select(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.method_state.select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.method_state.repeat(repeats)

        def reset(self) -> None:
            super().reset()
            self.method_state.reset()

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _new_following, (kind,), self.__dict__

    return Following


def _new_following(kind: type) -> Any:
    """An instance without attributes, for pickle."""
    return object.__new__(_following(kind))


def state_of_layer(cache_: Cache | None, layer_idx: int) -> State:
    """The method's state for layer `layer_idx` of this call's cache; without a cache, a new state for this
    call only. Raises UsageError for a sliding-window cache, which drops keys by itself."""
    if cache_ is None:
        return State()
    layer: Any = cache_.layers[layer_idx]
    if not hasattr(layer, "method_state"):
        if getattr(layer, "is_sliding", False):
            raise UsageError(
                f"layer {layer_idx} has a sliding-window cache, which methods with state per key do not "
                f"support: use another method, or leave such layers dense (K={{{layer_idx}: 0}})."
            )
        layer.__class__ = _following(type(layer))  # type: ignore[arg-type]
        layer.method_state = State()
        if isinstance(layer, StaticLayer):
            room = layer.max_cache_len
            layer.method_state = State(room=room, uncoded=room if layer.is_initialized else 0)
            layer.method_state.end = layer.cumulative_length
    return layer.method_state


def branch(cache_: Cache, batch: int) -> Cache:
    """A cache of `batch` sequences that all begin with the only sequence of `cache_`, a DynamicCache, which
    is not changed."""
    own = _own(cache_)
    if batch > 1:
        own.batch_repeat_interleave(batch)
    return own


def selected(cache_: Cache, index: Tensor) -> Cache:
    """A cache of the sequences `index` of `cache_`, a DynamicCache, which is not changed."""
    own = _own(cache_)
    own.batch_select_indices(index.cpu())  # layers may be on several devices
    return own


def _own(cache_: Cache) -> Cache:
    own = own_copy(cache_)
    for layer in own.layers:
        state = getattr(layer, "method_state", None)
        if state is not None:
            layer.method_state = state.clone()
    return own
