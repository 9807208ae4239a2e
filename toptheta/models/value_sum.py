"""The sum of V over the visible keys, updated from one decode step to the next, for V-mean compensation.

With it a step adds one row of V instead of reading all of them. It belongs to one layer of a cache; whether
that still holds what was summed is checked at every step: generation may reorder, crop, repeat or replace a
cache.
"""

import weakref

import torch
from torch import Tensor

from toptheta.attention.rows import Rows


class VSum:
    """The sum over one layer of one cache."""

    int8 = factor = None  # see cache.py

    def __init__(self) -> None:
        # `[B, H_kv, D]` float64, whatever V's type: thousands of steps add up
        self._sum: Tensor | None = None
        self._end = 0  # how many leading keys it covers
        self._key_real: Tensor | None = None  # which of them are padding
        self._values: weakref.ref[Tensor] | None = None  # the tensor of the cache that was summed ...
        self._version = 0  # ... and its count of in-place changes then

    def check(self, values: Tensor | None) -> None:
        """Discard the sum unless the cache still has the same unchanged tensor."""
        if values is None or self._values is None or values is not self._values():
            self._sum = None
        elif values._version != self._version:  # changed in place
            self._sum = None

    def at(self, value: Tensor, rows: Rows) -> Tensor | None:
        """`[B, H_kv, D]` float32, sum of V over the visible keys of the only query row, or None where that is
        not a leading part of the keys. value: `[B, H_kv, N, D]`, the cache's tensor after this step."""
        known = rows.n.shape[1] == 1 and rows.first is not None and not value.is_inference()
        if not known or value.device.type not in ("cpu", "cuda"):
            self._sum = None
            return None
        assert rows.first is not None
        end, key_real = rows.first + 1, rows.key_real
        if self._sum is not None and self._end == end - 1 and rows.continues(self._key_real, self._end):
            new = (value.detach() if value.requires_grad else value)[:, :, end - 1]
            self._sum = self._sum + (new if key_real is None else new * key_real[:, None, end - 1, None])
        else:
            seen = value.detach()[:, :, :end]
            if key_real is not None:
                seen = seen * key_real[:, None, :end, None]
            self._sum = seen.sum(dim=2, dtype=torch.float64)
        self._end, self._key_real = end, key_real
        self._values, self._version = weakref.ref(value), value._version
        return self._sum.float()
