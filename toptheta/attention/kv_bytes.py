"""KV bytes: the bytes of the cache that attention reads, compared with dense attention.

Counted per KV head, from what was kept: the heads of a group read what any of them needs once. Dense
attention reads K and V of every visible key in the model's type. A method reads the K rows whose scores it
needs, the V rows that it keeps, and whatever it stores in addition to the cache.

A prompt with a shared prefix (models/prefix.py) is counted as one call, although the prefix was computed in
another: `before` is `[B or 1, H_kv, P]`, how often each V row of the P tokens of the prefix was kept by the
rows of the prefix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall, Counts
from toptheta.attention.rows import Rows
from toptheta.methods.params import LayerSpec

FLOAT32 = 4
INT8_EXTRA = 8  # bytes of a key's step and slack, besides its codes


@dataclass
class KVBytes:
    """read: `[B, H_kv]` int64, bytes that one call reads; dense: `[B]` int64, bytes that dense attention
    would read for each KV head. For several decode steps in one call: per step, `[B * Q, ...]`."""

    read: Tensor
    dense: Tensor


def visible_keys(rows: Rows, batch: int, steps: bool = False, before: Tensor | None = None) -> Tensor:
    """`[B]` int64, the number of keys that any real row of each sequence sees; steps: those that each row
    sees, `[B * Q]`."""
    if before is not None:  # each row sees itself
        rest = rows.n.shape[1] if rows.real is None else rows.real.sum(dim=-1)
        return (rows.n.new_full((1,), before.shape[2]) + rest).expand(batch)
    if not steps:
        return rows.num_seen().expand(batch)
    n = rows.n if rows.real is None else rows.n * rows.real
    return n.expand(batch, -1).flatten()


@dataclass(frozen=True)
class Price:
    """Computes the bytes that a layer reads from its counts. element_size: bytes of a number in
    the cache; two_tier: whether K is read only where its int8 copy (kernels/int8_keys.py) does not decide."""

    spec: LayerSpec
    head_dim: int
    element_size: int
    two_tier: bool = False

    def dense(self, n: Tensor) -> Tensor:
        """Bytes that dense attention reads for each KV head. n: visible keys."""
        return n * (2 * self.head_dim * self.element_size)

    def read(self, n: Tensor, attn: Tensor, v_rows: Tensor, keys: Tensor | None, decode: bool) -> Tensor:
        """`[M, H_kv]` bytes that M calls, or decode steps, read.

        n: `[M]` visible keys; attn: `[M, H]` kept elements; v_rows: `[M, H_kv]` kept V rows; keys: `[M,
        H_kv]` K rows that are read, None for a method that does not count them. What a method stores in
        addition to the cache counts in decode steps only.
        """
        spec, method, n = self.spec, self.spec.method, n[:, None]
        if not spec.sparse:
            return self.dense(n).expand(-1, v_rows.shape[1])
        # A sum over all visible keys, of weights or of a denominator, needs every score.
        all_scores = method.reads_all_keys or spec.placement == "post-softmax" or spec.sdc == "exact"
        k_rows = keys if keys is not None else n if all_scores else v_rows
        read = (k_rows + v_rows) * (self.head_dim * self.element_size)
        if self.two_tier:
            read = read + n * (self.head_dim + INT8_EXTRA)
        if decode:
            kept = attn.view(n.shape[0], v_rows.shape[1], -1)
            extra = method.extra_bytes(n, kept, self.head_dim, self.element_size)
            read = read + torch.where(spec.may_drop(n), extra, 0)
            if spec.vmc:
                read = read + FLOAT32 * self.head_dim  # the sum of V
        return read


def price_of(spec: LayerSpec, key: Tensor, two_tier: bool = False) -> Price:
    """key: `[B, H_kv, N, D]`."""
    return Price(spec, key.shape[3], key.element_size(), two_tier)


def dense_bytes(rows: Rows, key: Tensor, before: Tensor | None = None) -> KVBytes:
    """The bytes of dense attention of a prompt or a part of one. key: `[B, H_kv, N, D]`."""
    dense = price_of(LayerSpec(), key).dense(visible_keys(rows, key.shape[0], before=before))
    return KVBytes(dense[:, None].expand(-1, key.shape[1]), dense)


def kv_bytes(
    call: AttentionCall, counts: Counts, keys_read: Tensor | None = None, before: Tensor | None = None
) -> KVBytes:
    """The bytes of a call that kept `counts`. keys_read: `[B, H_kv]`, K rows that were read besides the int8
    copy of K; None if the copy was not used."""
    price = price_of(call.spec, call.k, keys_read is not None)
    n, counts = visible_keys(call.rows, call.k.shape[0], call.decode, before), counts.steps()
    v_rows = counts.vrows if before is None else _all_vrows(counts.vrow, before, call.rows.offset)
    keys = keys_read if counts.keys is None else counts.keys[..., 0]
    return KVBytes(price.read(n, counts.attn, v_rows, keys, call.decode), price.dense(n))


def _all_vrows(vrow: Tensor, before: Tensor, offset: int) -> Tensor:
    """`[B, H_kv]`, V rows that a prompt keeps, by its last rows (`vrow` `[B, H_kv, N]`, for the keys from
    `offset` on) or by its prefix (`before`)."""
    kept = torch.nn.functional.pad(vrow > 0, (offset, 0))
    kept[..., : before.shape[2]] |= before > 0
    return kept.sum(dim=-1)
