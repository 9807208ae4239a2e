"""The drop-in for Hugging Face's LlamaAttention: patching a model, and taking the patch off again.

`LlamaAttention.forward` is not copied: our attention function and mask function are registered with
transformers (interface.py), and the stock forward calls them with the layer's module.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from toptheta.methods.params import LayerSpec
from toptheta.models.interface import IMPLEMENTATION
from toptheta.models.layer_state import LayerState, ModelState
from toptheta.util.errors import UsageError


class TopK_LLamaAttention(LlamaAttention):
    """LlamaAttention that computes the method that `set_params` says: Top-theta (mode 0), Top-k (mode 1),
    dense, or another of toptheta/methods. toptheta: what the layer remembers."""

    toptheta: LayerState

    def __init__(self, config, layer_idx: int, shared: ModelState | None = None):
        super().__init__(config, layer_idx)
        self.base_implementation = "sdpa"
        self.toptheta = LayerState(layer_idx, shared or ModelState())

    @classmethod
    def replacing(
        cls, attention: LlamaAttention, base_implementation: str, shared: ModelState
    ) -> "TopK_LLamaAttention":
        """A module that takes over the projections of `attention`, whatever their device, offloading or
        wrapping."""
        with torch.device("meta"):  # the new projections are thrown away: they must cost no memory
            new = cls(attention.config, attention.layer_idx, shared)
        new._modules = attention._modules | {"toptheta": new.toptheta}
        new._forward_hooks = (
            attention._forward_hooks
        )  # transformers' capture of output_attentions lives there
        new.train(attention.training)
        new.base_implementation = base_implementation
        object.__setattr__(new, "_original", attention)  # not a submodule: its children are ours already
        return new

    def restored(self) -> LlamaAttention:
        """The stock module, with the projections as they are now."""
        original: LlamaAttention = self._original
        original._modules = {name: child for name, child in self._modules.items() if name != "toptheta"}
        original._forward_hooks = self._forward_hooks
        original.train(self.training)
        return original

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As LlamaAttention's; the cache is looked at before it is updated, see value_sum.py."""
        self.toptheta.begin(past_key_values)
        try:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        finally:
            self.toptheta.end()


def update_model(model: nn.Module, *_ignored, **_ignored_too) -> nn.Module:
    """Put TopK_LLamaAttention in place of every LlamaAttention of `model`, in place; also returns `model`.

    Dense until `set_params` says otherwise. Doing it twice changes nothing. The model gets a config of its
    own, for the attention's name stands there, and other models may share it. Further arguments of the
    published project (`reduce_gpu_mem`, `products_dir_path`) are accepted and have no effect. Raises
    UsageError when the model has no LlamaAttention.
    """
    stock = [module for module in model.modules() if isinstance(module, LlamaAttention)]
    if not stock:
        raise UsageError(
            f"{type(model).__name__} has no LlamaAttention layer, so there is nothing to patch: use a "
            "model of the "
            "Llama family (architecture LlamaForCausalLM)."
        )
    if all(isinstance(module, TopK_LLamaAttention) for module in stock):
        return model
    known = [module.toptheta.shared for module in stock if isinstance(module, TopK_LLamaAttention)]
    shared = known[0] if known else ModelState()
    _own_config(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LlamaAttention) and not isinstance(child, TopK_LLamaAttention):
                base = child.config._attn_implementation or "sdpa"
                base = "sdpa" if base == IMPLEMENTATION else base
                _exchange(parent, name, child, TopK_LLamaAttention.replacing(child, base, shared))
    return model


def restore_model(model: nn.Module) -> nn.Module:
    """Put the stock LlamaAttention back, in place; the inverse of `update_model`. Also returns `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TopK_LLamaAttention):
                _set_implementation(child, child.base_implementation)
                _exchange(parent, name, child, child.restored())
    return model


def _own_config(model: nn.Module) -> None:
    """Give `model` and its modules copies of the configs that they hold, one for each."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            if id(config) not in copies:
                copies[id(config)] = (
                    copy.deepcopy(config),
                    config,
                )  # the old one keeps its id while it is here
            module.config = copies[id(config)][0]


def _exchange(parent: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in place of `old`, with accelerate's hook, which is there when a device map names the
    attention modules themselves."""
    hook = getattr(old, "_hf_hook", None)
    setattr(parent, name, new)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)


def patched_layers(model: nn.Module) -> list[TopK_LLamaAttention]:
    """The model's patched attention layers in order. Raises UsageError when it has none."""
    layers = [module for module in model.modules() if isinstance(module, TopK_LLamaAttention)]
    if not layers:
        raise UsageError("the model is not patched: call update_model(model) first.")
    return sorted(layers, key=lambda layer: layer.layer_idx)


def choose_implementation(layers: list[TopK_LLamaAttention]) -> None:
    """Plainly dense models run the stock attention by its own name; all others run ours."""
    ours = any(layer.toptheta.ours for layer in layers)
    for layer in layers:
        _set_implementation(layer, IMPLEMENTATION if ours else layer.base_implementation)


def _set_implementation(layer: TopK_LLamaAttention, name: str) -> None:
    # The internal name: the public setter would also rewrite the configs of submodels.
    layer.config._attn_implementation_internal = name


def model_device(model: PreTrainedModel) -> torch.device:
    """The device that inputs go to."""
    return model.get_input_embeddings().weight.device if model.device.type == "meta" else model.device


def layer_states(model: nn.Module) -> list[LayerState]:
    """What the model's patched layers remember, in order. Raises UsageError when it has none."""
    return [layer.toptheta for layer in patched_layers(model)]


def model_state(model: nn.Module) -> ModelState:
    """What the layers of a patched model share. Raises UsageError when the model is not patched."""
    return patched_layers(model)[0].toptheta.shared


@contextmanager
def dense_for(model: nn.Module) -> Iterator[None]:
    """Within this context every layer is dense, and nothing is counted or calibrated; afterwards the model
    is as it was. The parameters that `get_params` reads and the tables stay in place all the time."""
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
