"""What a method keeps from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toptheta.methods.key_codes import KeyCodes


@dataclass
class State:
    """The state of a method from step to step, for one layer of a cache.

    tensors: by name, `[B, ..., N]`: sequences first, keys last, one entry for each key of the cache. They are
    cropped, reordered and repeated with the cache. numbers: other values, such as the prompt's length.
    key_codes: a quantized copy of the keys, which follows the cache, too. owner: the method whose state it
    is; another method starts with an empty state.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    key_codes: KeyCodes | None = None
    owner: object = None

    def tensor(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of this name over the first E keys, as a view that may be changed in place; created with
        zeros (False) if there is none. like: `[B, ..., E]`, for shape and device; dtype: default that of
        `like`."""
        end = like.shape[-1]
        if name not in self.tensors:
            self.tensors[name] = like.new_zeros(like.shape, dtype=dtype or like.dtype)
        self.grow(end)
        return self.tensors[name][..., :end]

    def crop(self, length: int) -> None:
        """Remove all keys from `length` on."""
        self.tensors = {name: x[..., :length] for name, x in self.tensors.items()}
        if self.key_codes is not None:
            self.key_codes.crop(length)

    def grow(self, length: int, value: float | bool = 0) -> None:
        """Extend the tensors to `length` keys, with `value` for the new ones."""
        for name, x in self.tensors.items():
            if length > x.shape[-1]:
                grown = x.new_full((*x.shape[:-1], length), value)
                grown[..., : x.shape[-1]] = x
                self.tensors[name] = grown

    def select(self, index: Tensor) -> None:
        """Reorder or repeat the sequences. index: `[new B]` indices of sequences."""
        self.tensors = {name: x.index_select(0, index.to(x.device)) for name, x in self.tensors.items()}
        if self.key_codes is not None:
            self.key_codes = self.key_codes.select(index)

    def repeat(self, repeats: int) -> None:
        """Repeat each sequence, as torch.repeat_interleave does."""
        self.tensors = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.tensors.items()}
        if self.key_codes is not None:
            self.key_codes = self.key_codes.repeat(repeats)

    def clone(self) -> State:
        """A copy of the state that shares no memory with it."""
        tensors = {name: x.clone() for name, x in self.tensors.items()}
        key_codes = None if self.key_codes is None else self.key_codes.clone()
        return State(tensors, dict(self.numbers), key_codes, self.owner)

    def clear(self) -> None:
        self.tensors, self.numbers, self.key_codes, self.owner = {}, {}, None, None

    def belong_to(self, method: object) -> None:
        """Clear the state if it is that of another method."""
        if self.owner != method:
            self.clear()
            self.owner = method
