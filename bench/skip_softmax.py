#!/usr/bin/env python3
"""Calibrate skip softmax: fit lambda = a * exp(b * S) / L of both phases to a share S of skipped scores.

    .venv/bin/python bench/skip_softmax.py --text FILE --share S [--llama MODEL] [--lengths N[,N]]
        [--prompts N] [--steps N]

Prompts of several lengths are read, and then some steps of the text behind each, with every lambda of a grid.
The share of scores that was skipped is counted over all layers and heads. Prints the `--method` to use, and
the shares that it reaches on other parts of the text.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toptheta.methods.skip_softmax import SkipSoftmax, fit
from toptheta.models.control import reading_prompt, record_statistics, set_params
from toptheta.models.loading import find_model, load_model, load_tokenizer
from toptheta.models.patch import update_model
from toptheta.models.recorder import Recorder
from toptheta.report.tables import table
from toptheta.util.errors import UsageError

LAMBDAS = tuple(10.0 ** (-i / 2) for i in range(1, 13))
PHASES = "prefill", "decode"


def skipped(model: Any, ids: Tensor, steps: int) -> tuple[float, float]:
    """Shares of the scores that a prompt skips, and the last `steps` tokens of `ids` `[1, T]` behind it."""
    recorder = Recorder()
    record_statistics(model, recorder)
    cache = DynamicCache(config=model.config)
    with reading_prompt(model):
        model(ids[:, :-steps], past_key_values=cache, logits_to_keep=1)
    for at in range(ids.shape[1] - steps, ids.shape[1]):
        model(ids[:, at : at + 1], past_key_values=cache)
    prefill, decode = recorder.drain()
    record_statistics(model, None)
    shares = []
    for records in (list(prefill.values()), [step for steps_ in decode.values() for step in steps_]):
        full = sum(int(record.full.sum()) * record.attn.shape[1] for record in records)
        shares.append(1.0 - sum(int(record.attn.sum()) for record in records) / full)
    return shares[0], shares[1]


def calibrate(
    model: Any,
    prompts: list[Tensor],
    share: float,
    steps: int,
    lambdas: tuple[float, ...] = LAMBDAS,
    tile: int = SkipSoftmax.tile,
) -> SkipSoftmax:
    """The method that skips `share` of the scores of prompts like these, `[1, T]` each. Raises UsageError
    where too few lambdas skip anything, or less than everything."""
    used: list[float] = []
    lengths: dict[str, list[int]] = {phase: [] for phase in PHASES}
    shares: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for ids in prompts:
        for one in lambdas:
            set_params(model, method=SkipSoftmax(one, one, tile=tile), placement="pre-softmax")
            used.append(one)
            for phase, found in zip(PHASES, skipped(model, ids, steps)):
                shares[phase].append(found)
            lengths["prefill"].append(ids.shape[1] - steps)
            lengths["decode"].append(ids.shape[1] - steps // 2)
    values: dict[str, float] = {}
    for phase in PHASES:
        a, b = fit(used, lengths[phase], shares[phase])
        values |= {f"{phase}_a": float(f"{a:.4g}"), f"{phase}_b": float(f"{b:.4g}")}
    return SkipSoftmax(share=share, tile=tile, **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--share", type=float, required=True)
    parser.add_argument("--llama", default="smollm2")
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--prompts", type=int, default=2, help="of each length (default 2)")
    parser.add_argument("--steps", type=int, default=8, help="behind each prompt (default 8)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    source = find_model(arguments.llama)
    model = update_model(
        load_model(source, "auto" if arguments.device != "cpu" else "float32", arguments.device)
    )
    ids = load_tokenizer(source)(arguments.text.read_text(), return_tensors="pt", verbose=False).input_ids
    ids = ids.to(arguments.device)
    sizes = [int(part) for part in arguments.lengths.split(",")] * arguments.prompts
    needed = 2 * (sum(sizes) + arguments.steps * len(sizes))
    if ids.shape[1] < needed:
        raise SystemExit(
            f"{arguments.text} has {ids.shape[1]} tokens, not {needed}: ask for fewer or shorter."
        )
    parts = list(ids[:, :needed].split([size + arguments.steps for size in sizes] * 2, dim=1))
    try:
        method = calibrate(model, parts[: len(sizes)], arguments.share, arguments.steps)
    except UsageError as error:
        raise SystemExit(str(error)) from None
    print(f"--method {method.spec}")
    set_params(model, method=method)
    rows = []
    for part in parts[len(sizes) :]:
        found = skipped(model, part, arguments.steps)
        rows.append([part.shape[1] - arguments.steps, *(f"{100 * share:.1f}" for share in found)])
    print(table(rows, ["tokens", "skipped in prefill %", "in decode %"]))


if __name__ == "__main__":
    import torch

    with torch.no_grad():
        main()
