"""The families of models that are known, as data: which class holds their attention, and what of it differs
from Llama's. All of them call transformers' attention interface, so one attention function serves them all
(interface.py); tests/models/test_families.py runs every row of this table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toptheta.util.errors import UsageError

if TYPE_CHECKING:  # importing torch takes seconds, and naming a model needs this file
    from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """name: the folder of its code in transformers.models; title: its models; attention: the class of its
    attention layers; differs: how its attention differs from Llama's; config: the `model_type` of its
    configs, if it is not the name."""

    name: str
    title: str
    attention: str
    differs: str = ""
    config: str = ""

    @property
    def model_type(self) -> str:
        return self.config or self.name

    @property
    def attention_class(self) -> tuple[str, str]:
        return f"transformers.models.{self.name}.modeling_{self.name}", self.attention


FAMILIES = (
    Family("llama", "Llama 2, 3, 3.1, 3.2, CodeLlama, SmolLM, SmolLM2", "LlamaAttention"),
    Family("smollm3", "SmolLM3", "SmolLM3Attention", "layers without RoPE; windows by layer"),
    Family("mistral", "Mistral", "MistralAttention", "sliding window"),
    Family("mixtral", "Mixtral", "MixtralAttention", "sliding window, experts"),
    Family("qwen2", "Qwen2, Qwen2.5", "Qwen2Attention", "biases; windows by layer"),
    Family("qwen2_moe", "Qwen2-MoE", "Qwen2MoeAttention", "windows by layer (in the mask only), experts"),
    Family("qwen3", "Qwen3", "Qwen3Attention", "q/k norm; windows by layer"),
    Family("gemma", "Gemma", "GemmaAttention", "wide heads"),
    Family("gemma2", "Gemma 2", "Gemma2Attention", "capped scores, own scale, every other layer windowed"),
    Family(
        "gemma3",
        "Gemma 3 (text)",
        "Gemma3Attention",
        "q/k norm, own scale, five of six layers windowed",
        "gemma3_text",
    ),
    Family("phi3", "Phi-3, Phi-3.5, Phi-4", "Phi3Attention", "q, k, v in one projection; sliding window"),
    Family("olmo2", "OLMo 2", "Olmo2Attention", "norm over all heads of q and k"),
    Family("granite", "Granite", "GraniteAttention", "own scale"),
    Family("starcoder2", "Starcoder2", "Starcoder2Attention", "biases, sliding window"),
    Family("gpt_oss", "gpt-oss", "GptOssAttention", "sinks, every other layer windowed, experts"),
)
MODEL_TYPES = tuple(family.model_type for family in FAMILIES)
_BY_CLASS = {family.attention_class: family for family in FAMILIES}

# Arguments of the attention function that have no effect there: windows are in the mask, positions in the
# queries and keys, and the others are for other parts of the model.
WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "sliding_window",
        "token_type_ids",
        "tokenizer",  # of generate(), as `transformers serve` calls it
        "use_cache",
    }
)


def family_of(module: nn.Module) -> Family | None:
    """The family of `module` if it is an attention layer of one (or of a subclass); otherwise None."""
    for kind in type(module).__mro__:
        if (family := _BY_CLASS.get((kind.__module__, kind.__qualname__))) is not None:
            return family
    return None


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The model's attention layers in order. Raises UsageError if it has none of a supported family."""
    layers: list[Any] = [module for module in model.modules() if family_of(module) is not None]
    if not layers:
        kind = getattr(getattr(model, "config", None), "model_type", "") or "unknown"
        raise UsageError(
            f"{type(model).__name__} (model type {kind!r}) has no attention layer of a supported family: use "
            f"a model of {', '.join(MODEL_TYPES)}, or add the family (CONTRIBUTING.md)."
        )
    if not hasattr(model, "config"):
        raise UsageError(
            f"{type(model).__name__} is a wrapper without a config: give the model in it instead."
        )
    outer, inner = (getattr(x.config, "model_type", None) for x in (model, layers[0]))
    if outer != inner:
        raise UsageError(
            f"{type(model).__name__} (model type {outer!r}) contains a language model of type {inner!r} and "
            "other parts, whose masks top_theta does not support: load the language model alone."
        )
    return sorted(layers, key=lambda layer: layer.layer_idx)


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise UsageError for an argument of the attention function that would be ignored, unless it is known to
    have no effect."""
    unknown = [name for name, x in arguments.items() if x is not None and name not in WITHOUT_EFFECT]
    if unknown:
        raise UsageError(
            f"the model passes {', '.join(unknown)} to its attention, which top_theta does not support: "
            "leave it out, or use attn_implementation 'eager' or 'sdpa'."
        )


def eager_of(module: nn.Module) -> Callable:
    """The eager attention function of a module's family, which supports its sinks and caps."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UsageError(f"{type(module).__name__} has no eager attention: top_theta cannot compute it densely.")


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """The logits `[..., V]` for the last layer's output `[..., E]`, scaled or capped as in the model's
    family."""
    logits = model.lm_head(hidden)
    scaling = getattr(model.config, "logits_scaling", None)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if scaling is not None:
        logits = logits / scaling
    return logits if cap is None else (logits / cap).tanh() * cap


def check_head(model: Any, what: str) -> None:
    """Raise UsageError for a model without `lm_head`; what: needs its logits."""
    if not hasattr(model, "lm_head"):
        raise UsageError(
            f"{what} needs a causal language model, and {type(model).__name__} has no lm_head: load the "
            f"model with AutoModelForCausalLM, or leave {what} out."
        )


def sliding_window(layer: Any) -> int | None:
    """The most keys that a row of an attention layer sees, by the layer's config; None: all."""
    window, kinds = getattr(layer.config, "sliding_window", None), getattr(layer.config, "layer_types", None)
    if window is None or kinds is not None and kinds[layer.layer_idx] != "sliding_attention":
        return None
    return int(window)
