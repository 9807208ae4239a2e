#!/usr/bin/env python3
"""The attention call alone: milliseconds, and the ratio to torch's scaled_dot_product_attention.

    .venv/bin/python bench/attention.py [--device cpu|cuda] [--dtype TYPE] [--quick] [--copies] [--output F]

On a GPU see attention_gpu.py; the rest is about the CPU. Every repetition runs all methods one after the
other on the same tensors, so that a busy machine slows all of them; the numbers are medians. Leaves out the
rest of the model, the growing of caches and calibration. In decode each call reads another copy of K and V,
as each layer of a model does, so that they come from memory and not from cache; VMC's sum of V is given, as a
model has it beside its cache.

Queries and keys are random with scores of standard deviation 1.5; thresholds are calibrated on other prompts
drawn likewise: the mean (K+1)-th largest score or weight of rows of each sampled length. "kept" is what they
then keep. --copies: decode alone, with copies of K in 8 and 4 bits next to Top-theta without one; each step
codes its own key, and those of the cache are coded before.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toptheta.attention.call import AttentionCall, Counts
from toptheta.attention.rows import Rows, rows_of
from toptheta.calibration.interpolation import nearest_lookup
from toptheta.kernels import registry as kernels
from toptheta.kernels.drawn import SCORE_SPREAD
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.methods.top_k import TopK
from toptheta.methods.top_theta import TopTheta
from toptheta.util.environment import cpu_name

K = 64
COLD_BYTES = 256 << 20  # of K and V that decode calls take turns with
MAX_BYTES = 6 << 30  # of K and V of one case
MODELS = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}  # query heads, KV heads, head_dim
METHODS = {
    "dense": LayerSpec(),
    "Top-k": LayerSpec(TopK(), "pre-softmax", K),
    "Top-theta pre": LayerSpec(TopTheta(), "pre-softmax", K, "exact", vmc=True),
    "Top-theta post": LayerSpec(TopTheta(), "post-softmax", K, vmc=True),
}
COPIES = {
    "Top-theta post": METHODS["Top-theta post"],
    "int8 copy of K": LayerSpec(TopTheta(key_copy="int8"), "post-softmax", K, vmc=True),
    "int4 copy of K": LayerSpec(TopTheta(key_copy="int4"), "post-softmax", K, vmc=True),
}


@dataclass(frozen=True)
class Case:
    model: str
    phase: str  # prefill or decode
    kv_len: int
    batch: int = 1
    dtype: str = "float32"

    @property
    def q_len(self) -> int:
        return self.kv_len if self.phase == "prefill" else 1

    @property
    def kv_bytes(self) -> int:
        _, num_kv_heads, head_dim = MODELS[self.model]
        size = getattr(torch, self.dtype).itemsize
        return 2 * size * self.batch * num_kv_heads * head_dim * self.kv_len


def cases(quick: bool, dtype: str, copies: bool = False) -> list[Case]:
    """Every case; for each model the shorter first, so that they tell how long the next will take."""
    if copies:
        lengths = [4096] if quick else [4096, 32768, 131072]
        return [Case("Llama-3-8B", "decode", n, 1, dtype) for n in lengths]
    prefill, decode, batches = [2**i << 10 for i in range(6)], [4096, 7000, 32768, 131072], (1, 4, 16)
    if quick:
        prefill, decode, batches = [1024, 4096], [4096, 7000], (1,)
    found = [Case(m, "prefill", n, 1, dtype) for m in MODELS for n in prefill]
    found += [Case(m, "prefill", 1024, b, dtype) for m in MODELS for b in batches[1:]]
    return found + [Case(m, "decode", n, b, dtype) for m in MODELS for b in batches for n in decode]


def draw(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q `[B, H, Q, D]` as a view of `[B, Q, H, D]`, as projections leave it; k and v `[B, H_kv, N, D]`."""
    num_heads, num_kv_heads, head_dim = MODELS[case.model]
    q = torch.randn(case.batch, case.q_len, num_heads, head_dim, device=device).transpose(1, 2)
    k, v = torch.randn(2, case.batch, num_kv_heads, case.kv_len, head_dim, device=device)
    dtype = getattr(torch, case.dtype)
    return (q * SCORE_SPREAD).to(dtype), k.to(dtype), v.to(dtype)


def calibrated(case: Case, placement: str, device: torch.device, k_keep: int = K) -> Tensor:
    """Thresholds `[H, N + 1]` from rows of up to 48 lengths, a few rows of every head each."""
    num_heads, num_kv_heads, head_dim = MODELS[case.model]
    lengths = [case.kv_len]
    if case.phase == "prefill":
        first = k_keep + 1
        lengths = sorted({int(first + (case.kv_len - first) * (i / 47) ** 2) for i in range(48)})
    values = np.full((1, case.kv_len + 1), np.nan)
    for n in lengths:
        q = torch.randn(num_kv_heads, 16 * num_heads // num_kv_heads, head_dim, device=device) * SCORE_SPREAD
        k = torch.randn(num_kv_heads, n, head_dim, device=device)
        x = q @ k.transpose(1, 2) / math.sqrt(head_dim)
        x = x.softmax(dim=-1) if placement == "post-softmax" else x
        values[0, n] = float(x.topk(k_keep + 1, dim=-1).values[..., k_keep].mean())
    theta = torch.from_numpy(nearest_lookup(values, k_keep, -math.inf)).to(device)
    return theta.expand(num_heads, -1).contiguous()


def calls(
    case: Case, device: torch.device, methods: dict[str, LayerSpec]
) -> tuple[dict[str, Callable[[], object]], dict[str, dict[str, float]]]:
    """What each method runs, and the shares of elements that it keeps and, with a copy of K, of K that it
    reads."""
    num_heads, _, head_dim = MODELS[case.model]
    copies = 1 if case.phase == "prefill" else 1 + COLD_BYTES // case.kv_bytes
    q, *first = draw(case, device)
    pairs = [first, *(draw(case, device)[1:] for _ in range(copies - 1))]
    # In decode the model has the sum of V beside its cache, for VMC, and what a method remembers.
    decode = case.phase == "decode"
    caches = [(k, v, v.sum(dim=2, dtype=torch.float32) if decode else None, {}) for k, v in pairs]
    turn: Iterator[tuple[Tensor, Tensor, Tensor | None, dict[LayerSpec, State]]] = itertools.cycle(caches)
    rows = rows_of(None, case.q_len, case.kv_len, device)
    scale = 1 / math.sqrt(head_dim)

    def sdpa() -> Tensor:
        k, v, *_ = next(turn)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=case.phase == "prefill", scale=scale, enable_gqa=True
        )

    def ours(spec: LayerSpec, theta: Tensor | None) -> Callable[..., Any]:
        def one(count: bool = False) -> tuple[Tensor, Counts | None]:
            k, v, v_sum, states = next(turn)
            state = states.setdefault(spec, State()) if spec.method.has_state else None
            return kernels.attend(
                AttentionCall(
                    q, k, v, rows, spec, scale, theta, count=count, v_sum=v_sum, state=state, decode=decode
                )
            )

        return one

    found: dict[str, Callable[[], object]] = {"sdpa": sdpa}
    shares = {"sdpa": {"kept": 1.0}}
    for name, spec in methods.items():
        theta = calibrated(case, spec.placement, device) if spec.method.needs_thresholds else None
        run = found[name] = ours(spec, theta)
        for _ in pairs:  # so that each has its state
            counts = run(count=True)[1]
        shares[name] = shares_of(counts, rows, q.shape[:2])
    return found, shares


def shares_of(counts: Counts, rows: Rows, heads: torch.Size) -> dict[str, float]:
    batch, num_heads = heads
    full = float(rows.n.expand(batch, -1).sum())
    shares = {"kept": round(float(counts.attn.sum()) / (full * num_heads), 5)}
    if counts.keys is not None:
        shares["K rows read"] = round(float(counts.keys.sum()) / (full * counts.keys.shape[1]), 5)
    return shares


def measure(
    case: Case, device: torch.device, seconds: float, methods: dict[str, LayerSpec]
) -> dict[str, dict[str, float]]:
    """Median milliseconds, ratio to sdpa and shares of every method; some `seconds` of repetitions."""
    found, shares = calls(case, device, methods)
    times: dict[str, list[float]] = {name: [] for name in found}
    start = time.perf_counter()
    while True:
        for name, call in found.items():
            synchronize(device)
            begun = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(time.perf_counter() - begun)
        repetitions = len(times["sdpa"])
        if repetitions >= 200 or repetitions >= 5 and time.perf_counter() - start > seconds:
            break
    medians = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    return {
        name: {
            "ms": round(ms, 4),
            "ratio": round(ms / medians["sdpa"], 3),
            **shares[name],
            "repetitions": repetitions,
        }
        for name, ms in medians.items()
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device; on the CPU a call is over when it returns."""


def device_name() -> str:
    """The CPU and the instruction set that torch uses on it, on which the kernel's speed depends, too."""
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the attention call against torch's sdpa.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few shapes, one or two minutes")
    parser.add_argument("--phase", choices=["decode", "prefill"], help="with --device cuda: this one alone")
    parser.add_argument("--batch", type=int, help="with --device cuda: this one alone")
    parser.add_argument("--tiny", action="store_true", help="with --device cuda: toys, to try the script")
    parser.add_argument("--copies", action="store_true", help="on CPU: decode with copies of K")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="on CPU"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=60.0, help="cases expected to take longer than this are not run"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file; default bench/results/attention-<device>.json"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    name = f"attention-{args.device}" + ("-copies" if args.copies else "")
    output = args.output or Path(__file__).parent / "results" / f"{name}.json"
    methods = COPIES if args.copies else METHODS
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device == "cuda":
        from bench import attention_gpu  # which itself takes a few things from here

        if args.tiny:
            attention_gpu.be_tiny()
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        phases = (args.phase,) if args.phase else attention_gpu.PHASES
        about, rows = attention_gpu.table(args.quick, device, phases, args.batch)
        about |= {"torch": torch.__version__, "python": platform.python_version()}
        write(output, about, rows)
        return

    about = {
        "device": device_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": args.dtype,
        "K": K,
        "kernel": kernels.FORCED or "chosen",
    }
    print("  ".join(f"{key}: {value}" for key, value in about.items()))
    last, share = ("int4 copy of K", "K rows read") if args.copies else ("Top-theta pre", "kept")
    print(f"median ms (ratio to sdpa); {share}: the share, of {last}\n")
    names = ["sdpa", *methods]
    print(
        f"{'model':13}{'phase':8}{'batch':>6}{'kv_len':>8}"
        + "".join(f"{n:>19}" for n in names)
        + f"{share:>13}"
    )
    results, spent = [], {}
    for case in cases(args.quick, args.dtype, args.copies):
        label = f"{case.model:13}{case.phase:8}{case.batch:6}{case.kv_len:8}"
        size = case.batch * case.q_len * case.kv_len
        before = spent.get((case.model, case.phase))  # size and seconds of the last case of this kind
        expected = before[1] * size / before[0] if before else 0.0
        if expected > args.max_seconds or case.kv_bytes > MAX_BYTES:
            why = f"{expected:.0f} s expected" if case.kv_bytes <= MAX_BYTES else "too large"
            print(f"{label}   not run ({why})", flush=True)
            results.append(asdict(case) | {"not run": why})
            continue
        start = time.perf_counter()
        with torch.no_grad():
            got = measure(case, device, 2.0 if args.quick else 4.0, methods)
        one_round = sum(cell["ms"] for cell in got.values()) / 1e3
        spent[case.model, case.phase] = (size, 7 * one_round)  # five repetitions, and the kept shares
        cells = "".join(f"{got[n]['ms']:11.2f} ({got[n]['ratio']:.2f})".rjust(19) for n in names)
        print(f"{label}{cells}{got[last][share]:13.4f}", flush=True)
        seconds = round(time.perf_counter() - start, 1)
        results.append(asdict(case) | {"methods": got, "seconds": seconds})

    write(output, about, results)


def write(output: Path, about: dict, results: list[dict]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"about": about, "cases": results}, indent=1) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
