"""The tiny random Llama, token ids for it, and methods that steer it."""

import copy
import pickle
from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from topk_llama import set_params, update_model


def tiny_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,  # what the CPU kernel takes
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # spreads the scores: with the usual 0.02 every attention row is flat
    }
    return LlamaConfig(**(sizes | changes))


SPARSE = {
    "Top-k": {"mode": 1, "K": 6, "sdc": "exact", "vmc": True},
    "Top-k post": {"mode": 1, "K": 6, "placement": "post-softmax", "vmc": True},
    "Top-theta": {"mode": 0, "K": 6, "sdc": "exact", "vmc": True},
    "Top-theta post": {"mode": 0, "K": 6, "placement": "post-softmax", "vmc": True},
    "Top-theta capped": {"mode": 0, "K": 6, "sdc": "exp-threshold", "capk": True},
    "Top-theta offline": {"mode": 0, "K": 6, "sdc": "offline-calibrated", "vmc": True},
}


def tokens(batch: int = 1, length: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def steer(model: LlamaForCausalLM, params: dict) -> None:
    """Patch, and calibrate on a few prompts where the parameters need it."""
    update_model(model)
    thresholds = params.get("mode") == 0 or params.get("method", "").startswith("top_theta")
    if thresholds or params.get("sdc") == "offline-calibrated":
        set_params(model, **params, calibrate=True, calib_sample_frac=1.0)
        for seed in range(3):
            model(tokens(length=60, seed=seed))
    set_params(model, **params, calibrate=False)


def copies(model: LlamaForCausalLM, stock: LlamaForCausalLM) -> Iterator[LlamaForCausalLM]:
    """A deepcopy, and one by pickle, where transformers' own model can be pickled: with some releases and the
    package `kernels` it cannot."""
    yield copy.deepcopy(model)
    try:
        pickle.dumps(stock)
    except AttributeError:
        return
    yield pickle.loads(pickle.dumps(model))
