"""Patching a model: every attention layer gets a LayerState, and the patch can be taken off again.

No forward is copied or replaced: our attention function and mask function are registered with transformers
(interface.py), and the stock forward of any known family calls them with the layer's module.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from toptheta.methods.params import LayerSpec
from toptheta.models.families import attention_layers
from toptheta.models.interface import IMPLEMENTATION
from toptheta.models.layer_state import LayerState, ModelState
from toptheta.models.tensor_parallel import mesh_of_heads
from toptheta.util.errors import UsageError


class TopK_LLamaAttention(LlamaAttention):
    """The published project's name for a patched LlamaAttention; otherwise unchanged. toptheta: the layer's
    state."""

    toptheta: LayerState

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        LayerState(layer_idx, ModelState()).attach(self)


def update_model(model: nn.Module, *_ignored, **_ignored_too) -> nn.Module:
    """Patch every attention layer of `model` in place, for `set_params`; also returns `model`.

    The model stays dense until `set_params` is called. Patching twice has no further effect. The model gets
    its own copy of its config, which contains the attention's name and may be shared with other models. The
    published project's arguments `reduce_gpu_mem` and `products_dir_path` are accepted and have no effect.
    Raises UsageError if the model's family is not supported (families.py).
    """
    _check_is_model(model)
    layers: list[Any] = attention_layers(model)
    if all(_is_patched(layer) for layer in layers):
        return model
    shared = next((layer.toptheta.shared for layer in layers if _is_patched(layer)), ModelState())
    _own_config(model)
    default = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    for layer in layers:
        if not _is_patched(layer):
            name = layer.config._attn_implementation
            base = default if name in (None, IMPLEMENTATION) else name
            LayerState(layer.layer_idx, shared, base, mesh_of_heads(model, layer)).attach(layer)
            if type(layer) is LlamaAttention:  # no method differs: the published project's users ask for it
                layer.__class__ = TopK_LLamaAttention
    return model


def restore_model(model: nn.Module) -> nn.Module:
    """Remove the patch in place; the inverse of `update_model`. Also returns `model`."""
    _check_is_model(model)
    layers: list[Any] = [module for module in model.modules() if _is_patched(module)]
    for layer in layers:
        layer.toptheta.shared.end_prompt_hooks()
        _set_implementation(layer, layer.toptheta.base)
        layer.toptheta.detach(layer)
        if type(layer) is TopK_LLamaAttention:
            layer.__class__ = LlamaAttention
    return model


def _check_is_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model is of type {type(model).__name__}: give the model itself, as from_pretrained of "
            "AutoModelForCausalLM returns it."
        )


def _is_patched(module: nn.Module) -> bool:
    return isinstance(getattr(module, "toptheta", None), LayerState)


def _own_config(model: nn.Module) -> None:
    """Give `model` and its modules copies of the configs that they hold, one for each."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            if id(config) not in copies:
                # the old one keeps its id while it is here
                copies[id(config)] = (copy.deepcopy(config), config)
            module.config = copies[id(config)][0]


def patched_layers(model: nn.Module) -> list[Any]:
    """The model's patched attention layers in order. A model that was loaded with, or set to,
    attn_implementation 'top_theta' is patched first. Raises UsageError if it has none."""
    _check_is_model(model)
    layers: list[Any] = [module for module in model.modules() if _is_patched(module)]
    if not layers:
        if getattr(getattr(model, "config", None), "_attn_implementation", None) != IMPLEMENTATION:
            raise UsageError(
                "the model is not patched: call update_model(model) first, or "
                "model.set_attn_implementation('top_theta')."
            )
        layers = attention_layers(update_model(model))
    return sorted(layers, key=lambda layer: layer.layer_idx)


def choose_implementation(layers: list[Any]) -> None:
    """Select the stock attention for completely dense models, ours for all others."""
    ours = any(layer.toptheta.ours for layer in layers)
    for layer in layers:
        if layer.config._attn_implementation != IMPLEMENTATION:  # the user may have chosen another one
            layer.toptheta.base = layer.config._attn_implementation
    for layer in layers:
        _set_implementation(layer, IMPLEMENTATION if ours else layer.toptheta.base)


def _set_implementation(layer: Any, name: str) -> None:
    # The internal name: the public setter would also rewrite the configs of submodels.
    layer.config._attn_implementation_internal = name


def model_device(model: PreTrainedModel) -> torch.device:
    """The device for inputs."""
    return execution_device(model.get_input_embeddings())


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: offloaded weights rest on 'meta' until a hook brings them."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks if hook is not None)
    return torch.device(next((place for place in places if place is not None), "cpu"))


def layer_states(model: nn.Module) -> list[LayerState]:
    """The states of the model's patched layers, in order. Raises UsageError if it has none."""
    return [layer.toptheta for layer in patched_layers(model)]


def model_state(model: nn.Module) -> ModelState:
    """The shared state of the layers of a patched model. Raises UsageError if the model is not patched."""
    return patched_layers(model)[0].toptheta.shared


@contextmanager
def dense_for(model: nn.Module) -> Iterator[None]:
    """Within this context every layer is dense, and nothing is counted or calibrated; afterwards the model is
    restored. The parameters of `get_params` and the tables do not change."""
    shared, layers = model_state(model), patched_layers(model)
    before = [(layer.toptheta.spec, layer.toptheta.calibration) for layer in layers]
    recorder, shared.recorder = shared.recorder, None
    for layer in layers:
        layer.toptheta.spec, layer.toptheta.calibration = LayerSpec(), None
    choose_implementation(layers)
    try:
        yield
    finally:
        for layer, (spec, calibration) in zip(layers, before):
            layer.toptheta.spec, layer.toptheta.calibration = spec, calibration
        shared.recorder = recorder
        choose_implementation(layers)
