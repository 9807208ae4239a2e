"""A tiny random model of every family, and what its attention calls must be by slow loops."""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.helpers.reference import attention
from toptheta.attention.call import AttentionCall, Counts
from toptheta.kernels import registry
from toptheta.models.families import FAMILIES

WINDOW = 8
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # what the CPU kernel takes
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # spreads the scores: with the usual 0.02 every attention row is flat
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
QWEN = MIXED | {"use_sliding_window": True}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


@dataclass(frozen=True)
class Tiny:
    """changes: of SIZES; windows: of each layer, None where it sees all."""

    changes: dict[str, Any] = field(default_factory=dict)
    windows: tuple[int | None, int | None] = (None, None)


EVERY, FIRST = (WINDOW, WINDOW), (WINDOW, None)
TINY = {
    "llama": Tiny({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "smollm3": Tiny(QWEN | {"no_rope_layers": [1, 0]}, FIRST),
    "mistral": Tiny({"sliding_window": WINDOW}, EVERY),
    "mixtral": Tiny({"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}, EVERY),
    "qwen2": Tiny(QWEN, FIRST),
    "qwen2_moe": Tiny(QWEN | EXPERTS | {"num_experts": 4}, FIRST),
    "qwen3": Tiny(QWEN, FIRST),
    "gemma": Tiny(),
    "gemma2": Tiny(
        MIXED | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 20},
        FIRST,
    ),
    "gemma3": Tiny(MIXED | {"query_pre_attn_scalar": 20}, FIRST),
    "phi3": Tiny({"sliding_window": WINDOW}, EVERY),
    "olmo2": Tiny(),
    "granite": Tiny({"attention_multiplier": 0.3, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "starcoder2": Tiny({"sliding_window": WINDOW}, EVERY),
    "gpt_oss": Tiny(
        MIXED
        | {"num_local_experts": 4, "num_experts_per_tok": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        FIRST,
    ),
}
NAMES = tuple(TINY)


@cache
def config_of(name: str) -> Any:
    family = next(family for family in FAMILIES if family.name == name)
    return AutoConfig.for_model(family.model_type, **(SIZES | TINY[name].changes))


def make(name: str, implementation: str = "eager", **changes) -> PreTrainedModel:
    """A model of the family, always with the same weights. changes: of its config."""
    torch.manual_seed(0)
    config = config_of(name).__class__.from_dict(config_of(name).to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for weight in model.parameters():
        if weight.dim() == 1:  # biases and sinks start at 0, norms at 0 or 1: let them count
            weight.data += 0.3 * torch.randn_like(weight)
    return model


@dataclass
class Seen:
    """One attention call: what was asked, and what came out."""

    call: AttentionCall
    out: Tensor
    counts: Counts | None
    backend: str


@contextmanager
def watched(monkeypatch):
    """The sparse attention calls made meanwhile, in order."""
    seen: list[Seen] = []
    attend = registry.attend

    def watch(call: AttentionCall):
        chosen = registry.choose(call)
        out, counts = attend(call)
        then = replace(call, k=call.k.clone(), v=call.v.clone())  # a static cache goes on changing
        seen.append(Seen(then, out, counts, chosen.name if chosen else "reference"))
        return out, counts

    with monkeypatch.context() as patch:
        patch.setattr(registry, "attend", watch)
        yield seen


def visible_of(one: Seen, last: int, real: Tensor, window: int | None) -> Tensor:
    """`[B, Q, N]` bool by the rule alone: what the rows of a call see whose last row is at position `last`.
    real: `[B, T]`, tokens that are not padding. A cache that has forgotten keys ends with the newest."""
    q_len, kv_len = one.call.q.shape[2], one.call.k.shape[2]
    rows = torch.arange(last + 1 - q_len, last + 1)[:, None]
    keys = (max(0, last + 1 - kv_len) + torch.arange(kv_len))[None]
    visible = (keys <= rows) & (keys < real.shape[1])
    if window is not None:
        visible = visible & (rows - keys < window)
    return visible & real[:, keys[0].clamp(max=real.shape[1] - 1)][:, None]


def check_by_loops(name: str, seen: list[Seen], lasts: list[int], real: Tensor) -> None:
    """Every layer of every forward pass is what loops compute. lasts: the last row's position, by pass."""
    assert len(seen) == 2 * len(lasts)
    for number, one in enumerate(seen):
        call, last = one.call, lasts[number // 2]
        visible = visible_of(one, last, real, TINY[name].windows[number % 2])
        out, kept = attention(
            call.q, call.k, call.v, visible, call.spec, call.scale, call.theta, call.sdc_table,
            call.softcap, call.sinks,
        )  # fmt: skip
        rows = real[:, last + 1 - call.q.shape[2] : last + 1]
        torch.testing.assert_close(
            one.out.double().transpose(1, 2)[rows],
            out.transpose(1, 2)[rows],
            rtol=2e-4,
            atol=2e-5,
            msg=lambda text, where=(name, number % 2, last): f"family, layer, last row: {where}: {text}",
        )
        if one.counts is not None:
            kept = kept & rows[:, None, :, None]
            assert torch.equal(one.counts.attn, kept.sum(dim=(2, 3)))
            groups = kept.view(kept.shape[0], call.k.shape[1], -1, *kept.shape[2:])
            assert torch.equal(one.counts.vrow, groups.sum(dim=(2, 3), dtype=torch.int32))
