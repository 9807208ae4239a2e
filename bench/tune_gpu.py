#!/usr/bin/env python3
"""Which tiles, warps and pipeline stages are fastest for the Triton kernels on this GPU.

Every configuration computes the same cases as bench/attention.py (keys and values cold, CUDA graphs, medians)
and has to give the outputs of the configuration that is set in toptheta/kernels. The table is sorted by time,
and the configuration that is set is marked. Float32 and other head sizes are not covered.
`python -m toptheta.kernels.tune` tries the likeliest of them, and puts the best to use.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import attention_gpu
from bench.attention import Case
from bench.attention_gpu import Problem
from toptheta.kernels.triton.tiles import CONFIGS, KINDS, Config, tune
from toptheta.methods.params import LayerSpec


def cases(kind: str, tiny: bool) -> list[Case]:
    phase, model = "prefill" if kind == "prefill" else "decode", attention_gpu.MODEL
    if tiny:
        return [Case(model, phase, 150)]
    sizes = {"decode": [(32768, 1), (32768, 16)], "int8": [(131072, 4)], "prefill": [(8192, 1)]}
    return [Case(model, phase, *size) for size in sizes[kind]]


def sweep(kind: str, case: Case, configs: list[Config], device: torch.device) -> list[Config]:
    """Every configuration with its "ms" and, in decode, "dense ms", or with the reason why it was "not
    run"."""
    problem = Problem(case, None, device)
    calls = {"ms": problem.method(attention_gpu.THETA, two_tier=kind == "int8")}
    if kind == "decode":
        calls["dense ms"] = problem.method(LayerSpec())
    expected = {name: call()[0].float() for name, call in calls.items()}
    rows = [tune(kind, config, calls, expected, len(problem.k)) for config in configs]
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default all")
    parser.add_argument("--tiny", action="store_true", help="toys and few configurations, to try the script")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "tune-gpu.json")
    args = parser.parse_args()
    for kind in args.kinds:
        if kind not in KINDS:
            parser.error(f"{kind} is none of {', '.join(KINDS)}")
    there = torch.cuda.is_available()
    if args.tiny:
        attention_gpu.be_tiny()
    elif not there:
        parser.exit(2, "tune_gpu.py: this machine shows no CUDA GPU, so there is nothing to time.\n")
    device = torch.device("cuda" if there else "cpu")
    name = torch.cuda.get_device_name(device) if there else "none"
    results = {"device": name, "torch": torch.__version__, "cases": []}
    for kind in args.kinds or KINDS:
        for case in cases(kind, args.tiny):
            print(f"\n{kind}: batch {case.batch}, {case.kv_len} keys, {results['device']}", flush=True)
            torch.manual_seed(0)
            with torch.no_grad():
                rows = sweep(kind, case, CONFIGS[kind][: 2 if args.tiny else None], device)
            for row in rows[:12] + [row for row in rows[12:] if row["set"]]:
                print("  " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            results["cases"].append({"kind": kind, "batch": case.batch, "kv_len": case.kv_len, "rows": rows})
            if there:
                torch.cuda.empty_cache()
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
