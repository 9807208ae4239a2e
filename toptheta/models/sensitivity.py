"""What it costs the output to make one layer alone sparse: KL(dense || sparse) of the next token, measured on
prompts of the calibration, layer by layer.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from toptheta.calibration.budget import PROMPT_TOKENS, PROMPTS, BudgetCalibration
from toptheta.methods.params import AttentionParams, LayerSpec
from toptheta.models.patch import choose_implementation, patched_layers


def keep_prompts(model: nn.Module, calibration: BudgetCalibration) -> Any:
    """Keep the first tokens of the first prompts that run through `model` from now on; returns the hook's
    handle. A prompt that is too short to be sparse is passed over."""

    def look(_module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        ids = inputs[0] if inputs else keywords["input"]
        if len(calibration.prompts) < PROMPTS and ids.shape[-1] > 2 * min(calibration.ks):
            calibration.prompts.append(ids[:1, :PROMPT_TOKENS].cpu())

    return model.get_input_embeddings().register_forward_pre_hook(look, with_kwargs=True)  # type: ignore[operator]


@torch.no_grad()
def measure(
    model: Any, prompts: list[Tensor], params: AttentionParams, log_thetas: list[float], k: int
) -> np.ndarray:
    """`[layers, thresholds]` mean KL(dense || sparse) in nats over the rows longer than `k`, with one layer
    sparse at one threshold on weights at a time."""
    layers = patched_layers(model)
    states = [layer.toptheta for layer in layers]
    before = [(state.spec, state.theta, state.sdc_table, state.values, state.calibration) for state in states]
    recorder, states[0].shared.recorder = states[0].shared.recorder, None
    damage = np.zeros((len(layers), len(log_thetas)))
    device = model.get_input_embeddings().weight.device
    bar = tqdm(total=damage.size * len(prompts), desc=f"Sensitivity of layers, K={k}", unit="forward")
    try:
        for state in states:
            if isinstance(state.calibration, BudgetCalibration):
                state.values = state.calibration.values
            state.spec, state.theta, state.sdc_table, state.calibration = LayerSpec(), None, None, None
        for ids in prompts:
            ids = ids.to(device if device.type != "meta" else model.device)
            choose_implementation(layers)
            dense = _log_probs(model, ids, k)
            for i, state in enumerate(states):
                for j, log_theta in enumerate(log_thetas):
                    theta = torch.full((layers[i].config.num_attention_heads, k + 2), float("-inf"))
                    theta[:, k + 1] = float(np.exp(log_theta))
                    state.spec, state.theta = params.layer(k), theta.to(ids.device)
                    choose_implementation(layers)
                    sparse = _log_probs(model, ids, k)
                    damage[i, j] += float((dense.exp() * (dense - sparse)).sum(dim=-1).mean()) / len(prompts)
                    bar.update()
                state.spec, state.theta = LayerSpec(), None
    finally:
        bar.close()
        for state, kept in zip(states, before):
            state.spec, state.theta, state.sdc_table, state.values, state.calibration = kept
        states[0].shared.recorder = recorder
        choose_implementation(layers)
    return damage


def _log_probs(model: Any, ids: Tensor, k: int) -> Tensor:
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=max(1, ids.shape[1] - k)).logits[0]
    return logits.float().log_softmax(dim=-1)
