"""KV bytes: what attention reads of the cache, against what dense attention reads.

Counted by KV head, from what was kept: the heads of a group read what any of them needs once. Dense
attention reads K and V of every visible key in the model's type. A method reads the K rows that it needs a
score of, the V rows that it keeps, and whatever it stores in addition to the cache.

A prompt whose beginning other prompts share (models/prefix.py) is counted as one call, although its first
rows were computed in another one: `before` is `[B or 1, H_kv, P]`, how often each V row of the P tokens of
that beginning was kept by its own rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall, Counts
from toptheta.attention.rows import Rows

FLOAT32 = 4
INT8_EXTRA = 8  # bytes of a key's step and slack, in addition to its codes


@dataclass
class KVBytes:
    """read: `[B, H_kv]` int64, what one call reads; dense: `[B]` int64, what dense attention would, for each
    KV head. Of several decode steps in one call: by step, `[B * Q, ...]`."""

    read: Tensor
    dense: Tensor


def visible_keys(rows: Rows, batch: int, steps: bool = False, before: Tensor | None = None) -> Tensor:
    """`[B]` int64, keys that any real row of each sequence sees; steps: that each row sees, `[B * Q]`."""
    if before is not None:  # each row sees itself
        rest = rows.n.shape[1] if rows.real is None else rows.real.sum(dim=-1)
        return (rows.n.new_full((1,), before.shape[2]) + rest).expand(batch)
    if not steps:
        return rows.num_seen().expand(batch)
    n = rows.n if rows.real is None else rows.n * rows.real
    return n.expand(batch, -1).flatten()


def dense_bytes(rows: Rows, key: Tensor, steps: bool = False, before: Tensor | None = None) -> KVBytes:
    """Of dense attention. key: `[B, H_kv, N, D]`; steps: the rows are decode steps."""
    batch, num_kv_heads, _, head_dim = key.shape
    dense = visible_keys(rows, batch, steps, before) * (2 * head_dim * key.element_size())
    return KVBytes(dense[:, None].expand(-1, num_kv_heads), dense)


def kv_bytes(
    call: AttentionCall, counts: Counts, keys_read: Tensor | None = None, before: Tensor | None = None
) -> KVBytes:
    """Of a call that kept `counts`. keys_read: `[B, H_kv]` K rows that were read with the int8 copy of K,
    None where it was not used.

    What a method stores in addition to the cache counts in decode steps only.
    """
    spec, method = call.spec, call.spec.method
    dense = dense_bytes(call.rows, call.k, call.decode, before)
    if not spec.sparse:
        return dense
    batch, num_kv_heads, _, head_dim = call.k.shape
    row, n = head_dim * call.k.element_size(), visible_keys(call.rows, batch, call.decode, before)[:, None]
    counts = counts.steps()
    v_rows = counts.vrows if before is None else _all_vrows(counts.vrow, before, call.rows.offset)
    # A sum over all visible keys, of weights or of a denominator, needs every score.
    all_scores = method.reads_all_keys or spec.placement == "post-softmax" or spec.sdc == "exact"
    if counts.keys is not None:
        read = (counts.keys[..., 0] + v_rows) * row
    elif keys_read is not None:
        read = (keys_read + v_rows) * row + n * (head_dim + INT8_EXTRA)
    else:
        read = ((n if all_scores else v_rows) + v_rows) * row
    if call.decode:
        kept = counts.attn.view(n.shape[0], num_kv_heads, -1)
        extra = method.extra_bytes(n, kept, head_dim, call.k.element_size())
        read = read + torch.where(spec.may_drop(n), extra, 0)
        if spec.vmc:
            read = read + FLOAT32 * head_dim  # the sum of V
    return KVBytes(read.expand(-1, num_kv_heads), dense.dense)


def _all_vrows(vrow: Tensor, before: Tensor, offset: int) -> Tensor:
    """`[B, H_kv]` V rows that a prompt keeps: its last rows, `vrow` `[B, H_kv, N]` of the keys from `offset`
    on, or its first ones, `before`."""
    kept = torch.nn.functional.pad(vrow > 0, (offset, 0))
    kept[..., : before.shape[2]] |= before > 0
    return kept.sum(dim=-1)
