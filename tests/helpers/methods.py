"""Methods beside slow loops: sequences that are read in prompts and steps, in all layouts of a batch.

V is the unit matrix, so what attention returns are its weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.helpers.calls import call
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.methods.base import Method
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.models.interface import toptheta_mask

LENGTH, PROMPT, HEAD_DIM, SCALE = 40, 29, 48, 0.2
# What a loop is handed: q `[H, T, D]` and keys `[H_kv, T, D]` of one sequence, without padding, in float64;
# how many of its rows are the prompt; their places among the rows of the batch. It returns weights
# `[H, T, T]`.
Loop = Callable[[Tensor, Tensor, int, list[int]], Tensor]

LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"chunks": [8, 12, 8, 1]},  # the last one of a single row
    "left padding": {"padded": slice(0, 9)},
    "left padding in chunks": {"padded": slice(0, 9), "chunks": [7, 21, 1]},
    "right padding": {"padded": slice(21, PROMPT)},
    "static cache": {"tail": 8, "chunks": [20, 9]},
}


def inputs(heads: tuple[int, int] = (4, 2), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries `[2, H, LENGTH, D]` and keys `[2, H_kv, HEAD_DIM, D]`, those of an unused tail included."""
    torch.manual_seed(seed)
    return torch.randn(2, heads[0], LENGTH, HEAD_DIM), torch.randn(2, heads[1], HEAD_DIM, HEAD_DIM)


def weights(
    spec: LayerSpec,
    q: Tensor,
    k: Tensor,
    prompt: int = PROMPT,
    chunks: list[int] | None = None,
    padded: slice | None = None,
    tail: int = 0,
    theta: Tensor | None = None,
) -> Tensor:
    """Weights `[B, H, T, T]` of rows that come as a prompt, in chunks, and then one by one. padded: places of
    the second sequence that are padding; tail: of a static cache."""
    batch, num_heads, length, head_dim = q.shape
    pieces = [*(chunks or [prompt]), *([1] * (length - prompt))]
    state, start, parts = State(), 0, []
    for number, rows in enumerate(pieces):
        stop = start + rows
        kv_len = length + tail if tail else stop
        mask = toptheta_mask(
            batch, rows, kv_len, q_offset=start, attention_mask=real_tokens(batch, length, padded)[:, :stop]
        )
        v = torch.eye(kv_len, head_dim).expand(batch, k.shape[1], -1, -1)
        one = call(
            q[:, :, start:stop],
            k[:, :, :kv_len],
            v,
            rows_of(mask, rows, kv_len, q.device),
            spec,
            SCALE,
            theta,
            state=state,
            decode=number >= len(chunks or [prompt]),
        )
        parts.append(sparse_attention(one)[0][..., :length])
        start = stop
    return torch.cat(parts, dim=2)


def real_tokens(batch: int, length: int, padded: slice | None) -> Tensor:
    real = torch.ones(batch, length, dtype=torch.bool)
    if padded is not None:
        real[1, padded] = False
    return real


def check(
    method: Method, k: int, loop: Loop, layout: str, heads: tuple[int, int] = (4, 2), **options
) -> None:
    """Assert that a method's weights in a layout are those of the loop over each sequence alone."""
    q, key = inputs(heads)
    spec = LayerSpec(method, options.get("placement", "pre-softmax"), k)
    given = LAYOUTS[layout]
    got = weights(spec, q, key, theta=options.get("theta"), **given)
    real = real_tokens(2, LENGTH, given.get("padded"))
    for b in range(2):
        at = real[b].nonzero()[:, 0]
        expected = torch.zeros(heads[0], LENGTH, LENGTH, dtype=torch.float64)
        prompt = int((at < PROMPT).sum())
        alone = loop(q[b][:, at].double(), key[b][:, at].double(), prompt, at.tolist())
        expected[:, at[:, None], at] = alone
        assert torch.equal(got[b][:, at] > 0, expected[:, at] > 0), f"sequence {b}"
        torch.testing.assert_close(got[b][:, at].double(), expected[:, at], rtol=1e-4, atol=1e-6)


def softmax_over(scores: Tensor, kept: list[int]) -> Tensor:
    """Weights of a row over what it keeps, 0 elsewhere. scores: `[T]`."""
    out = torch.zeros_like(scores)
    out[kept] = scores[kept].softmax(dim=0)
    return out
