"""A copy of the keys of a layer in few bits, in the form that kernels read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

ROOM = 256  # keys that a full copy gets room for, in addition to those that come


@dataclass
class KeyCodes:
    """A copy of the first keys of a cache: a key is represented by mean + step * code.

    codes: `[B, H_kv, room, D]` int8 or, in four bits, `[B, H_kv, room, D / 2]`: the low half of byte i is the
    code of channel i, the high half that of channel i + D / 2. steps: `[B, H_kv, room]` bfloat16. mean: `[B,
    H_kv, D]` float32. length: how many keys are coded; of a static cache an upper bound, which decode steps
    do not count. fixed: whether a decode step has used the mean.
    """

    codes: Tensor
    steps: Tensor
    mean: Tensor
    bits: int
    length: int = 0
    fixed: bool = False

    @classmethod
    def around(cls, mean: Tensor, bits: int, room: int = 0, spare: KeyCodes | None = None) -> KeyCodes:
        """Of no keys yet. room: keys of a static cache, for which the tensors keep their addresses; spare:
        such a copy, whose tensors are used again."""
        if spare is not None:
            spare.mean.copy_(mean)
            return cls(spare.codes, spare.steps, spare.mean, bits)
        batch, num_kv_heads, head_dim = mean.shape
        width = head_dim if bits == 8 else (head_dim + 1) // 2
        codes = mean.new_zeros(batch, num_kv_heads, room, width, dtype=torch.int8)
        steps = mean.new_zeros(batch, num_kv_heads, room, dtype=torch.bfloat16)
        if room and not torch.compiler.is_compiling():
            for tensor in (codes, steps, mean):
                torch._dynamo.mark_static_address(tensor)
        return cls(codes, steps, mean, bits)

    def put_at(self, k: Tensor, at: Tensor) -> None:
        """Make `k` `[B, H_kv, M, D]` the keys at the places `at` `[M]` int64, for which there is room."""
        codes, steps = coded(k, self.mean, self.bits)
        self._own()
        self.codes.index_copy_(2, at, codes)
        self.steps.index_copy_(2, at, steps)

    def put(self, k: Tensor, first: int) -> None:
        """Make `k` `[B, H_kv, M, D]` the keys from `first` on, the last ones."""
        codes, steps = coded(k, self.mean, self.bits)
        self.length = first + k.shape[2]
        self._own()
        more = self.length - self.codes.shape[2]
        if more > 0:
            self.codes = pad(self.codes, (0, 0, 0, more + ROOM))
            self.steps = pad(self.steps, (0, more + ROOM))
        self.codes[:, :, first : self.length] = codes
        self.steps[:, :, first : self.length] = steps

    def _own(self) -> None:
        """Outside torch.inference_mode, what was created in it cannot be changed in place."""
        if torch.compiler.is_compiling():  # which cannot ask
            return
        if self.codes.is_inference() and not torch.is_inference_mode_enabled():
            self.codes, self.steps = self.codes.clone(), self.steps.clone()

    def represented(self, length: int) -> Tensor:
        """What the copy of the first keys stands for, `[B, H_kv, length, D]` float32."""
        codes, steps = self.codes[:, :, :length], self.steps[:, :, :length, None]
        if self.bits == 4:
            codes = torch.cat([(codes << 4) >> 4, codes >> 4], dim=-1)[..., : self.mean.shape[-1]]
        return self.mean[:, :, None] + steps.float() * codes

    def crop(self, length: int) -> None:
        """Forget all keys from `length` on; the mean stays."""
        self.length = min(self.length, length)

    def select(self, index: Tensor) -> KeyCodes:
        """Of sequences reordered or repeated: `[new B]` indices of sequences."""
        return self._changed(lambda x: x.index_select(0, index.to(x.device)))

    def repeat(self, repeats: int) -> KeyCodes:
        """Of each sequence repeated, as torch.repeat_interleave does."""
        return self._changed(lambda x: x.repeat_interleave(repeats, dim=0))

    def clone(self) -> KeyCodes:
        return self._changed(Tensor.clone)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> KeyCodes:
        codes, steps, mean = (change(x) for x in (self.codes, self.steps, self.mean))
        return KeyCodes(codes, steps, mean, self.bits, self.length, self.fixed)


def coded(k: Tensor, mean: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and steps of the keys `k` `[B, H_kv, M, D]` around `mean` `[B, H_kv, D]`, as in `KeyCodes`."""
    largest = 2 ** (bits - 1) - 1
    centred = k.float() - mean[:, :, None]
    steps = (centred.abs().amax(dim=-1) / largest).to(torch.bfloat16)
    steps = torch.where(steps > 0.0, steps, 1.0)
    codes = (centred / steps.float()[..., None]).round().clamp(-largest, largest).to(torch.int8)
    if bits == 4:
        half = (codes.shape[-1] + 1) // 2
        low, high = codes[..., :half], codes[..., half:]
        codes = (low & 15) | (pad(high, (0, half - high.shape[-1])) << 4)
    return codes, steps
