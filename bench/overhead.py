#!/usr/bin/env python3
"""What a layer costs apart from its arithmetic: microseconds a layer of a decode step, in a model of tiny
sizes.

    .venv/bin/python bench/overhead.py

30 layers of 4 heads behind 100 tokens, one thread; the best of five times 30 steps. Dense runs stock
attention, so that its number is transformers' own; the others differ from it by what the call, the cache's
sum of V and the statistics take.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toptheta.models.control import record_statistics, set_params
from toptheta.models.patch import update_model
from toptheta.models.recorder import Recorder

LAYERS, STEPS = 30, 30


def microseconds(model: LlamaForCausalLM, ids: torch.Tensor, statistics: bool) -> float:
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    recorder = Recorder() if statistics else None
    record_statistics(model, recorder)
    one, times = ids[:, :1], []
    for _ in range(10):
        model(one, past_key_values=cache)
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(STEPS):
            model(one, past_key_values=cache)
        times.append(time.perf_counter() - start)
    record_statistics(model, None)
    return min(times) / STEPS / LAYERS * 1e6


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = update_model(LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=4096)).eval())
    ids = torch.randint(0, 97, (1, 100))
    set_params(model, mode=3)
    print(f"dense                  {microseconds(model, ids, False):6.1f} us a layer")
    set_params(model, mode=0, K=16, sdc="exact", vmc=True, calibrate=True, calib_sample_frac=1.0)
    model(ids)
    set_params(model, calibrate=False)
    print(f"Top-theta              {microseconds(model, ids, False):6.1f}")
    print(f"Top-theta, statistics  {microseconds(model, ids, True):6.1f}")


if __name__ == "__main__":
    main()
