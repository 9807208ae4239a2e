"""Rows: which keys each query sees, how many, and which queries are not padding.

A mask of None is the plain causal mask of an unpadded batch, for which no `[Q, KV]` tensor is created.
"""

import copy
import weakref
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from toptheta.util.errors import UsageError

# In an additive mask, a value as low as this hides a key; one between this and 0 is a bias.
HIDDEN = -1e4

# The Rows of every mask in use, without a bool mask itself, which would keep its own key alive. transformers
# creates a mask once for all layers and passes only the tensor to each of them, so that what is derived from
# it can be shared between layers only here.
_rows_of_mask = WeakTensorKeyDictionary()


@dataclass
class _Derived:
    """What is computed from Rows once for all layers."""

    first: Tensor | None = None
    span: Tensor | None = None
    continued: tuple[weakref.ref[Tensor], int, bool] | None = None
    examined: list[int] | None = None


@dataclass
class Rows:
    """Visibility of the keys for a batch of query rows.

    n: `[B or 1, Q]` int64, the number of visible keys of each row.
    real: `[B or 1, Q]` bool, rows that are not padding (None: all).
    mask: `[B, 1, Q, KV]` bool, True = visible; None: plain causal (row i sees keys 0 to i; a single row sees
    every key).
    first: position of the first query among the keys if the pattern is causal plus padding, else None;
    first_on_device: the same as `[1]` int64, where reading it would synchronise with the device.
    key_real: `[B, KV]` bool, keys that are not padding (None: all).
    causal: whether the pattern is known to be causal plus padding, even if `first` is None.
    offset: position of the first key in its sequence; a sliding cache has dropped earlier keys.
    """

    n: Tensor
    real: Tensor | None = None
    mask: Tensor | None = None
    first: int | None = None
    first_on_device: Tensor | None = None
    key_real: Tensor | None = None
    causal: bool = False
    offset: int = 0
    _derived: _Derived | None = field(default=None, init=False, repr=False)  # not copied by `replace`

    def first_tensor(self) -> Tensor | None:
        """Position of the first query among the keys, `[1]` int64 on the device of n; None if the pattern is
        not causal plus padding. Created once for all layers."""
        if self.first_on_device is not None or self.first is None and self.mask is not None:
            return self.first_on_device
        derived = self._shared()
        if derived.first is None:
            derived.first = torch.full((1,), self.first or 0, dtype=torch.int64, device=self.n.device)
        return derived.first

    def span(self) -> Tensor | None:
        """`[B, 2]` int32: the first key that any row of a sequence sees, and one past the last; `[0, 0]` if
        there is none. None without a mask. Computed once for all layers."""
        if self.mask is None:
            return None
        derived = self._shared()
        if derived.span is not None:
            return derived.span
        seen = self.mask[:, 0].any(dim=1)
        at = torch.arange(seen.shape[1], dtype=torch.int32, device=seen.device)
        stop = torch.where(seen, at + 1, 0).amax(dim=1)
        derived.span = torch.stack([torch.where(seen, at, stop[:, None]).amin(dim=1), stop], dim=1)
        return derived.span

    def _shared(self) -> _Derived:
        if torch.compiler.is_compiling():
            return _Derived()
        if self._derived is None:
            self._derived = _Derived()
        return self._derived

    def longest(self) -> Tensor:
        """`[B or 1]`, the number of visible keys of the longest real row."""
        return (self.n if self.real is None else self.n * self.real).amax(dim=-1)

    def seen(self, kv_len: int) -> Tensor:
        """`[B or 1, KV]` bool, the keys that any real row sees; for causal rows, as many as the longest row
        sees."""
        if self.mask is None or self.causal:
            return torch.arange(kv_len, device=self.n.device) < self.longest()[:, None]
        visible = self.mask[:, 0]
        return (visible if self.real is None else visible & self.real[:, :, None]).any(dim=1)

    def num_seen(self) -> Tensor:
        """`[B or 1]`, the number of keys that any real row sees."""
        if self.mask is None or self.causal:
            return self.longest()
        return self.seen(self.mask.shape[3]).sum(dim=-1)

    def continues(self, before: Tensor | None, end: int) -> bool:
        """Whether `key_real` equals `before`, that of an earlier step, in its first `end` keys. Compared once
        for all layers of a step, because on a GPU this synchronises with the device."""
        if self.key_real is None or before is None:
            return self.key_real is before
        derived = self._shared()
        known = derived.continued
        if known is None or known[0]() is not before or known[1] != end:
            same = torch.equal(self.key_real[:, :end], before[:, :end])
            known = derived.continued = (weakref.ref(before), end, same)
        return known[2]

    def examined(self, every: int) -> list[int]:
        """The rows with 1, every + 1, 2 * every + 1, ... visible keys in any sequence. Without padding they
        are known; else they are asked once for all layers, because on a GPU this synchronises."""
        if self.first is not None and self.key_real is None:
            return list(range(-self.first % every, self.n.shape[1], every))
        derived = self._shared()
        if derived.examined is None:
            at = (self.n - 1) % every == 0
            at = at if self.real is None else at & self.real
            derived.examined = at.any(dim=0).nonzero()[:, 0].tolist()
        return derived.examined

    def last(self, count: int) -> "Rows":
        """The last `count` rows."""
        q_len = self.n.shape[1]
        return replace(
            self,
            n=self.n[:, -count:],
            real=None if self.real is None else self.real[:, -count:],
            mask=None if self.mask is None else self.mask[:, :, -count:],
            first=None if self.first is None else self.first + q_len - count,
            first_on_device=None if self.first_on_device is None else self.first_on_device + q_len - count,
        )

    def end(self, stop: int, kv_len: int) -> int:
        """The number of leading keys that rows before `stop` can see at most."""
        return kv_len if self.first is None else min(kv_len, self.first + stop)

    def visible(self, start: int, stop: int, kv_len: int) -> Tensor | None:
        """`[B or 1, 1, stop - start, end]` bool for rows start to stop; None if they see all of the first
        `end` keys."""
        end = self.end(stop, kv_len)
        if self.mask is not None:
            return self.mask[:, :, start:stop, :end]
        if stop - start == 1:
            return None
        first = self.first or 0
        ones = torch.ones(stop - start, end, dtype=torch.bool, device=self.n.device)
        return ones.tril_(diagonal=first + start)[None, None]


def rows_of(mask: Tensor | None, q_len: int, kv_len: int, device: torch.device) -> Rows:
    """The Rows for the mask that an attention layer receives; computed once for all layers.

    A float mask is additive: 0 is visible, HIDDEN and below is not. Raises UsageError for other values in it
    (not under torch.compile). Without a mask the rows are plain causal, aligned at the first key as in
    scaled_dot_product_attention; a single row then sees every key.
    """
    if mask is None:
        if device.type != "cpu" or torch.compiler.is_compiling():  # a CUDA graph would keep the tensor
            return _causal(q_len, kv_len, device)
        return _causal_of_step(q_len, kv_len, device, torch.is_inference_mode_enabled())
    traced = torch.compiler.is_compiling()  # a traced tensor is no key: counted again in each layer
    known = None if traced else _rows_of_mask.get(mask)
    if known is not None and known[0] == _version(mask):
        rows = copy.copy(known[1])
        rows.mask = mask.expand(-1, -1, q_len, -1) if rows.mask is None else rows.mask
        return rows
    if not traced and (mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, q_len)):
        raise UsageError(
            f"the attention mask has shape {list(mask.shape)}, which top_theta does not support: give "
            "[batch, 1, rows, keys], the same for all heads."
        )
    bool_mask = mask if mask.dtype == torch.bool else mask >= 0
    if mask.dtype != torch.bool and not traced and bool(((mask > HIDDEN) & (mask != 0)).any()):
        raise UsageError(
            "the attention mask adds a bias to the scores, which top_theta does not support: give a bool "
            "mask, or one of 0 and minus infinity."
        )
    bool_mask = bool_mask.expand(-1, -1, q_len, -1)
    n = bool_mask.sum(dim=-1)[:, 0]
    # A real row sees itself. The last query lies at the last key that any row sees: behind it is the unused
    # end of a static cache.
    at = torch.arange(kv_len, device=mask.device)
    last = torch.where(bool_mask.any(dim=2)[:, 0], at, 0).amax()
    own = (last - q_len + 1 + torch.arange(q_len, device=mask.device)).clamp(min=0)
    itself = bool_mask[:, 0].gather(-1, own[None, :, None].expand(bool_mask.shape[0], -1, 1))[..., 0]
    rows = Rows(n=n, real=itself & (n > 0), mask=bool_mask)
    if not traced and not mask.is_inference():  # whose changes cannot be seen
        remember(mask, rows)
    return rows


def _causal(q_len: int, kv_len: int, device: torch.device) -> Rows:
    if q_len == 1:
        return Rows(n=torch.full((1, 1), kv_len, device=device), first=kv_len - 1, causal=True)
    return Rows(n=torch.arange(1, q_len + 1, device=device)[None], first=0, causal=True)


@lru_cache(maxsize=1)
def _causal_of_step(q_len: int, kv_len: int, device: torch.device, inference: bool) -> Rows:
    """The same for all layers. inference: whether autograd cannot use its tensors."""
    return _causal(q_len, kv_len, device)


def remember(mask: Tensor, rows: Rows) -> None:
    """Store the Rows of a mask for the layers that will receive it."""
    rows._shared()
    stored = copy.copy(rows)
    if mask.dtype == torch.bool:
        stored.mask = None
    _rows_of_mask[mask] = (_version(mask), stored)


def _version(mask: Tensor) -> int | None:
    """How often a mask has been changed in place; None if that is not known."""
    return None if mask.is_inference() else mask._version
