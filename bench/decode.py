#!/usr/bin/env python3
"""Decode of a whole model behind a long context: milliseconds a step, and the ratio to the fastest dense.

    .venv/bin/python bench/decode.py [--device cuda] [--lengths N,N] [--batches B,B] [--output FILE]

The model has Llama-3-8B's shape and random weights in bfloat16 (--shape tiny: a toy, to try the script on a
CPU). Every method decodes behind the same prompt of random tokens, over the same K and V, in a static cache,
by torch.compile in 'reduce-overhead' mode, which replays CUDA graphs (--eager: neither).

Dense is the same model with transformers' own 'sdpa' (which, with a mask, repeats K and V for the heads of a
group), 'sdpa' that does not repeat them, 'sdpa' by cuDNN, transformers' 'flash_attention_2', and our kernel
with thresholds that drop nothing. With --when_slower dense, the default here, thresholds give way to dense
attention where a profile of the GPU (python -m toptheta.kernels.tune) says that they are slower; the table
says in how many layers they did. Without a profile they never do. The ratio is to the fastest of them that
ran, which the table names. All methods take turns, a block of steps each; the numbers are medians of
blocks. Thresholds (K=512, calib_tac) are calibrated on another prompt's last rows; "kept" is what they then
keep in decode. Random weights make flat attention rows, which thresholds cut less sharply than those of a
trained model. Leaves out the prefill, sampling, and tokenization.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations import sdpa_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.attention import device_name
from toptheta.kernels.profile import profile_of
from toptheta.methods.params import WHEN_SLOWER
from toptheta.models.cache import TopThetaCache
from toptheta.models.control import record_statistics, set_params
from toptheta.models.patch import layer_states, update_model
from toptheta.models.recorder import Recorder
from toptheta.models.when_slower import is_dense
from toptheta.util.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
SHAPES: dict[str, dict[str, int]] = {
    "Llama-3-8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 1 << 18,
    },
    "tiny": {
        "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1 << 18,
    },
}  # fmt: skip
CHUNK = 2048  # tokens of a prefill at a time
CALIBRATION_ROWS = 64
DENSE: dict[str, Any] = {"mode": 3, "sdc": "none", "vmc": False}
THETA: dict[str, Any] = {"mode": 0, "sdc": "exact", "vmc": True}
METHODS: dict[str, tuple[dict[str, Any], type[StaticCache], dict[str, bool]]] = {
    "stock sdpa": (DENSE, StaticCache, {}),
    "sdpa, grouped": (DENSE, StaticCache, {}),
    "sdpa, cuDNN": (DENSE, StaticCache, {}),
    "flash_attention_2": (DENSE, StaticCache, {}),
    "dense, ours": ({"mode": 0, "sdc": "none", "vmc": False}, TopThetaCache, {}),
    "Top-theta": (THETA, TopThetaCache, {}),
    "Top-theta, int8 K": (THETA, TopThetaCache, {"two_tier": True}),
    "Top-theta, int4 copy": (
        {"method": "top_theta:key_copy=int4", "sdc": "exact", "vmc": True},
        TopThetaCache,
        {},
    ),
    "Top-k": (THETA | {"mode": 1}, TopThetaCache, {}),
}
BASELINES = list(METHODS)[:5]


class Bench:
    def __init__(
        self,
        shape: str,
        device: torch.device,
        k: int,
        steps: int,
        blocks: int,
        eager: bool,
        when_slower: str = "sparse",
    ):
        self.device, self.k, self.steps, self.blocks = device, k, steps, blocks
        self.when_slower = when_slower
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with device:
            self.model = update_model(LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval())
        torch.set_default_dtype(torch.float32)
        self.steps_of: dict[str, Callable[..., Any]] = dict.fromkeys(METHODS, self.model.forward)
        if not eager:
            torch._dynamo.config.cache_size_limit = 64
            self.steps_of = {name: self.compiled(name) for name in METHODS}

    def compiled(self, name: str) -> Callable[..., Any]:
        """The model's forward for one method. Graphs are kept by code object, and not every baseline's
        setting is among what they are guarded by: each method has a code object of its own."""
        model = self.model

        def step(**kwargs):
            return model.forward(**kwargs)

        code = step.__code__.replace(co_name=f"step_{list(METHODS).index(name)}")
        own = FunctionType(code, step.__globals__, closure=step.__closure__)
        return torch.compile(own, mode="reduce-overhead", fullgraph=True)

    def prompt(self, batch: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.model.config.vocab_size
        return torch.randint(vocabulary, (batch, length), generator=generator).to(self.device)

    def read(self, ids: Tensor, cache: StaticCache) -> None:
        for chunk in ids.split(CHUNK, dim=1):
            self.model(chunk, past_key_values=cache, logits_to_keep=1)

    def calibrate(self, length: int) -> None:
        """Thresholds for rows of about this length."""
        set_params(self.model, **DENSE)
        ids = self.prompt(1, length, 1)
        cache = StaticCache(config=self.model.config, max_cache_len=length)
        self.read(ids[:, :-CALIBRATION_ROWS], cache)
        options = {"calib_tac": True, "calib_sample_frac": 1.0}
        set_params(self.model, **THETA, K=self.k, **options, calibrate=True)
        self.model(ids[:, -CALIBRATION_ROWS:], past_key_values=cache, logits_to_keep=1)
        set_params(self.model, calibrate=False)

    def caches(self, ids: Tensor) -> dict[str, StaticCache | str]:
        """A cache with the prompt for each method, all over the same K and V; or why there is none."""
        set_params(self.model, **DENSE)
        length = ids.shape[1]
        found: dict[str, StaticCache | str] = {}
        first = StaticCache(config=self.model.config, max_cache_len=length + self.steps)
        self.read(ids, first)
        for name, (_, kind, options) in METHODS.items():
            cache = first
            if kind is not StaticCache:
                cache = kind(self.model.config, length + self.steps, **options)
                try:
                    for layer, filled in zip(cache.layers, first.layers):
                        adopt(layer, filled, length)
                except UsageError as error:
                    found[name] = str(error)
                    continue
            found[name] = cache
        return found

    @contextmanager
    def as_method(self, name: str) -> Iterator[None]:
        """The model as a method needs it."""
        when_slower = "sparse" if name in BASELINES else self.when_slower
        set_params(self.model, **METHODS[name][0], K=self.k, when_slower=when_slower)
        if name == "dense, ours":
            for state in layer_states(self.model):
                state.theta = torch.full_like(state.theta, -math.inf)
        with ExitStack() as stack:
            if name == "sdpa, grouped":
                # What TRANSFORMERS_SDPA_FORCE_GQA=1 does.
                stack.enter_context(mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda *_: True))
            if name == "sdpa, cuDNN":
                stack.enter_context(sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
            if name == "flash_attention_2":
                before = self.model.config._attn_implementation
                self.model.set_attn_implementation(name)
                stack.callback(self.model.set_attn_implementation, before)
            yield

    def block(self, name: str, cache: StaticCache, ids: Tensor, length: int) -> float:
        """Seconds of a step."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.steps):
            self.steps_of[name](input_ids=ids, past_key_values=cache)
        synchronize(self.device)
        return (time.perf_counter() - start) / self.steps

    def measure(self, batch: int, length: int) -> dict[str, Any]:
        self.calibrate(length)
        ids = self.prompt(batch, length, 2)
        caches = self.caches(ids)
        one = ids[:, -1:].contiguous()
        calls: dict[str, Callable[[], float]] = {}
        cells: dict[str, Any] = {}
        for name, cache in caches.items():
            if isinstance(cache, str):
                cells[name] = {"not run": cache}
                continue
            calls[name] = partial(self.block, name, cache, one, length)
        times: dict[str, list[float]] = {name: [] for name in calls}
        dense_layers = dict.fromkeys(calls, 0)
        choosers = [state.now.chooser for state in layer_states(self.model)]
        for i in range(self.blocks + 2):  # the first two compile and record graphs
            for name in list(calls):
                for chooser in choosers:
                    chooser.last = None
                try:
                    with self.as_method(name):
                        seconds = calls[name]()
                except Exception as error:  # a baseline's own limits must not end the table
                    if i >= 2 or name not in BASELINES or name == "dense, ours":
                        raise
                    del calls[name]
                    said = str(error).strip().splitlines()
                    cells[name] = {"not run": f"{type(error).__name__}: {said[0] if said else ''}"[:150]}
                    continue
                if i >= 2:
                    times[name].append(seconds)
                # A compiled model chooses when it is traced, any other in each step.
                found = sum(is_dense(chooser.last) for chooser in choosers)
                dense_layers[name] = max(dense_layers[name], found)
        medians = {name: statistics.median(times[name]) for name in calls}
        best = min((name for name in BASELINES if name in medians), key=lambda name: medians[name])
        for name, seconds in medians.items():
            cells[name] = {"ms": round(1e3 * seconds, 3), "ratio": round(seconds / medians[best], 3)}
            if dense_layers[name]:
                cells[name]["dense layers"] = dense_layers[name]
        kept = self.kept(caches["Top-theta"], one, length)
        return {"kept": kept, "fastest dense": best, "methods": {name: cells[name] for name in METHODS}}

    def kept(self, cache: Any, ids: Tensor, length: int) -> dict[str, float]:
        """Shares of elements and of V rows that one step under Top-theta keeps."""
        set_params(self.model, **THETA, K=self.k, when_slower="sparse")
        recorder = Recorder()
        record_statistics(self.model, recorder)
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        self.model(ids, past_key_values=cache)
        record_statistics(self.model, None)
        _, decode = recorder.drain()
        records = [record for steps in decode.values() for record in steps]
        heads, groups = (getattr(self.model.config, f"num_{x}_heads") for x in ("attention", "key_value"))
        n = (length + 1) * ids.shape[0]
        return {
            "elements": round(float(sum(r.attn.sum() for r in records)) / (len(records) * heads * n), 5),
            "V rows": round(float(sum(r.vrow.sum() for r in records)) / (len(records) * groups * n), 5),
        }


def adopt(layer: Any, filled: StaticLayer, length: int) -> None:
    """Make an empty layer hold the K and V of a filled one, the same tensors, and what it keeps beside."""
    k, v = filled.keys[:, :, :length], filled.values[:, :, :length]
    layer.lazy_initialization(k, v)
    layer.update(k, v)
    layer.keys, layer.values = filled.keys, filled.values


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3-8B")
    parser.add_argument("--lengths", type=numbers, default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=numbers, default=[1, 4])
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32, help="of a block")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--when_slower", choices=WHEN_SLOWER, default="dense")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "decode.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type != "cuda" and args.shape != "tiny":
        print("not run: this machine shows no CUDA GPU (--shape tiny tries the script on a CPU)")
        return
    torch.set_grad_enabled(False)
    about = {
        "device": device_name(device),
        "model": f"{args.shape}, random weights",
        "K": args.k,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "compiled": not args.eager,
        "when_slower": args.when_slower,
        "profile": profile_of(device) is not None,
    }
    print("  ".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    bench = Bench(args.shape, device, args.k, args.steps, args.blocks, args.eager, args.when_slower)
    rows = []
    for batch in args.batches:
        for length in args.lengths:
            row: dict[str, Any] = {"batch": batch, "length": length}
            try:
                row |= bench.measure(batch, length)
            except torch.OutOfMemoryError:
                row["not run"] = "out of memory"
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rows.append(row)
            print(f"batch {batch}, {length} tokens: {row.get('kept', row.get('not run'))}")
            print(f"  the fastest dense: {row.get('fastest dense', '-')}")
            for name, cell in row.get("methods", {}).items():
                print(f"  {name:18}" + ", ".join(f"{key} {value}" for key, value in cell.items()), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
