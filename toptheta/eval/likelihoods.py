"""Log-likelihoods of the answers to prompts: one pass over the prompts of a batch, then one over each group
of answers of similar length, as together they would be padded to the longest."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toptheta.models.cache_state import selected
from toptheta.models.control import recorder_of
from toptheta.models.families import head_logits
from toptheta.models.growing_cache import growing_cache
from toptheta.models.patch import model_device
from toptheta.models.prefix import Prefix
from toptheta.models.recorder import LayerRecord

Group = tuple[tuple[int, ...], dict[str, tuple[int, ...]]]  # a prompt, and its answers by the request's key
# Tokens of padding that take as long as one more call of the model, roughly: on the CPU a call reads the
# weights, on a GPU it also launches some hundred kernels.
CALL_TOKENS = {"cpu": 32}
CALL_TOKENS_ELSEWHERE = 256
MOST_ANSWERS = 32  # to a prompt in one computation; more only if as many prompts make a batch


@dataclass
class Scored:
    """found: by the request's key, the log-likelihood of an answer, and whether greedy decoding gives it;
    prefill, decode: what its rows and those of its prompt kept, as `Recorder.drain` returns it."""

    found: dict[str, tuple[float, bool]]
    prefill: dict[int, LayerRecord] = field(default_factory=dict)
    decode: dict[int, list[LayerRecord]] = field(default_factory=dict)


def split(groups: Iterable[Group], batch_size: int) -> list[Group]:
    """The same groups, but for those of very many answers, which are divided: all questions of some tasks
    have one prompt."""
    most, parts = max(MOST_ANSWERS, batch_size), list[Group]()
    for prompt, answers in groups:
        items = list(answers.items())
        parts += [(prompt, dict(items[at : at + most])) for at in range(0, len(items), most)]
    return parts


def unpadded_length(config: Any, groups: Sequence[Group]) -> Callable[[Group], int]:
    """Returns the length of a prompt that can share a batch only with others as long, 0 for other prompts: a
    sliding window counts places, of which padding before an answer would take some."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    longest = max((len(answer) for _, answers in groups for answer in answers.values()), default=0)
    return lambda group: len(group[0]) if window and len(group[0]) + longest > window else 0


@torch.no_grad()
def score(
    model: Any,
    batch: Sequence[Group],
    prefix: Prefix | None,
    begin: Callable[[Iterable[str]], None],
    key_of: Callable[[tuple[int, ...]], str],
    softmax_dtype: torch.dtype | None,
) -> list[Scored]:
    """All answers to a batch of prompts, which begin with `prefix`, if any, and are equally long where
    `unpadded_length` asks for it. begin: called before each call of the model with the keys of its sequences;
    key_of: the key of a prompt; softmax_dtype: None for that of the logits."""
    device, recorder = model_device(model), recorder_of(model)
    at = 0 if prefix is None else len(prefix.ids)
    tokens, mask = _padded([prompt[at:] for prompt, _ in batch], device)
    last_rows = mask.sum(dim=1) - 1
    mask = torch.cat([mask.new_ones(len(batch), at), mask], dim=1)
    lengths = mask.sum(dim=1)
    cache: Any = growing_cache(model.config) if prefix is None else prefix.begin(model, len(batch))
    begin(key_of(prompt) for prompt, _ in batch)
    hidden = _read(model, tokens, mask, cache, None)

    def log_probs(hidden: Tensor) -> Tensor:
        return torch.log_softmax(head_logits(model, hidden), dim=-1, dtype=softmax_dtype)

    here = hidden.device  # of the last layer
    first = log_probs(hidden[torch.arange(len(batch), device=here), last_rows.to(here)])
    answers = [(i, key, answer) for i, (_, group) in enumerate(batch) for key, answer in group.items()]
    if all(len(answer) == 1 for _, _, answer in answers):
        found = {key: _likelihood(first[i][None], answer) for i, key, answer in answers}
        return [Scored(found, *(({}, {}) if recorder is None else recorder.drain()))]
    counts = None if recorder is None else recorder.take_prefix(one_call=False)
    call_tokens = CALL_TOKENS.get(device.type, CALL_TOKENS_ELSEWHERE)
    scored = []
    for group in alike([len(answer) - 1 for _, _, answer in answers], call_tokens):
        chosen = [answers[i] for i in group]
        owner = torch.tensor([i for i, _, _ in chosen], device=device)
        if recorder is not None and counts is not None:
            recorder.begin_answers(counts, owner)
        rest: Sequence[Tensor] = [first[:0]] * len(chosen)
        if any(len(answer) > 1 for _, _, answer in chosen):
            begin(key for _, key, _ in chosen)
            inputs, own_mask = _padded([answer[:-1] for _, _, answer in chosen], device)
            places = lengths[owner][:, None] + torch.arange(inputs.shape[1], device=device)
            whole = torch.cat([mask[owner], own_mask], dim=1)
            hidden = _read(model, inputs, whole, selected(cache, owner), places)
            real = log_probs(hidden[own_mask.bool().to(here)])
            rest = real.split([len(answer) - 1 for _, _, answer in chosen])
        found = {
            key: _likelihood(torch.cat([first[i][None], more]), answer)
            for (i, key, answer), more in zip(chosen, rest)
        }
        scored.append(Scored(found, *(({}, {}) if recorder is None else recorder.drain())))
    return scored


def alike(lengths: Sequence[int], call_tokens: int) -> list[list[int]]:
    """Groups of the indices of answers with these lengths, longest first, that make the number of tokens,
    with padding, plus `call_tokens` for each group as small as possible."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    starts = [at for at, i in enumerate(order) if at == 0 or lengths[i] < lengths[order[at - 1]]]
    ends = [*starts[1:], len(order)]
    cost, first = [0], list[int]()  # of the groups until starts[j]; where the last of them starts
    for j, end in enumerate(ends):
        costs = [cost[i] + call_tokens + lengths[order[starts[i]]] * (end - starts[i]) for i in range(j + 1)]
        first.append(int(np.argmin(costs)))
        cost.append(costs[first[-1]])
    groups, j = list[list[int]](), len(ends) - 1
    while j >= 0:
        groups.append(order[starts[first[j]] : ends[j]])
        j = first[j] - 1
    return groups[::-1]


def _read(model: Any, tokens: Tensor, mask: Tensor, cache: Any, places: Tensor | None) -> Tensor:
    """The last layer's output `[B, L, E]` for tokens behind those of `cache`. mask: `[B, N + L]`."""
    arguments = {"past_key_values": cache, "use_cache": True}
    if places is not None:
        arguments["position_ids"] = places
    seen = None if bool(mask.all()) else mask
    return model.model(tokens, attention_mask=seen, **arguments).last_hidden_state


def _likelihood(logits: Tensor, answer: tuple[int, ...]) -> tuple[float, bool]:
    """logits: `[len(answer), V]` log-probabilities."""
    target = torch.tensor(answer, device=logits.device)
    greedy = bool((logits.argmax(dim=-1) == target).all())
    return float(logits.gather(1, target[:, None]).sum()), greedy


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids right-padded to one length, and the mask that is 1 on real tokens; both `[B, L]`."""
    length = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return tokens.to(device), mask.to(device)
