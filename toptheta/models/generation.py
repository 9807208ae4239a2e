"""Long prompts in pieces: generation and teacher-forced likelihood, with the prompt cut into chunks.

A chunk of C tokens over N cached ones needs memory for C rows of attention instead of N. Rows see the same
keys as without chunks, so results agree within float noise. Statistics and calibration see every row once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StoppingCriteria, StoppingCriteriaList

from toptheta.models.control import end_prompt, reading_prompt
from toptheta.models.families import head_logits

LOGIT_ROWS = 1024  # rows of logits made at once: with 128,000 words a row takes half a megabyte in float32


class _EndOfPrefill(StoppingCriteria):
    """Tells the model that the prompt is through: generation asks after every new token whether to stop."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        end_prompt(self.model)  # from here on rows come one by one, which their shape tells
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def generate(
    model: Any, tokens: Any, prefill_chunk: int | None, stop: StoppingCriteria | None = None, **arguments
) -> Tensor:
    """`[B, new]` tokens that a patched model generates after `tokens` (input_ids, attention_mask `[B, Q]`,
    padded at the left).

    prefill_chunk: tokens of the prompt that go through the model at once; None: all. The last chunk may be a
    single row, whose shape is that of a decode step; it is prefill all the same. arguments: for
    `model.generate`.
    """
    criteria = [_EndOfPrefill(model)] + ([stop] if stop is not None else [])
    with reading_prompt(model):
        out = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            prefill_chunk_size=prefill_chunk,
            stopping_criteria=StoppingCriteriaList(criteria),
            **arguments,
        )
    return out[:, tokens["input_ids"].shape[1] :]


@torch.no_grad()
def negative_log_likelihood(model: Any, input_ids: Tensor, prefill_chunk: int | None) -> Tensor:
    """`[B, Q - 1]` float32 on the CPU: -log p (nats) of tokens 1..Q-1 of `input_ids` `[B, Q]` (no padding),
    each given all before it. Entry i has a context of i + 1 tokens."""
    chunked = prefill_chunk is not None and prefill_chunk < input_ids.shape[1]
    cache = DynamicCache(config=model.config) if chunked else None
    parts, start = [], 0
    for hidden in hidden_states(model, input_ids, cache, prefill_chunk):
        targets = input_ids[:, start + 1 : start + 1 + hidden.shape[1]]
        for i in range(0, targets.shape[1], LOGIT_ROWS):
            wanted = targets[:, i : i + LOGIT_ROWS]
            logits = head_logits(model, hidden[:, i : i + wanted.shape[1]]).float()
            wanted = wanted.to(logits.device)
            chosen = logits.gather(-1, wanted[..., None])[..., 0]
            parts.append((logits.logsumexp(dim=-1) - chosen).cpu())
        start += hidden.shape[1]
    return torch.cat(parts, dim=1)


def hidden_states(
    model: Any,
    input_ids: Tensor,
    cache: Cache | None,
    prefill_chunk: int | None,
    reading: Callable[[Any], AbstractContextManager[None]] = reading_prompt,
) -> Iterator[Tensor]:
    """The last layer's output for `input_ids` `[B, Q]` behind what `cache` holds, `[B, C, E]` for each chunk
    of C tokens (all at once without `prefill_chunk`). reading: what the rows are, those of a prompt or
    decode steps."""
    for chunk in input_ids.split(prefill_chunk or input_ids.shape[1], dim=1):
        with reading(model):  # a chunk of one row, too
            out = model.model(input_ids=chunk, past_key_values=cache, use_cache=cache is not None)
        yield out.last_hidden_state
