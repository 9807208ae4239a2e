"""A quantized copy of K that estimates the scores of a decode step, so that K is read for candidates only.

A key k is represented by `mean + step * code` (key_codes.py): mean is the mean of the keys before the first
decode step, step one number per key. A key is a candidate for the heads of a group if any of them would keep
it by its estimate, or if it is among the first or the last of its row. Scores of candidates are computed from
K. The other keys are dropped; their estimates stay in the softmax denominator. The error has no guaranteed
bound: a key whose estimate is too low is missed. (TopThetaCache's copy, kernels/int8_keys.py, has a bound,
for thresholds on scores.)

Each key is coded once. In a growing cache the first decode step codes the prompt. In a static one the prompt
is coded as it comes, for decode steps may be compiled, and again if another part of it changes the mean.
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
    """The copy of the keys `k` `[B, H_kv, E, D]`, of which `state` has those of earlier calls.

    visible: `[B or 1, E]` bool, the keys that the last row of this call sees; None: all. rows: how many of
    its rows are decode steps; 0: they belong to a prompt. own: the keys of the rows themselves are the last
    of the E; else, and if the cache is not a static one, all are coded anew.
    """
    copy, kv_len = state.key_codes, k.shape[2]
    end = kv_len if state.end is None else state.end
    if copy is None or rows == 0 and not copy.fixed:
        mean = mean_before(k, visible, end - rows)
        if copy is None:
            copy = state.key_codes = KeyCodes.around(mean, bits, state.room, state.spare)
        else:  # the keys of the prompt so far are coded anew
            copy.mean.copy_(mean)
            state.uncoded = min(state.uncoded + copy.length, state.room)
        copy.length = state.uncoded
    if state.end is None:
        first = min(copy.length, kv_len - rows) if own else 0
        copy.put(k[:, :, first:], first)
    elif state.uncoded > 0:
        at = torch.arange(state.uncoded, device=k.device) + (state.end - state.uncoded)
        at = at.clamp_min(0)  # there may be fewer keys
        copy.put_at(k.index_select(2, at), at)
        state.uncoded = 0
    if rows > 0:
        copy.fixed = True
    return copy


def mean_before(k: Tensor, visible: Tensor | None, end: int | Tensor) -> Tensor:
    """`[B, H_kv, D]` float32, the mean of the keys before `end` that are visible; of the first if there is no
    key before it."""
    at = torch.arange(k.shape[2], device=k.device)
    seen = ((at < end) | (at == 0))[None]
    seen = (seen if visible is None else seen & visible)[:, None, :, None]
    return (k.float() * seen).sum(dim=2) / seen.sum(dim=2).clamp_min(1)


def estimated(block: Block) -> Tensor:
    """`[B, H, R, E]` float32, the scores by the copy in `block.state`; -inf where not visible."""
    k, q, state = block.k, block.q, block.state
    assert k is not None and q is not None and state is not None and state.key_codes is not None
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    scores = (grouped @ state.key_codes.represented(k.shape[2]).transpose(2, 3)).view_as(block.x)
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
    read = any_head(wanted | first_and_last(visible), num_kv_heads)
    return read.repeat_interleave(wanted.shape[1] // num_kv_heads, dim=1) & visible


def any_head(marks: Tensor, num_kv_heads: int) -> Tensor:
    """`[B, H_kv, R, E]` bool, what any query head of a group marks. marks: `[B, H, R, E]` bool."""
    groups = marks.unflatten(1, (num_kv_heads, -1))
    if torch.compiler.is_compiling():  # torch's C++ for bytes viewed as bool does not compile
        return groups.any(dim=2)
    # The largest byte: on a CPU, any() of a middle dimension takes fifty times as long.
    return groups.view(torch.uint8).amax(dim=2).view(torch.bool)
