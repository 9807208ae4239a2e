#!/usr/bin/env python3
"""Milliseconds of a decode step with transformers' DynamicCache, and with one that grows in place
(toptheta/models/growing_cache.py). Dense attention, SmolLM2, medians of interleaved steps.

    .venv/bin/python bench/growing_cache.py [--tokens N] [--batches B[,B]] [--steps S] [--threads T]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import DynamicCache

from bench.attention import device_name
from toptheta.models.growing_cache import growing_cache
from toptheta.models.loading import find_model, load_model
from toptheta.report.tables import table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time decode steps with a cache that grows in place.")
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(find_model("smollm2"), "float32", "cpu").eval()
    first = DynamicCache(config=model.config)
    ids = torch.randint(5, 40000, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    model(ids, past_key_values=first, logits_to_keep=1)
    rows = []
    for batch in map(int, args.batches.split(",")):
        caches = {"stock": DynamicCache(config=model.config), "growing": growing_cache(model.config)}
        times: dict[str, list[float]] = {name: [] for name in caches}
        for cache in caches.values():
            for i, layer in enumerate(first.layers):
                keys, values = (x.repeat(batch, 1, 1, 1) for x in (layer.keys, layer.values))
                cache.update(keys, values, i)
        new = ids[:, :1].repeat(batch, 1)
        for step in range(args.steps + 2):
            for name, cache in caches.items():
                start = time.perf_counter()
                model(new, past_key_values=cache)
                if step >= 2:  # the first ones warm up
                    times[name].append(time.perf_counter() - start)
        stock, ours = (1000 * statistics.median(times[name]) for name in ("stock", "growing"))
        rows.append([str(batch), f"{stock:.0f}", f"{ours:.0f}", f"{ours / stock:.2f}"])
    print(f"{device_name()}, {args.threads} threads, torch {torch.__version__}, {args.tokens} tokens\n")
    print(table(rows, ["sequences", "stock, ms", "growing, ms", "ratio"]))


if __name__ == "__main__":
    main()
