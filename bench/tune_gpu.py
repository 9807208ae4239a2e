#!/usr/bin/env python3
"""Which tiles, warps and pipeline stages are fastest for the Triton kernels on this GPU.

Every configuration computes the same cases as bench/attention.py (keys and values cold, CUDA graphs, medians)
and has to give the outputs of the configuration that is set in toptheta/kernels. The table is sorted by time,
and the configuration that is set is marked. Float32 and other head sizes are not covered.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import attention_gpu
from bench.attention import Case
from bench.attention_gpu import Call, Problem, captured, median_times
from toptheta.kernels.triton import decode as triton_decode
from toptheta.kernels.triton import prefill as triton_prefill
from toptheta.methods.params import LayerSpec

Config = dict[str, Any]
KINDS = ("decode", "int8", "prefill")


def cases(kind: str, tiny: bool) -> list[Case]:
    phase, model = "prefill" if kind == "prefill" else "decode", attention_gpu.MODEL
    if tiny:
        return [Case(model, phase, 150)]
    sizes = {"decode": [(32768, 1), (32768, 16)], "int8": [(131072, 4)], "prefill": [(8192, 1)]}
    return [Case(model, phase, *size) for size in sizes[kind]]


def product(**choices: list) -> list[Config]:
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


TILES = [(32, 2), (64, 4), (128, 4), (128, 8)]  # keys, warps
CONFIGS: dict[str, list[Config]] = {
    "decode": product(tile=TILES, num_stages=[2, 3], REGISTERS=[128, 168, 255]),
    "int8": product(tile=TILES[:3], num_stages=[2, 3], BLOCK_F=[64, 128, 256]),
    "prefill": product(
        BLOCK_M=[64, 128], BLOCK_N=[64, 128], num_warps=[4, 8], num_stages=[2, 3], SKIP=[True, False]
    ),
}


def module_of(kind: str) -> Any:
    return triton_prefill if kind == "prefill" else triton_decode


def changes(kind: str, config: Config) -> Config:
    """What `config` sets in the kernels' module."""
    module = module_of(kind)
    tile = {name: value for name, value in config.items() if name in module.TILE}
    if "tile" in config:
        tile["BLOCK_N"], tile["num_warps"] = config["tile"]
    rest = {name: value for name, value in config.items() if hasattr(module, name)}
    return rest | {"TILE": module.TILE | tile}


@contextmanager
def configured(kind: str, config: Config) -> Iterator[None]:
    """Sets `config` in the kernels' module, and restores the old one at the end."""
    module, new = module_of(kind), changes(kind, config)
    before = {name: getattr(module, name) for name in new}
    vars(module).update(new)
    triton_decode.forget_builds()
    try:
        yield
    finally:
        vars(module).update(before)
        triton_decode.forget_builds()


def is_set(kind: str, config: Config) -> bool:
    """Whether `config` is what toptheta/kernels has."""
    return all(getattr(module_of(kind), name) == value for name, value in changes(kind, config).items())


def outputs(call: Call) -> torch.Tensor:
    return call()[0].float()


def tune(kind: str, case: Case, configs: list[Config], device: torch.device) -> list[Config]:
    """Every configuration with its "ms" and, in decode, "dense ms", or with the reason why it was "not
    run"."""
    problem = Problem(case, None, device)
    calls = {"ms": problem.ours(attention_gpu.THETA, two_tier=kind == "int8")}
    if kind == "decode":
        calls["dense ms"] = problem.ours(LayerSpec())
    expected = {name: outputs(call) for name, call in calls.items()}
    rows = []
    for config in configs:
        row: Config = config | {"set": is_set(kind, config)}
        try:
            with configured(kind, config):
                for name, call in calls.items():
                    if not torch.allclose(outputs(call), expected[name], rtol=0.02, atol=0.02):
                        raise ValueError("the outputs differ")
                times = median_times({name: captured(call) for name, call in calls.items()}, 12)
            row |= {name: round(ms / len(problem.k), 4) for name, ms in times.items()}
        except Exception as error:  # a configuration that does not fit the device must not end the run
            row["not run"] = f"{type(error).__name__}: {error}"[:100]
        rows.append(row)
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
                rows = tune(kind, case, CONFIGS[kind][: 2 if args.tiny else None], device)
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
