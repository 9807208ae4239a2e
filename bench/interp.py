#!/usr/bin/env python3
"""Row lengths that calibration never saw: nearest, linear and fit look-ups, on prompts longer than any
calibrated.

    .venv/bin/python bench/interp.py [--calib_length N] [--length N] [--output FILE]

The small model calibrates (calib_tac, a tenth of the rows, as the scripts do) on prompts of the bundled task
(its training questions), and reads longer texts of test questions. Only rows longer than every calibrated one
count: kept elements relative to K over all layers and heads, and the KL divergence of the next token from
dense attention's, in nats per token. Leaves out tasks' scores.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.attention import device_name
from toptheta.models.calibrate import calibrated_tables, use_tables
from toptheta.models.control import record_statistics, set_params
from toptheta.models.kl import kl_divergence
from toptheta.models.loading import find_model, load_model, load_tokenizer
from toptheta.models.patch import update_model
from toptheta.models.recorder import PREFILL, Recorder
from toptheta.report.tables import table

ROOT = Path(__file__).resolve().parent.parent
K = 64
METHODS: dict[str, dict[str, Any]] = {
    "pre": {"placement": "pre-softmax", "sdc": "exact", "vmc": True},
    "pre, SDC table": {"placement": "pre-softmax", "sdc": "offline-calibrated", "vmc": True},
    "post": {"placement": "post-softmax", "sdc": "none", "vmc": True},
}
LOOKUPS = [("nearest", 0), ("linear", 0), ("fit", 0), ("nearest", 64), ("linear", 64)]


def questions(split: str) -> Tensor:
    """`[1, T]` tokens of a split's questions with their answers."""
    text = ""
    for line in (ROOT / "toptheta/eval/tasks/everyday_science" / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        choices = row["choices"]["text"]
        answer = choices[row["choices"]["label"].index(row["answerKey"])]
        text += f"Question: {row['question']}\nChoices: {'; '.join(choices)}\nAnswer: {answer}\n\n"
    return load_tokenizer(find_model("smollm2"))(text, return_tensors="pt", verbose=False).input_ids


def parts(tokens: Tensor, length: int, count: int) -> list[Tensor]:
    found = [tokens[:, i * length : (i + 1) * length] for i in range(count)]
    if found[-1].shape[1] < length:
        raise SystemExit(f"{tokens.shape[1]} tokens do not make {count} texts of {length}: ask for less")
    return found


def read(model: Any, ids: Tensor, first: int, recorder: Recorder | None) -> Tensor:
    """Log probabilities `[T - first, V]` behind the first tokens; `recorder` sees those rows alone."""
    cache = DynamicCache(config=model.config)
    record_statistics(model, None)
    model(ids[:, :first], past_key_values=cache, logits_to_keep=1)
    record_statistics(model, recorder)
    if recorder is not None:
        recorder.phase = PREFILL
    logits = model(ids[:, first:], past_key_values=cache).logits[0]
    return torch.log_softmax(logits, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calib_length", type=int, default=700)
    parser.add_argument("--calib_prompts", type=int, default=5)
    parser.add_argument("--calib_sample_frac", type=float, default=0.1)
    parser.add_argument("--length", type=int, default=1500)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "interp.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    about = {
        "device": device_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": "SmolLM2-135M-Instruct",
        "K": K,
        "calibration": f"{args.calib_prompts} prompts of {args.calib_length} tokens",
        "evaluation": f"{args.texts} texts of {args.length} tokens",
    }
    print("  ".join(f"{key}: {value}" for key, value in about.items()) + "\n")

    model = update_model(load_model(find_model("smollm2"), "float32", "cpu").eval())
    prompts = parts(questions("train"), args.calib_length, args.calib_prompts)
    texts = parts(questions("test"), args.length, args.texts)
    set_params(model, mode=3)
    dense = [read(model, ids, args.calib_length, None) for ids in texts]
    rows_per_text = args.length - args.calib_length

    header = ["method", "look-up", "kept / K: mean", "p5", "p95", "KL from dense"]
    rows = []
    for method, params in METHODS.items():
        record_statistics(model, None)
        calibration = {"calib_tac": True, "calib_sample_frac": args.calib_sample_frac, "calibrate": True}
        set_params(model, mode=0, K=K, **params, **calibration, calib_interp="nearest", calib_smooth=0)
        for ids in prompts:
            model(ids, use_cache=False, logits_to_keep=1)
        use_tables(model, calibrated_tables(model))
        cells: list[tuple[str, dict[str, Any]]] = [
            (
                interp + (f", smoothed over {smooth}" if smooth else ""),
                {"mode": 0, "calib_interp": interp, "calib_smooth": smooth},
            )
            for interp, smooth in LOOKUPS
        ]
        for name, lookup in [*cells, ("Top-k, for comparison", {"mode": 1, "calib_tac": False})]:
            if name.startswith("Top-k") and params["sdc"] == "offline-calibrated":
                continue
            set_params(model, **lookup, calibrate=False)
            recorder = Recorder()
            kept, divergence = [], 0.0
            for ids, expected in zip(texts, dense):
                found = read(model, ids, args.calib_length, recorder)
                divergence += float(kl_divergence(expected, found).mean()) / len(texts)
                layers = recorder.drain()[0].values()
                kept.append(np.stack([layer.attn[0] for layer in layers]) / (rows_per_text * K))
            heads = np.mean(kept, axis=0).ravel()
            numbers = [heads.mean(), *np.quantile(heads, [0.05, 0.95]), divergence]
            rows.append([method, name, *(f"{x:.3f}" for x in numbers)])
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows, header))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"about": about, "header": header, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
