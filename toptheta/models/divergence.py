"""How much a method's predictions differ from those of dense attention on the same text, token by token.

The first tokens of a text may be left dense, as a prompt is whose cache is sparse from then on; the others
are decode steps then. Logits are made of a few rows at a time.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from toptheta.methods.base import Method
from toptheta.models.control import get_params, reading_prompt, reading_steps, record_statistics, recorder_of
from toptheta.models.families import head_logits
from toptheta.models.generation import LOGIT_ROWS, hidden_states
from toptheta.models.kl import kl_divergence
from toptheta.models.patch import dense_for, patched_layers

COMPARED_ROWS = LOGIT_ROWS // 4  # at once: there are six tensors of the size of their logits


@dataclass(frozen=True)
class DenseReading:
    """The results of dense attention on a text. cache: K and V of its first tokens, None if there are none;
    hidden: `[B, T, E]`, the last layer's output for the others; seconds: that it took; prompts: the cache
    with what a method remembers of the first tokens for any K, by method; room: bytes that they may take."""

    cache: DynamicCache | None
    hidden: Tensor
    seconds: float = 0.0
    prompts: dict[Method, DynamicCache] = field(default_factory=dict)
    room: int = 0

    @property
    def nbytes(self) -> int:
        """Without the prompts."""
        return self.hidden.nbytes + _nbytes(self.cache)

    def keep(self, method: Method, cache: DynamicCache) -> None:
        """Keep a copy of a prompt for other K, if there is room."""
        if _nbytes(cache) + sum(map(_nbytes, self.prompts.values())) <= self.room:
            self.prompts[method] = copy.deepcopy(cache)


def _nbytes(cache: DynamicCache | None) -> int:
    layers = [] if cache is None else cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@dataclass(frozen=True)
class Prediction:
    """For each predicted token, `[B, T]` on the CPU: nll and dense_nll, -log p (nats, float32) of the method
    and of dense attention; kl, KL(dense || method) of the distributions (nats, float32); same_top, whether
    both have the same most likely token (bool)."""

    nll: Tensor
    dense_nll: Tensor
    kl: Tensor
    same_top: Tensor


@torch.no_grad()
def read_dense(model: Any, input_ids: Tensor, decode_from: int, prefill_chunk: int | None) -> DenseReading:
    """Compute `input_ids` `[B, Q]` (no padding) dense: the first `decode_from` tokens, then the others.
    prefill_chunk: tokens at once; None: all."""
    prompt, rest = input_ids[:, :decode_from], input_ids[:, decode_from:]
    with dense_for(model):
        cache = DynamicCache(config=model.config) if decode_from or prefill_chunk is not None else None
        if decode_from:
            for _ in hidden_states(model, prompt, cache, prefill_chunk):
                pass
        kept = copy.deepcopy(cache) if decode_from else None  # not every cache can be cropped
        hidden = torch.cat(list(hidden_states(model, rest, cache, prefill_chunk)), dim=1)
    return DenseReading(kept, hidden)


@torch.no_grad()
def against_dense(
    model: Any,
    input_ids: Tensor,
    decode_from: int,
    prefill_chunk: int | None,
    dense: DenseReading | None = None,
    judge: Any = None,
) -> Prediction:
    """Predictions of the model's current method, and of dense attention, for tokens decode_from + 1 to Q
    - 1 of `input_ids` `[B, Q]` (no padding), each given all before it.

    The first `decode_from` tokens are computed dense, for any method, and are not counted; the others
    are decode steps, computed layer by layer. Without such tokens all are rows of a prompt. A method that
    `needs_prompt` sees it, for its state.
    dense: what `read_dense` found for the same tokens, by `judge`; judge: the model that is dense, in another
    type for example; None: this one.
    """
    judge = model if judge is None else judge
    dense = dense or read_dense(judge, input_ids, decode_from, prefill_chunk)
    params = get_params(model)
    if judge is model and not params.sparse and recorder_of(model) is None:
        hidden = dense.hidden
    else:
        hidden = _read(model, input_ids, decode_from, prefill_chunk, dense if judge is model else None)
    wanted, parts = input_ids[:, decode_from + 1 :], list[Prediction]()
    rows = max(1, COMPARED_ROWS // len(wanted))
    for start in range(0, wanted.shape[1], rows):
        at = slice(start, min(start + rows, wanted.shape[1]))
        log_p, log_q = _log_probs(judge, dense.hidden[:, at]), _log_probs(model, hidden[:, at])
        parts.append(_prediction(log_p.to(log_q.device), log_q, wanted[:, at].to(log_q.device)))
    names = ("nll", "dense_nll", "kl", "same_top")
    return Prediction(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))


def _read(
    model: Any, input_ids: Tensor, decode_from: int, prefill_chunk: int | None, dense: DenseReading | None
) -> Tensor:
    """The last layer's output `[B, T, E]` for the tokens after the first `decode_from`, with the model's
    current method. dense: has the cache of the first tokens; None: compute it."""
    rest = input_ids[:, decode_from:]
    if not decode_from:
        cache = DynamicCache(config=model.config) if prefill_chunk is not None else None
        return torch.cat(list(hidden_states(model, rest, cache, prefill_chunk)), dim=1)
    cache = _read_prompt(model, input_ids[:, :decode_from], prefill_chunk, dense)
    return torch.cat(list(hidden_states(model, rest, cache, prefill_chunk, reading_steps)), dim=1)


def _read_prompt(
    model: Any, prompt: Tensor, prefill_chunk: int | None, dense: DenseReading | None
) -> DynamicCache:
    """The cache of a prompt, computed dense, with what the method remembers of it. Nothing is counted. What
    `dense` has of it is not computed again, and gets what other K can use."""
    method, seen = get_params(model).method, _rows_seen(model)
    known = None if dense is None else dense.cache
    if dense is not None and method in dense.prompts:
        return copy.deepcopy(dense.prompts[method])
    start = 0 if known is None or seen is None else max(0, prompt.shape[1] - seen)
    if seen and known is not None and any(getattr(layer, "is_sliding", False) for layer in known.layers):
        start = 0  # such a layer cannot be cropped
    cache = copy.deepcopy(known) if known is not None and start else DynamicCache(config=model.config)
    if 0 < start < prompt.shape[1]:
        cache.crop(start - prompt.shape[1])
    recorder = recorder_of(model)
    record_statistics(model, None)
    try:
        with dense_for(model) if seen == 0 else reading_prompt(model):
            if start < prompt.shape[1]:
                for _ in hidden_states(model, prompt[:, start:], cache, prefill_chunk):
                    pass
    finally:
        record_statistics(model, recorder)
    if dense is not None and seen is None and not method.prompt_needs_k:
        dense.keep(method, cache)
    return cache


def _rows_seen(model: Any) -> int | None:
    """Of how many last rows of a dense prompt the method remembers something; None: of all."""
    if not get_params(model).sparse or not get_params(model).method.needs_prompt:
        return 0
    specs = (layer.toptheta.spec for layer in patched_layers(model))
    rows = [spec.method.prompt_rows(spec.k, None) for spec in specs if spec.sparse]
    return None if None in rows else max(rows, default=0)


def _log_probs(model: Any, hidden: Tensor) -> Tensor:
    """`[B, R, V]` float32."""
    return head_logits(model, hidden).float().log_softmax(dim=-1)


def _prediction(log_p: Tensor, log_q: Tensor, wanted: Tensor) -> Prediction:
    """log_p, log_q: `[B, R, V]` of dense attention and of the method; wanted: `[B, R]`, the true tokens."""
    nll, dense_nll = (-x.gather(-1, wanted[..., None])[..., 0] for x in (log_q, log_p))
    same_top = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
    return Prediction(nll.cpu(), dense_nll.cpu(), kl_divergence(log_p, log_q).cpu(), same_top.cpu())
