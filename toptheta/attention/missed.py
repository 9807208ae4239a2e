"""Which keys a quantized copy of K misses (methods/key_copy.py): the error of choosing by estimates.

A key is wanted by a head if the rule keeps it by its score from K, and missed if, wanted, it is not read
because its estimate is too low. Every EVERY-th position of a sequence is examined, in plain PyTorch, whatever
computes the call.
"""

from dataclasses import replace

import torch
from torch import Tensor

from toptheta.attention.blocks import Blocks
from toptheta.attention.call import AttentionCall
from toptheta.methods.base import NEG_INF
from toptheta.methods.state import State

EVERY = 16


def missed_keys(call: AttentionCall) -> Tensor:
    """`[B, Q, 2]` int64, the numbers of wanted and of missed keys of each decode step, summed over heads; 0
    for rows that are padding, left dense, or not examined.

    Call it after the attention, which adds these keys to the copy.
    """
    spec, rows = call.spec, call.rows
    batch, _, q_len, _ = call.q.shape
    found = torch.zeros(batch, q_len, 2, dtype=torch.int64, device=call.q.device)
    examined = rows.examined(EVERY)
    if not examined:
        return found
    chosen = ((rows.n - 1) % EVERY == 0) & spec.may_drop(rows.n)
    if rows.real is not None:
        chosen = chosen & rows.real
    if call.state is None:
        call = replace(call, state=State())
        call.key_codes()
    if spec.method.needs_values:
        call = replace(call, factor=call.value_factors())
    blocks = Blocks(call)
    for at in examined:
        block = blocks.at(at, at + 1)
        tables, visible = call.tables_of(block.n), block.visible
        exact = replace(block)
        if spec.placement == "post-softmax":
            exact.x, exact.are_weights = block.weights.masked_fill(~visible, NEG_INF), True
            exact.row_max = exact.x.amax(dim=-1, keepdim=True)
        wanted = spec.method.keep(exact, tables) & visible & chosen[:, at, None, None, None]
        spec.method.estimate(block, tables, spec.placement)
        assert block.read is not None
        found[:, at] = torch.stack([wanted, wanted & ~block.read], dim=-1).sum(dim=(1, 2, 3))
    return found
