"""What it costs the output to make one layer alone sparse: KL(dense || sparse) of the next token, measured on
prompts of the calibration, layer by layer.

The layers before the sparse one compute what they compute in a dense pass, so they are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from toptheta.calibration.budget import PROMPT_TOKENS, PROMPTS, BudgetCalibration
from toptheta.methods.base import NEG_INF
from toptheta.methods.params import AttentionParams, LayerSpec
from toptheta.models.kl import kl_divergence
from toptheta.models.patch import (
    choose_implementation,
    dense_for,
    execution_device,
    model_device,
    patched_layers,
)


def keep_prompts(model: nn.Module, calibration: BudgetCalibration) -> list[Any]:
    """Keep the first tokens of the first prompts that run through `model` from now on, of each batch the
    first one, without its padding; returns the hooks' handles. Prompts that are too short to be sparse are
    skipped."""
    masks: list[Any] = []  # of the call under way: the embedding does not see it

    def take_mask(_module: nn.Module, _inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        masks[:] = [keywords.get("attention_mask")]

    def look(_module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        ids = (inputs[0] if inputs else keywords["input"])[:1]
        mask = masks.pop() if masks else None
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= ids.shape[-1]:
            ids = ids[:, mask[0, -ids.shape[-1] :].to(ids.device).bool()]
        if len(calibration.prompts) < PROMPTS and ids.shape[-1] > 2 * min(calibration.ks):
            calibration.prompts.append(ids[:, :PROMPT_TOKENS].cpu())

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return [
        model.register_forward_pre_hook(take_mask, with_kwargs=True),
        embedding.register_forward_pre_hook(look, with_kwargs=True),
    ]


@torch.no_grad()
def measure(
    model: Any, prompts: list[Tensor], params: AttentionParams, log_thetas: list[float], k: int
) -> np.ndarray:
    """`[layers, thresholds]` mean KL(dense || sparse) in nats over the rows longer than `k`, with one layer
    sparse at one threshold on weights at a time."""
    layers = patched_layers(model)
    parent = {child: block for block in model.modules() for child in block.children()}
    blocks = [parent[layer] for layer in layers]
    states = [layer.toptheta for layer in layers]
    values = [getattr(state.calibration, "values", None) for state in states]
    damage = np.zeros((len(layers), len(log_thetas)))
    bar = tqdm(
        total=damage.size * len(prompts), desc=f"Sensitivity of layers, K={k}", unit="forward", disable=None
    )
    eagerly = torch.compiler.set_stance("force_eager")  # a compiled model does not see hooks that come later
    with bar, dense_for(model), eagerly:
        for ids in prompts:
            ids = ids.to(model_device(model))
            with _taken(blocks) as inputs:
                dense = _log_probs(model, ids, k)
            for i, state in enumerate(states):
                shape, device = (layers[i].config.num_attention_heads, k + 2), execution_device(layers[i])
                try:
                    for j, log_theta in enumerate(log_thetas):
                        theta = torch.full(shape, NEG_INF, device=device)
                        theta[:, k + 1] = float(np.exp(log_theta))
                        state.spec, state.theta, state.values = params.layer(k), theta, values[i]
                        choose_implementation(layers)
                        with _from(blocks[: i + 1], inputs[i]):
                            kl = kl_divergence(dense, _log_probs(model, ids, k)).mean()
                        damage[i, j] += float(kl) / len(prompts)
                        bar.update()
                finally:
                    state.spec, state.theta, state.values = LayerSpec(), None, None
                    choose_implementation(layers)
    return damage


@contextmanager
def _taken(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the block, the inputs `[B, Q, E]` of a model's decoder layers are appended to a list."""
    inputs: list[Tensor] = []

    def take(_module: nn.Module, args: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        inputs.append(args[0] if args else keywords["hidden_states"])

    hooks = [block.register_forward_pre_hook(take, with_kwargs=True) for block in blocks]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _from(blocks: list[nn.Module], hidden: Tensor) -> Iterator[None]:
    """Within the block, `hidden` is the input of the last of a model's first decoder layers, and those before
    it compute nothing."""
    skipped = blocks[:-1]
    own = [block.__dict__.get("forward") for block in skipped]  # a library that moves weights sets its own
    for block in skipped:
        block.forward = lambda *args, **keywords: hidden
    try:
        yield
    finally:
        for block, forward in zip(skipped, own):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _log_probs(model: Any, ids: Tensor, k: int) -> Tensor:
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=max(1, ids.shape[1] - k)).logits[0]
    return logits.float().log_softmax(dim=-1)
