"""A quantized copy of K that estimates the scores of a decode step, so that K is read for candidates only.

A key k is represented by `mean + step * code` (key_codes.py): mean is the mean of the keys before the first
decode step, step one number per key. A key is a candidate for the heads of a group if any of them would keep
it by its estimate, or if it is among the first or the last of its row. Scores of candidates are computed from
K. The other keys are dropped; their estimates stay in the softmax denominator. The error has no guaranteed
bound: a key whose estimate is too low is missed. (TopThetaCache's copy, kernels/int8_keys.py, has a bound,
for thresholds on scores.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from toptheta.methods.base import NEG_INF, Block
from toptheta.methods.key_codes import KeyCodes
from toptheta.methods.state import State

BITS = {"int8": 8, "int4": 4}
FIRST, LAST = 4, 16  # first and last keys of a row, which are always candidates
STEP_BYTES = 2  # a key's step, in 16 bits


@torch.no_grad()
def codes_of(state: State, k: Tensor, visible: Tensor | None, rows: int, own: bool, bits: int) -> KeyCodes:
    """The copy of the keys `k` `[B, H_kv, E, D]`, of which `state` has those of earlier steps.

    visible: `[B or 1, E]` bool, the keys that the last of the rows sees; None: all. own: the keys of the rows
    themselves are the last of the E; else it is not known which keys are new, and all are coded anew.
    """
    end = k.shape[2]
    if state.key_codes is None:
        prompt = max(1, end - rows)
        seen = torch.ones(1, end, dtype=torch.bool, device=k.device) if visible is None else visible
        seen = seen[:, None, :prompt, None]
        total = (k[:, :, :prompt].float() * seen).sum(dim=2)
        state.key_codes = KeyCodes.around(total / seen.sum(dim=2).clamp_min(1), bits)
    first = min(state.key_codes.length, end - rows) if own else 0
    state.key_codes.put(k[:, :, first:], first)
    return state.key_codes


def estimated(block: Block, bits: int) -> Tensor:
    """`[B, H, R, E]` float32, the scores by the copy; -inf where not visible."""
    k, q, state = block.k, block.q, block.state
    assert k is not None and q is not None and state is not None
    copy = codes_of(state, k, block.visible[:, 0, -1], block.x.shape[2], block.own, bits)
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    scores = (grouped @ copy.represented().transpose(2, 3)).view_as(block.x)
    if block.softcap is not None:
        scores = (scores / block.softcap).tanh() * block.softcap
    return scores.masked_fill(~block.visible, NEG_INF)


def first_and_last(visible: Tensor) -> Tensor:
    """The first and last visible keys, bool of the shape of `visible`, whose last dimension is the keys."""
    place = visible.cumsum(dim=-1)
    return visible & ((place <= FIRST) | (place > place[..., -1:] - LAST))


def candidates(wanted: Tensor, visible: Tensor, num_kv_heads: int) -> Tensor:
    """`[B, H, R, E]` bool, the keys that are read: wanted by any head of the group, or always candidates.
    wanted: `[B, H, R, E]` bool; visible: `[B, 1, R, E]` bool."""
    read = (wanted | first_and_last(visible)).unflatten(1, (num_kv_heads, -1)).any(dim=2, keepdim=True)
    return read.expand(-1, -1, wanted.shape[1] // num_kv_heads, -1, -1).flatten(1, 2) & visible
