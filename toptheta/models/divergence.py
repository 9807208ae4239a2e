"""How far a method is from dense attention in what it predicts: both read the same text, token by token.

The first tokens of a text may be left dense, as a prompt is whose cache is sparse from then on. Both passes
run window by window, so that the logits of a few rows at a time are all that is held.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from toptheta.models.control import get_params
from toptheta.models.generation import LOGIT_ROWS, hidden_states
from toptheta.models.kl import kl_divergence
from toptheta.models.patch import dense_for

COMPARED_ROWS = LOGIT_ROWS // 4  # at once: there are six tensors of the size of their logits


@dataclass(frozen=True)
class Prediction:
    """Of each predicted token, `[B, T]` on the CPU: nll and dense_nll, -log p (nats, float32) by the method
    and by dense attention; kl, KL(dense || method) of the whole prediction (nats, float32); same_top, whether
    both find the same token the likeliest (bool)."""

    nll: Tensor
    dense_nll: Tensor
    kl: Tensor
    same_top: Tensor


@torch.no_grad()
def against_dense(model: Any, input_ids: Tensor, decode_from: int, prefill_chunk: int | None) -> Prediction:
    """What the method that the model is set to predicts, and dense attention, of tokens decode_from + 1 to Q
    - 1 of `input_ids` `[B, Q]` (no padding), each given all before it.

    The first `decode_from` tokens go through the model dense, for any method, and are not counted; the others
    follow in one call, or `prefill_chunk` at a time. A method with a state has not seen the first rows, only
    their keys. A model that is dense is not read twice: it is 0 away from itself.
    """
    prompt, rest = input_ids[:, :decode_from], input_ids[:, decode_from:]
    chunked = prefill_chunk is not None and prefill_chunk < rest.shape[1]
    cache = DynamicCache(config=model.config) if decode_from or chunked else None
    dense: Tensor | None = None
    with dense_for(model):
        if decode_from:
            for _ in hidden_states(model, prompt, cache, prefill_chunk):
                pass
        if get_params(model).sparse:
            dense = torch.cat(list(hidden_states(model, rest, cache, prefill_chunk)), dim=1)
            if cache is not None:
                cache.crop(-rest.shape[1])
    parts, start = list[Prediction](), 0
    for hidden in hidden_states(model, rest, cache, prefill_chunk):
        targets = rest[:, start + 1 : start + 1 + hidden.shape[1]]
        for i in range(0, targets.shape[1], COMPARED_ROWS):
            wanted = targets[:, i : i + COMPARED_ROWS]
            stop = i + wanted.shape[1]
            log_q = _log_probs(model, hidden[:, i:stop])
            log_p = log_q if dense is None else _log_probs(model, dense[:, start + i : start + stop])
            parts.append(_prediction(log_p, log_q, wanted.to(log_q.device)))
        start += hidden.shape[1]
    names = [field.name for field in fields(Prediction)]
    return Prediction(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))


def _log_probs(model: Any, hidden: Tensor) -> Tensor:
    """`[B, R, V]` float32."""
    return model.lm_head(hidden).float().log_softmax(dim=-1)


def _prediction(log_p: Tensor, log_q: Tensor, wanted: Tensor) -> Prediction:
    """log_p, log_q: `[B, R, V]` of dense attention and of the method; wanted: `[B, R]` the real tokens."""
    nll, dense_nll = (-x.gather(-1, wanted[..., None])[..., 0] for x in (log_q, log_p))
    same_top = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
    return Prediction(nll.cpu(), dense_nll.cpu(), kl_divergence(log_p, log_q).cpu(), same_top.cpu())
