"""Rows: which keys each query sees, how many those are, and which queries are real (DESIGN section 1).

Covers the mask function that transformers calls for our attention, and what it learns on the way. A mask of
None is the plain causal mask of an unpadded batch: no `[Q, KV]` tensor is ever made for it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

_ROWS = "_toptheta_rows"  # attribute under which a mask carries its Rows from layer to layer


@dataclass
class Rows:
    """Visibility of the keys for a batch of query rows.

    n: `[B or 1, Q]` int64, number of visible keys of each row. real: `[B or 1, Q]` bool, rows that belong to
    a sequence rather than to padding (None: all). mask: `[B, 1, Q, KV]` bool, True = visible, or None for
    plain causal (row i sees keys 0..i; a single row sees every key). first: position of the first query among
    the keys if the pattern is causal plus padding, else None. key_real: `[B, KV]` bool, keys that are not
    padding (None: all). causal: the pattern is known to be causal plus padding, even if first is not.
    """

    n: Tensor
    real: Tensor | None = None
    mask: Tensor | None = None
    first: int | None = None
    key_real: Tensor | None = None
    causal: bool = False
    _span: Tensor | None = field(default=None, init=False, repr=False)  # of this mask: no copy takes it along

    def span(self) -> Tensor | None:
        """`[B, 2]` int32: the first key that any row of a sequence sees, and the one after the last; `[0, 0]`
        where there is none. None without a mask. Found once, for all layers."""
        if self.mask is None or self._span is not None:
            return self._span
        seen = self.mask[:, 0].any(dim=1)
        at = torch.arange(seen.shape[1], dtype=torch.int32, device=seen.device)
        stop = torch.where(seen, at + 1, 0).amax(dim=1)
        self._span = torch.stack([torch.where(seen, at, stop[:, None]).amin(dim=1), stop], dim=1)
        return self._span

    def end(self, stop: int, kv_len: int) -> int:
        """Number of leading keys that rows before `stop` can see at most."""
        return kv_len if self.first is None else min(kv_len, self.first + stop)

    def visible(self, start: int, stop: int, kv_len: int) -> Tensor | None:
        """`[B or 1, 1, stop - start, end]` bool for rows start..stop, or None if they see all of the first
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
    """The Rows for the mask that an attention layer is handed; counted once and kept on the mask for the next
    layers.

    A float mask is read as additive (0 = visible). Without a mask the rows are plain causal, aligned at the
    first key as scaled_dot_product_attention does; a single row then sees every key.
    """
    if mask is None:
        if q_len == 1:
            return Rows(n=torch.full((1, 1), kv_len, device=device), first=kv_len - 1, causal=True)
        return Rows(n=torch.arange(1, q_len + 1, device=device)[None], first=0, causal=True)
    known = getattr(mask, _ROWS, None)
    if known is not None:
        return known
    bool_mask = mask if mask.dtype == torch.bool else mask >= 0
    n = bool_mask.sum(dim=-1)[:, 0]
    # The queries are the last rows of the keys, so a real row sees itself: the diagonal that ends at the
    # corner.
    itself = bool_mask[:, 0].diagonal(offset=kv_len - q_len, dim1=-2, dim2=-1)
    rows = Rows(n=n, real=itself & (n > 0), mask=bool_mask)
    try:
        setattr(mask, _ROWS, rows)
    except (
        AttributeError,
        RuntimeError,
    ):  # a traced tensor takes no attributes: count again in the next layer
        pass
    return rows


def toptheta_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """Mask function for transformers' AttentionMaskInterface: bool `[B, 1, Q, KV]`, True = attend, or None.

    None is returned only where `rows_of(None, ...)` means the same: stock `sdpa_mask` also skips the mask for
    one query over a static cache, where the unused tail must stay hidden.
    """
    if isinstance(q_offset, Tensor) and q_offset.device.type == "cpu" and not torch.compiler.is_compiling():
        q_offset = int(q_offset)  # a static cache's; on a GPU reading it would wait for the device
    offset_known = isinstance(q_offset, int)
    same = (
        offset_known
        and kv_offset == 0
        and (
            q_offset == 0
            and q_length > 1
            or q_length == kv_length
            or q_length == 1
            and q_offset + 1 == kv_length
        )
    )
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and same,
        **kwargs,
    )
    if mask is None or mask_function is not causal_mask_function or torch.compiler.is_compiling():
        return mask
    rows = Rows(n=mask.sum(dim=-1)[:, 0], mask=mask, causal=True)
    if isinstance(q_offset, int):
        first = rows.first = q_offset - kv_offset
        if attention_mask is not None:
            key_real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
            if key_real.shape[1] < kv_length:  # a static cache's unused tail
                key_real = torch.nn.functional.pad(key_real, (0, kv_length - key_real.shape[1]))
            rows.key_real = key_real
            rows.real = key_real[:, first : first + q_length]
    else:
        at = torch.arange(q_length, device=mask.device) + (q_offset - kv_offset)
        at = at[None, :, None].expand(mask.shape[0], -1, 1)
        rows.real = mask[:, 0].gather(-1, at)[..., 0]  # a row of a sequence sees itself
    setattr(mask, _ROWS, rows)
    return mask
