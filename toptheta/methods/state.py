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
    cropped, reordered and repeated with the cache. numbers: other values, such as the prompt's length;
    'chosen': how many keys there were when a single step chose what is dropped. chosen_by: tensors that this
    step took out of `tensors`; they come back if it is cropped. weighed_by: what the values of 'factor' were
    weighed by.
    key_codes: a quantized copy of the keys, which follows the cache, too. owner: the method whose state it
    is; another method starts with an empty state.

    Of a static cache, which cannot say how many keys it holds without waiting for the device: room, how many
    it can hold (0: it is another cache); end: `[]` int64, how many it holds; uncoded: that `key_codes` lacks
    at most the last so many of them; spare: the memory of an earlier `key_codes`.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    key_codes: KeyCodes | None = None
    owner: object = None
    room: int = 0
    end: Tensor | None = None
    uncoded: int = 0
    spare: KeyCodes | None = None
    weighed_by: object = None
    chosen_by: dict[str, Tensor] = field(default_factory=dict)

    def came(self, num_keys: int, end: Tensor) -> None:
        """`num_keys` keys came to a static cache, which now holds `end`."""
        self.uncoded, self.end = min(self.uncoded + num_keys, self.room), end

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
        if length < self.numbers.get("chosen", 0):  # the step that dropped keys for good is taken back
            del self.tensors["dropped"], self.numbers["chosen"]
            self.tensors |= {name: x[..., :length] for name, x in self.chosen_by.items()}
            self.chosen_by = {}
        if "weighed" in self.numbers:
            self.numbers["weighed"] = min(self.numbers["weighed"], length)
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
        for tensors in (self.tensors, self.chosen_by):
            tensors |= {name: x.index_select(0, index.to(x.device)) for name, x in tensors.items()}
        if self.key_codes is not None:
            self.key_codes = self.key_codes.select(index)

    def repeat(self, repeats: int) -> None:
        """Repeat each sequence, as torch.repeat_interleave does."""
        for tensors in (self.tensors, self.chosen_by):
            tensors |= {name: x.repeat_interleave(repeats, dim=0) for name, x in tensors.items()}
        if self.key_codes is not None:
            self.key_codes = self.key_codes.repeat(repeats)

    def clone(self) -> State:
        """A copy of the state that shares no memory with it."""
        tensors = {name: x.clone() for name, x in self.tensors.items()}
        key_codes = None if self.key_codes is None else self.key_codes.clone()
        more = (self.owner, self.room, self.end, self.uncoded)
        chosen_by = {name: x.clone() for name, x in self.chosen_by.items()}
        return State(tensors, dict(self.numbers), key_codes, *more, None, self.weighed_by, chosen_by)

    def clear(self) -> None:
        self.tensors, self.numbers, self.key_codes, self.owner = {}, {}, None, None
        self.chosen_by = {}
        self.uncoded, self.spare = self.room, None

    def reset(self) -> None:
        """Clear the state of a cache that was emptied. A static one keeps its tensors, so does the copy of
        its keys."""
        copy, owner = self.key_codes or self.spare, self.owner
        self.clear()
        if self.room:
            self.owner, self.uncoded, self.spare = owner, 0, copy

    def seen_by(self, method: object) -> bool:
        """Whether `method` has computed any row with this state."""
        return self.owner == method and bool(self.tensors)

    def belong_to(self, method: object) -> None:
        """Clear the state if it is that of another method."""
        if self.owner != method:
            if self.owner is not None:
                self.clear()
            self.owner = method


def drops_any(state: State | None) -> bool:
    """Whether a key was dropped for good, by the tensor of that name."""
    return state is not None and "dropped" in state.tensors and bool(state.tensors["dropped"].any())
