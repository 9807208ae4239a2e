"""Long prompts in pieces: generation and teacher-forced likelihood, with the prompt cut into chunks; and
batches that finished sequences leave.

A chunk of C tokens over N cached ones needs memory for C rows of attention instead of N. Rows see the same
keys as without chunks, so results agree within float noise. Statistics and calibration see every row once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StoppingCriteria, StoppingCriteriaList

from toptheta.models.control import end_prompt, reading_prompt, recorder_of
from toptheta.models.families import head_logits
from toptheta.models.growing_cache import growing_cache

GoingOn = Callable[[list[int]], None]  # called with the numbers of the sequences that are left in a batch

LOGIT_ROWS = 1024  # rows of logits made at once: with 128,000 words a row takes half a megabyte in float32


class _EndOfPrefill(StoppingCriteria):
    """Tells the model that the prompt has ended, as generation calls this after every new token."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        end_prompt(self.model)  # from here on rows come one by one, which their shape tells
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def cache_for(model: Any) -> dict[str, Cache]:
    """The argument of `model.generate` that makes it use a growing cache; none for a model that asks for a
    cache of another kind."""
    if model.generation_config.cache_implementation is not None:
        return {}
    return {"past_key_values": growing_cache(model.config)}


@torch.no_grad()
def generate(
    model: Any,
    tokens: Any,
    prefill_chunk: int | None,
    stop: StoppingCriteria | None = None,
    going_on: GoingOn | None = None,
    **arguments,
) -> Tensor:
    """`[B, new]` tokens that a patched model generates after `tokens` (input_ids, attention_mask `[B, Q]`,
    padded at the left).

    prefill_chunk: tokens of the prompt that are computed at once; None: all. The last chunk may be a single
    row, which has the shape of a decode step but is prefill. going_on: greedy decoding calls it when
    sequences leave the batch; `stop` sees the others only from then on. arguments: for `model.generate`.
    """
    criteria = [_EndOfPrefill(model)] + ([stop] if stop is not None else [])
    cache = cache_for(model)
    if going_on is not None and cache and not arguments.get("do_sample"):
        arguments["custom_generate"] = LeavingGreedy(going_on)
    with reading_prompt(model):
        out = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            prefill_chunk_size=prefill_chunk,
            **cache,
            stopping_criteria=StoppingCriteriaList(criteria),
            **arguments,
        )
    return out[:, tokens["input_ids"].shape[1] :]


class StopTexts(StoppingCriteria):
    """Stops each sequence separately when it contains one of the texts `stop`; lm-eval's own criterion waits
    for all sequences. start: tokens of the prompts."""

    def __init__(self, tokenizer: Any, stop: list[str], start: int):
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        # A text may be generated as other tokens than its tokenisation.
        self.longest = (
            max((len(tokenizer.encode(text, add_special_tokens=False)) for text in stop), default=0) + 2
        )

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.longest :])
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class LeavingGreedy:
    """Greedy decoding for `generate(custom_generate=...)` of a patched model. A sequence leaves its batch
    when any stopping criterion finishes it: the others are computed faster, and statistics count only a
    sequence's own steps, for any batch.

    lengths: tokens of each reply, its last one included, once the call has returned.
    """

    def __init__(self, going_on: GoingOn):
        self.going_on = going_on
        self.lengths: list[int] = []

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **arguments: Any,
    ) -> Tensor:
        """`[B, L + T]`: `input_ids` `[B, L]`, whose first tokens may be in the cache, and replies, padded at
        the right."""
        cache, mask = arguments.pop("past_key_values"), arguments.pop("attention_mask", None)
        batch, start = input_ids.shape
        at = cache.get_seq_length()
        new = input_ids[:, at:]
        positions = arguments.pop("position_ids").expand(batch, -1)[:, at:]
        rows, going, recorder = list(input_ids), torch.arange(batch), recorder_of(model)

        def read(new: Tensor, positions: Tensor) -> Tensor:
            """The logits `[B, V]` behind some tokens, which are added to the cache."""
            until = cache.get_seq_length() + new.shape[1]
            seen = mask if mask is None else mask[:, :until]
            given = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache}
            return model(input_ids=new, **given, **arguments).logits[:, -1]

        chunk = generation_config.prefill_chunk_size or new.shape[1]
        *before, new = new.split(chunk, dim=1)
        *places, positions = positions.split(chunk, dim=1)
        for part, place in zip(before, places):
            read(part, place)
        while True:
            logits = read(new, positions)
            scores = logits_processor(input_ids, logits.float().to(input_ids.device))
            new = scores.argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, new], dim=1)
            done = stopping_criteria(input_ids, scores)
            for i in done.nonzero()[:, 0].tolist():
                rows[int(going[i])] = input_ids[i]
            left = (~done).nonzero()[:, 0]
            if len(left) == 0:
                break
            positions = positions[:, -1:] + 1
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if len(left) < len(going):
                going = going[left.cpu()]
                cache.batch_select_indices(left.cpu())  # layers may be on several devices
                input_ids, new, positions = input_ids[left], new[left], positions[left]
                mask = None if mask is None else mask[left]
                if recorder is not None:
                    recorder.go_on(going, batch)
                self.going_on(going.tolist())
        self.lengths = [len(row) - start for row in rows]
        pad = generation_config.pad_token_id
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad or 0)


def generated_lengths(tokens: Tensor, eos: int | list[int] | None) -> list[int]:
    """Tokens of each row of generated `[B, T]` ids up to its first end-of-sequence token, that one included.

    What follows is padding: generate() goes on with finished sequences as long as any is not.
    """
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    for token in eos if isinstance(eos, list) else [] if eos is None else [eos]:
        ends |= tokens == token
    first = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, tokens.shape[1])
    return first.tolist()


def padded_behind(tokens: Tensor, mask: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """`[B, L]` ids and their mask, padded at the left, with the padding behind the first `at` tokens."""
    start = (mask == 0).sum(dim=1, keepdim=True)
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    places = torch.where(places < at, places + start, torch.where(places < at + start, places - at, places))
    return tokens.gather(1, places), mask.gather(1, places)


@torch.no_grad()
def negative_log_likelihood(model: Any, input_ids: Tensor, prefill_chunk: int | None) -> Tensor:
    """`[B, Q - 1]` float32 on the CPU: -log p (nats) of tokens 1 to Q - 1 of `input_ids` `[B, Q]` (no
    padding), each given all earlier tokens. Entry i has a context of i + 1 tokens."""
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
