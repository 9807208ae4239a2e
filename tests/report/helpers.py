"""Synthetic products folders, and the plot scripts as processes."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.helpers.paths import ROOT

LAYERS, HEADS, GROUPS, K = 6, 9, 3, 64


def put(path: Path, text: str, gz: bool) -> None:
    if gz:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def make_products(folder: Path, gz: bool = False, config: bool = True, decode: bool = True) -> Path:
    """A products folder as a run leaves it: layers differ, prefill keeps about K, decode scatters more."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lengths = rng.integers(70, 420, size=40)
    lines = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            theta = (
                0.4 * layer
                - 0.2 * head
                + 3.0 * (1 - K / np.arange(K + 1, 420))
                + 0.2 * rng.normal(size=420 - K - 1)
            )
            samples = rng.integers(1, 9, size=len(theta))
            lines += [
                f"L{layer}_H{head}:{n} {t!r} {s} {K}\n"
                for n, t, s in zip(range(K + 1, 420), theta.tolist(), samples)
            ]
    put(folder / "th.txt", "".join(lines), gz)

    phases = ("prefill", "generative_decoding") if decode else ("prefill",)
    for layer in range(LAYERS):
        sizes = []
        for phase in phases:
            attn, vrow = [], []
            for length in lengths:
                for n in [length] if phase == "prefill" else range(length + 1, length + 6):
                    for head in range(HEADS):
                        ratio = (1.1 - 0.5 * layer / LAYERS) * np.exp(
                            (0.1 if phase == "prefill" else 0.3) * rng.normal()
                        )
                        full = n * (n + 1) // 2 if phase == "prefill" else n
                        topk = min(n, K) if phase != "prefill" else K * (K + 1) // 2 + (n - K) * K
                        kept = max(1, min(full, round(ratio * topk)))
                        sizes.append(f"L{layer}_H{head}:{n} {K} {phase} {kept / topk}\n")
                        attn.append(f"{layer},{head},{n},{kept},{full}\n")
                    vrow += [
                        f"{layer},{g},{n},{round(n * rng.uniform(0.6, 1.0))},{n}\n" for g in range(GROUPS)
                    ]
            put(folder / f"layer{layer}_kept_attn_{phase}.csv", "".join(attn), gz)
            put(folder / f"layer{layer}_kept_vrow_{phase}.csv", "".join(vrow), gz)
        put(folder / f"layer{layer}.txt", "".join(sizes), gz)

    put(folder / "sequence_lengths_per_example.csv", "".join(f"{n}\n" for n in lengths), gz)
    completions = rng.integers(10, 200, size=len(lengths))
    put(
        folder / "prompt_completion_lengths_per_sample.csv",
        "".join(f"{p} {c}\n" for p, c in zip(lengths, completions)),
        gz,
    )
    outcomes = [
        {"task_id": f"HumanEval/{i}", "passed": bool(c < 90), "result": "passed"}
        for i, c in enumerate(completions)
    ]
    put(folder / "samples.jsonl_results.jsonl", "".join(json.dumps(row) + "\n" for row in outcomes), gz)
    if config:
        settings = {
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "num_kv_heads": GROUPS,
            "model": "Tiny",
            "method": "Top-theta",
        }
        (folder / "config.json").write_text(json.dumps({**settings, "k_per_layer": [K] * LAYERS}))
    return folder


def run_script(name: str, *args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one sentence, without a traceback, that has all `words`."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
