#!/usr/bin/env python3
"""The whole small model: prefill, decode, calibration and peak memory, as ratios to stock transformers.

    .venv/bin/python bench/end_to_end.py [--quick] [--output FILE]

Stock means transformers' own LlamaForCausalLM with 'sdpa', another object in the same process with the same
weights. Every repetition runs all methods one after the other on the same tokens, so that a busy machine
slows all of them; the numbers are medians. Thresholds are calibrated (all rows, calib_tac) on other text of
the same length. The text is this project's own source code. Peak memory is of fresh processes, one for each
method. Leaves out loading, tokenization and writing products.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.attention import device_name
from toptheta.calibration.tables import CalibrationTables
from toptheta.kernels import registry as kernels
from toptheta.models.calibrate import calibrated_tables, use_tables
from toptheta.models.control import record_statistics, set_params
from toptheta.models.loading import find_model, load_model, load_tokenizer
from toptheta.models.patch import update_model
from toptheta.models.recorder import Recorder

ROOT = Path(__file__).resolve().parent.parent
K = 64
PRE = {"placement": "pre-softmax", "K": K, "sdc": "exact", "vmc": True}
POST = {"placement": "post-softmax", "K": K, "sdc": "none", "vmc": True}
METHODS: dict[str, dict[str, Any]] = {
    "dense through us": {"mode": 3},
    "Top-k": {"mode": 1, "placement": "pre-softmax", "K": K, "sdc": "none", "vmc": False},
    "Top-theta pre": PRE | {"mode": 0},
    "Top-theta post": POST | {"mode": 0},
}
CALIBRATE = {"calib_tac": True, "calib_sample_frac": 1.0}
MEMORY_LENGTH = 8192


def text_tokens() -> Tensor:
    """`[1, T]`: this project's Python files, one after the other."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("toptheta/**/*.py"), *ROOT.glob("tests/**/*.py")])
    text = "\n".join(path.read_text() for path in files)
    return load_tokenizer(find_model("smollm2"))(text, return_tensors="pt", verbose=False).input_ids


class Bench:
    def __init__(self, seconds: float):
        self.seconds = seconds
        self.stock = load_model(find_model("smollm2"), "float32", "cpu").eval()
        self.ours = update_model(copy.deepcopy(self.stock))
        self.tokens = text_tokens()
        self.tables: dict[str, CalibrationTables] = {}

    def prompt(self, length: int, part: int = 0) -> Tensor:
        return self.tokens[:, part * 16384 : part * 16384 + length]

    def calibrate(self, length: int) -> None:
        """Thresholds of both placements from two prompts that the benchmark does not use."""
        for name, params in (("Top-theta pre", PRE), ("Top-theta post", POST)):
            set_params(self.ours, **(params | {"mode": 0}), **CALIBRATE, calibrate=True)
            for part in (1, 2):
                self.ours(self.prompt(length, part), use_cache=False, logits_to_keep=1)
            self.tables[name] = calibrated_tables(self.ours)
            use_tables(self.ours, self.tables[name])
            set_params(self.ours, calibrate=False)

    def steer(self, name: str, recorder: Recorder | None = None) -> None:
        if name in self.tables:
            use_tables(self.ours, self.tables[name])
        set_params(self.ours, **METHODS[name])
        record_statistics(self.ours, recorder)

    def interleaved(self, calls: dict[str, Callable[[], float]], at_least: int = 5) -> dict[str, Any]:
        """Median milliseconds of each call and the ratio to the first. A call returns its own seconds."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()  # warm up
        start = time.perf_counter()
        repetitions = 0
        while repetitions < at_least or time.perf_counter() - start < self.seconds:
            repetitions += 1
            for name, call in calls.items():
                times[name].append(call())
        medians = {name: statistics.median(values) for name, values in times.items()}
        first = next(iter(medians.values()))
        return {
            name: {"ms": round(1e3 * t, 2), "ratio": round(t / first, 3), "repetitions": repetitions}
            for name, t in medians.items()
        }

    def prefill(self, length: int) -> dict[str, Any]:
        self.calibrate(length)
        ids = self.prompt(length)

        def stock() -> float:
            start = time.perf_counter()
            self.stock(ids, use_cache=False, logits_to_keep=1)
            return time.perf_counter() - start

        def ours(name: str, count: bool) -> float:
            recorder = Recorder() if count else None
            self.steer(name, recorder)
            start = time.perf_counter()
            self.ours(ids, use_cache=False, logits_to_keep=1)
            if recorder is not None:
                recorder.drain()
            return time.perf_counter() - start

        calls: dict[str, Callable[[], float]] = {"stock sdpa": stock}
        for name in METHODS:
            calls[name] = lambda name=name: ours(name, False)
        calls["Top-theta pre, statistics"] = lambda: ours("Top-theta pre", True)
        return self.interleaved(calls)

    def decode(self, length: int, steps: int) -> dict[str, Any]:
        """Single steps behind a context; every method has its own cache."""
        self.calibrate(length + 2 * steps)
        methods = [*METHODS, "Top-theta pre, statistics"]
        recorder = Recorder()
        first = self.stock(self.prompt(length), use_cache=True, logits_to_keep=1).past_key_values
        caches = {name: copy.deepcopy(first) for name in ["stock sdpa", *methods]}
        at = dict.fromkeys(caches, length)

        def step(name: str) -> float:
            ids = self.tokens[:, at[name] : at[name] + 1]
            at[name] += 1
            model = self.stock
            if name != "stock sdpa":
                model = self.ours
                counting = name.endswith("statistics")
                self.steer(name.removesuffix(", statistics"), recorder if counting else None)
            start = time.perf_counter()
            model(ids, past_key_values=caches[name], use_cache=True)
            return time.perf_counter() - start

        calls = {name: (lambda name=name: step(name)) for name in caches}
        kept, self.seconds = self.seconds, 0.0
        try:
            return self.interleaved(calls, at_least=steps)
        finally:
            self.seconds = kept
            recorder.drain()

    def calibration(self, length: int) -> dict[str, Any]:
        """One calibration prompt against the dense forward of the same prompt."""
        ids = self.prompt(length)

        def stock() -> float:
            start = time.perf_counter()
            self.stock(ids, use_cache=False, logits_to_keep=1)
            return time.perf_counter() - start

        def ours(params: dict[str, Any]) -> float:
            set_params(self.ours, **(PRE | {"mode": 0} | CALIBRATE | params), calibrate=True)
            start = time.perf_counter()
            self.ours(ids, use_cache=False, logits_to_keep=1)
            seconds = time.perf_counter() - start
            use_tables(self.ours, calibrated_tables(self.ours))
            set_params(self.ours, calibrate=False)
            return seconds

        offline = {"sdc": "offline-calibrated"}
        return self.interleaved(
            {
                "stock sdpa": stock,
                "all rows, tac": lambda: ours({}),
                "all rows": lambda: ours({"calib_tac": False}),
                "a tenth, tac": lambda: ours({"calib_sample_frac": 0.1}),
                "all rows, tac, SDC table": lambda: ours(offline),
                "post, all rows, tac": lambda: ours(POST),
            }
        )


def peak_memory() -> dict[str, Any]:
    """MB of resident memory at the end of a prefill, the most that a fresh process had."""
    cells = {}
    # glibc gives blocks above this size back when they are freed; left alone it may keep 500 MB or not.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    for name in ["stock sdpa", "Top-k", "Top-theta pre"]:
        command = [sys.executable, __file__, "--memory-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        cells[name] = {"MB": float(done.stdout.split()[-1])}
    for cell in cells.values():
        cell["ratio"] = round(cell["MB"] / cells["stock sdpa"]["MB"], 3)
    return cells


def print_peak(name: str, layers: int | None) -> None:
    """layers: of the model's first ones, None: all."""
    model = load_model(find_model("smollm2"), "float32", "cpu").eval()
    if layers is not None:
        del model.model.layers[layers:]
        model.config.num_hidden_layers = layers
    ids = text_tokens()[:, :MEMORY_LENGTH]
    if name != "stock sdpa":
        update_model(model)
        params = METHODS[name]
        if params["mode"] == 0:  # what thresholds keep does not change the size of anything
            set_params(model, **params, calibrate=True)
            model(ids[:, : 2 * K], use_cache=False, logits_to_keep=1)
        set_params(model, **params, calibrate=False)
    model(ids, use_cache=True, logits_to_keep=1)
    # Not getrusage's maximum: that one survives exec, so it may be of the process that started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    print(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the small model against stock transformers.")
    parser.add_argument("--quick", action="store_true", help="shorter: no 4,096 and 7,000 tokens, no memory")
    parser.add_argument(
        "--only", metavar="TEXT", help="the rows whose title holds this, e.g. 'decode at 1000'"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of repetitions for each row")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "end_to_end-cpu.json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if args.memory_of:
        print_peak(args.memory_of, args.layers)
        return

    about = {
        "device": device_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "K": K,
        "kernel": kernels.FORCED or "chosen",
    }
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    print("median ms, and the ratio to stock sdpa in the same process\n")
    bench = Bench(args.seconds)
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        "prefill 512": lambda: bench.prefill(512),
        "prefill 1024": lambda: bench.prefill(1024),
        "prefill 4096": lambda: bench.prefill(4096),
        "decode at 1000": lambda: bench.decode(1000, 40),
        "decode at 7000": lambda: bench.decode(7000, 25),
        "calibration, prompt of 700": lambda: bench.calibration(700),
        f"peak memory, prefill {MEMORY_LENGTH}": peak_memory,
    }
    results = {}
    for title, run in rows.items():
        if args.quick and any(word in title for word in ("4096", "7000", "memory")):
            continue
        if args.only and args.only not in title:
            continue
        results[title] = run()
        print(title)
        for name, cell in results[title].items():
            value = f"{cell['ms']:10.1f} ms" if "ms" in cell else f"{cell['MB']:10.0f} MB"
            print(f"  {name:28}{value}{cell['ratio']:8.2f}", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"about": about, "rows": results}, indent=1) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
