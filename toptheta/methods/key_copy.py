"""A quantized copy of K that estimates the scores of a decode step, so that K is read for candidates only.

A key k is represented by `mean + step * code`: mean is the mean of the keys before the first decode step,
step one number per key. A key is a candidate for the heads of a group if any of them would keep it by its
estimate, or if it is among the first or the last of its row. Scores of candidates are computed from K. The
other keys are dropped; their estimates stay in the softmax denominator. The error has no guaranteed bound: a
key whose estimate is too low is missed. (TopThetaCache's copy, kernels/int8_keys.py, has a bound, for
thresholds on scores.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from toptheta.methods.base import NEG_INF, Block

BITS = {"int8": 8, "int4": 4}
FIRST, LAST = 4, 16  # first and last keys of a row, which are always candidates
STEP_BYTES = 2  # a key's step, in 16 bits


def represented(k: Tensor, mean: Tensor, bits: int) -> Tensor:
    """`k` `[B, H_kv, M, D]` quantized around `mean` `[B, H_kv, 1, D]` and dequantized, float32."""
    largest = 2 ** (bits - 1) - 1
    centred = k.float() - mean
    step = (centred.abs().amax(dim=-1, keepdim=True) / largest).to(torch.bfloat16).float()
    step = torch.where(step > 0.0, step, 1.0)
    return mean + step * (centred / step).round().clamp(-largest, largest)


def copy_of(block: Block, bits: int) -> Tensor:
    """`[B, H_kv, D, E]` float32, the dequantized copy of the block's keys: from earlier steps, except for the
    rows' own keys."""
    k, state = block.k, block.state
    assert k is not None and state is not None
    end, rows = k.shape[2], block.x.shape[2]
    own = rows if block.own and "copy" in state.tensors else end
    if "copy" not in state.tensors:
        state.numbers["prompt"] = max(1, end - block.start - rows)
    copy = state.tensor("copy", k.transpose(2, 3))
    prompt = min(state.numbers["prompt"], end)
    seen = block.visible[:, :1, -1, :prompt, None]
    count = seen.sum(dim=2, keepdim=True).clamp_min(1)
    mean = (k[:, :, :prompt].float() * seen).sum(dim=2, keepdim=True) / count
    copy[..., end - own :] = represented(k[:, :, end - own :], mean, bits).transpose(2, 3)
    return copy


def estimated(block: Block, bits: int) -> Tensor:
    """`[B, H, R, E]` float32, the scores estimated from the copy; -inf where not visible."""
    copy, q = copy_of(block, bits), block.q
    assert q is not None
    grouped = q.view(q.shape[0], copy.shape[1], -1, q.shape[3])
    scores = (grouped @ copy).view_as(block.x)
    if block.softcap is not None:
        scores = (scores / block.softcap).tanh() * block.softcap
    return scores.masked_fill(~block.visible, NEG_INF)


def candidates(wanted: Tensor, visible: Tensor, num_kv_heads: int) -> Tensor:
    """`[B, H, R, E]` bool, the keys that are read: wanted by any head of the group, or always candidates.
    wanted: `[B, H, R, E]` bool; visible: `[B, 1, R, E]` bool."""
    place = visible.cumsum(dim=-1)
    always = (place <= FIRST) | (place > place[..., -1:] - LAST)
    read = (wanted | always).unflatten(1, (num_kv_heads, -1)).any(dim=2, keepdim=True)
    return read.expand(-1, -1, wanted.shape[1] // num_kv_heads, -1, -1).flatten(1, 2) & visible
