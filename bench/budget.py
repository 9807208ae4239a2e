#!/usr/bin/env python3
"""One threshold on weights against the published calibration and Top-k: KL to dense by what is kept.

    .venv/bin/python bench/budget.py --text FILE --calib_text FILE [--length N] [--windows N] [--k K[,K]]
        [--methods NAME[,NAME]] [--output FILE]

The small model reads windows of a text that calibration never saw. The first half of a window is dense for
every method, as a prompt is whose decode is sparse; the rows of the second half count: kept elements of a
row, V rows that some head of a group keeps for a row, KL(dense || method) of the next token, share of the
same top token, logarithm of the ratio of perplexities. Errors are standard errors over windows, paired with
dense. VMC throughout, and exact SDC where scores are compared. Rows that are in the output file are not
computed again. Plain PyTorch counts the groups, so that this says nothing about speed.
"""

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.attention import device_name
from toptheta.attention.call import Counts
from toptheta.calibration.tables import CalibrationTables
from toptheta.kernels import registry
from toptheta.models.control import (
    begin_calibration,
    calibrated_tables,
    get_params,
    record_statistics,
    set_params,
    use_tables,
)
from toptheta.models.kl import kl_divergence
from toptheta.models.loading import find_model, load_model, load_tokenizer
from toptheta.models.patch import update_model
from toptheta.models.recorder import Recorder
from toptheta.report.plots.style import MARKERS, look, new_figure, save_figure, series_colours
from toptheta.report.tables import table

ROOT = Path(__file__).resolve().parent.parent
SCORES = {"placement": "pre-softmax", "sdc": "exact", "vmc": True}
WEIGHTS = {"placement": "post-softmax", "sdc": "none", "vmc": True}
METHODS: dict[str, dict[str, Any]] = {
    "Top-k": {"mode": 1, **SCORES},
    "published scores": {"mode": 0, **SCORES, "calib_tac": True, "calib_sample_frac": 1.0},
    "published weights": {"mode": 0, **WEIGHTS, "calib_tac": True, "calib_sample_frac": 1.0},
    "budget": {"mode": 0, **WEIGHTS, "calib_to": "budget", "calib_sample_frac": 0.25},
    "budget of values": {
        "method": "top_theta:value_aware",
        **WEIGHTS,
        "calib_to": "budget",
        "calib_sample_frac": 0.25,
    },
    "budget by layer": {
        "mode": 0,
        **WEIGHTS,
        "calib_to": "budget",
        "calib_layers": "sensitivity",
        "calib_sample_frac": 0.25,
    },
}
COLUMNS = ("elements a row", "V rows a group", "KL", "same top token %", "ln ppl ratio")


class Kept:
    """Sums over rows: what they keep, and the V rows that their groups read."""

    def __init__(self) -> None:
        self.elements = self.vrows = 0.0
        self.rows = self.groups = 0

    @contextmanager
    def counting(self, group: int) -> Iterator[None]:
        original = Counts.add

        def add(counts: Counts, keep: Tensor, real: Tensor | None, start: int) -> None:
            batch, num_heads, rows, end = keep.shape
            by_group = keep.view(batch, num_heads // group, group, rows, end).any(dim=2)
            self.elements += float(keep.sum())
            self.vrows += float(by_group.sum())
            self.rows += batch * num_heads * rows
            self.groups += batch * (num_heads // group) * rows
            original(counts, keep, real, start)

        Counts.add = add  # type: ignore[method-assign]
        try:
            yield
        finally:
            Counts.add = original  # type: ignore[method-assign]


def windows(path: Path, tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """The first `count` windows of a text, `[1, length]` each."""
    ids = tokenizer(path.read_text(), return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < length * count:
        raise SystemExit(f"{path} has {ids.shape[1]} tokens, not {count} windows of {length}: ask for less")
    return list(ids[:, : length * count].split(length, dim=1))


class Window:
    """One window: the cache of its dense first half, and the dense log-probabilities of the rows behind."""

    def __init__(self, model: Any, ids: Tensor):
        set_params(
            model, mode=3, calibrate=False, sdc="none", vmc=False, calib_to="k", calib_layers="uniform"
        )
        half = ids.shape[1] // 2
        self.rest = ids[:, half:]
        self.cache = DynamicCache(config=model.config)
        model(ids[:, :half], past_key_values=self.cache, logits_to_keep=1)
        self.dense = self.read(model)

    def read(self, model: Any) -> Tensor:
        """Log-probabilities `[T / 2, V]` of the second half, as the model is set now."""
        logits = model(self.rest, past_key_values=copy.deepcopy(self.cache)).logits[0]
        return logits.float().log_softmax(dim=-1)


def calibrate(model: Any, prompts: list[Tensor], params: dict[str, Any], k: int) -> CalibrationTables:
    set_params(model, mode=3, calibrate=False, sdc="none", vmc=False, calib_to="k", calib_layers="uniform")
    begin_calibration(model, get_params(model).changed(params | {"K": k, "calibrate": True}))
    for ids in prompts:
        model(ids, use_cache=False, logits_to_keep=1)
    return calibrated_tables(model)


def measure(model: Any, texts: list[Window]) -> dict[str, Any]:
    """One row of the table, for the method that the model is set to."""
    config, kept = model.config, Kept()
    found: dict[str, list[float]] = {name: [] for name in COLUMNS[2:]}
    for window in texts:
        record_statistics(model, Recorder(config.num_attention_heads))
        registry.FORCED = "reference"
        with kept.counting(config.num_attention_heads // config.num_key_value_heads):
            method = window.read(model)
        registry.FORCED = None
        record_statistics(model, None)
        dense = window.dense
        found["KL"].append(float(kl_divergence(dense, method).mean()))
        same = (dense.argmax(dim=-1) == method.argmax(dim=-1)).float().mean()
        found["same top token %"].append(100 * float(same))
        targets = window.rest[0, 1:, None]
        gap = dense[:-1].gather(1, targets) - method[:-1].gather(1, targets)
        found["ln ppl ratio"].append(float(gap.mean()))
    row: dict[str, Any] = {
        "elements a row": kept.elements / max(1, kept.rows),
        "V rows a group": kept.vrows / max(1, kept.groups),
        "tokens": sum(window.rest.shape[1] for window in texts),
    }
    for name, values in found.items():
        stderr = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        row[name] = {"value": float(np.mean(values)), "stderr": stderr}
    return row


def shown(row: dict[str, Any]) -> list[str]:
    cells = [row["method"], "-" if row["K"] is None else str(row["K"])]
    for name, digits in zip(COLUMNS, (1, 1, 4, 1, 4)):
        value = row[name]
        if isinstance(value, dict):
            cells.append(f"{value['value']:.{digits}f} ± {value['stderr'] or 0.0:.{digits}f}")
        else:
            cells.append(f"{value:.{digits}f}")
    return cells


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against kept elements and V rows, a line for each method."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    with look():
        figure = new_figure(9.0, 4.4, "KL to dense attention by what is kept")
        for axes, x in zip(figure.subplots(1, 2, sharey=True), COLUMNS[:2]):
            for name, colour, marker in zip(names, series_colours(len(names)), MARKERS):
                points = sorted((row[x], row["KL"]) for row in rows if row["method"] == name)
                y, errors = [p[1]["value"] for p in points], [p[1]["stderr"] or 0.0 for p in points]
                axes.errorbar(
                    [p[0] for p in points], y, errors, color=colour, marker=marker, label=name, lw=1.2
                )
            axes.set(xscale="log", yscale="log", xlabel=x)
            ticks = sorted({round(row[x]) for row in rows if row["method"] == names[0]})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        figure.axes[0].set_ylabel("KL(dense || method), nats a token")
        figure.axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calib_text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--calib_windows", type=int, default=4)
    parser.add_argument("--k", default="8,16,32,64")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "budget.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    about = {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": "SmolLM2-135M-Instruct",
        "text": args.text.name,
        "calibration": f"{args.calib_windows} windows of {args.length} tokens of {args.calib_text.name}",
        "evaluation": f"{args.windows} windows of {args.length} tokens, the second half of each",
    }
    done = json.loads(args.output.read_text()) if args.output.is_file() else {"about": about, "rows": []}
    if done["about"] != about:
        raise SystemExit(f"{args.output} is of other settings: name another file")
    print("  ".join(f"{key}: {value}" for key, value in about.items()) + "\n")
    model = update_model(load_model(find_model("smollm2"), "float32", "cpu").eval())
    tokenizer = load_tokenizer(find_model("smollm2"))
    texts = [Window(model, ids) for ids in windows(args.text, tokenizer, args.length, args.windows)]
    prompts = windows(args.calib_text, tokenizer, args.length, args.calib_windows)
    for name in args.methods.split(","):
        for k in map(int, args.k.split(",")):
            if any((row["method"], row["K"]) == (name, k) for row in done["rows"]):
                continue
            params, start = METHODS[name], time.monotonic()
            if "calib_sample_frac" in params:
                use_tables(model, calibrate(model, prompts, params, k))
            calibrated = time.monotonic()
            model_params = {"calib_to": "k", "calib_layers": "uniform", "calib_tac": False} | params
            set_params(model, **model_params, K=k, calibrate=False)
            row = {"method": name, "K": k} | measure(model, texts)
            row["seconds"] = {"calibration": calibrated - start, "evaluation": time.monotonic() - calibrated}
            done["rows"].append(row)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(done, indent=1) + "\n")
            print("  ".join(shown(row)), file=sys.stderr, flush=True)
    print(table([shown(row) for row in done["rows"]], ["method", "K", *COLUMNS]))
    draw(done["rows"], args.output.with_suffix(".png"))
    print(f"\n{done['rows'][0]['tokens']} tokens; written to {args.output}, and a picture beside it")


if __name__ == "__main__":
    main()
