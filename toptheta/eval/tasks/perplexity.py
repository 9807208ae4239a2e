"""Perplexity of a text by context length, teacher-forced in windows of --max_seq_len tokens.

The text is cut into whole windows, each read on its own; what is left at the end is not used. The first
windows calibrate and are never evaluated: a quarter of them, at most 20, unless --calib_samples says
otherwise. A token's context length is the number of tokens before it in its window; lengths fall into buckets
whose upper bounds are powers of two.
"""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toptheta.eval.run import Run
from toptheta.eval.settings import GenSettings
from toptheta.eval.tasks.base import CALIBRATION_ITEMS, GenJob, Item, split_off
from toptheta.models import generation as chunked
from toptheta.models.patch import model_device
from toptheta.report import tables as report
from toptheta.report.plots.perplexity import draw_perplexity
from toptheta.report.plots.tradeoff import draw_tradeoff
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import read_text, write_json, write_text

SHORTEST_BUCKET = 64  # contexts of 1 to 64 tokens


class PerplexityJob(GenJob):
    """Windows of the text; the answer to a window is its summed -log p and tokens in each bucket."""

    unit = "window"

    def __init__(self, settings: GenSettings, tokenizer: Any):
        super().__init__(settings, tokenizer)
        assert settings.text is not None
        self.start = tokenizer("")[
            "input_ids"
        ]  # what the tokenizer puts before every text (BOS), if anything
        ids = tokenizer(read_text(settings.text, "--text"), add_special_tokens=False)["input_ids"]
        width = settings.max_seq_len - len(self.start)
        windows = [ids[at : at + width] for at in range(0, len(ids) - width + 1, width)]
        if len(windows) < 2:
            raise UsageError(
                f"--text {settings.text} has {len(ids)} tokens, less than two windows of {width}, one to "
                "calibrate on and one to evaluate: lower --max_seq_len, or give a longer text."
            )
        first, rest = split_off(
            windows, settings, min(CALIBRATION_ITEMS, max(1, len(windows) // 4)), "windows"
        )
        self.calibration = [self._item(f"calibration{i}", window) for i, window in enumerate(first)]
        self.items = [self._item(f"window{i}", window) for i, window in enumerate(rest[: settings.num_tasks])]
        self.bounds = bucket_bounds(settings.max_seq_len)

    def _item(self, key: str, window: list[int]) -> Item:
        return Item(key, self.start + window)

    def run(self, model: Any, batch: list[Item]) -> list[dict[str, Any]]:
        ids = torch.tensor([item.ids for item in batch], device=model_device(model))
        nll = chunked.negative_log_likelihood(model, ids, self.settings.prefill_chunk).double().numpy()
        bucket = np.searchsorted(self.bounds, np.arange(1, ids.shape[1]))
        tokens = np.bincount(bucket, minlength=len(self.bounds)).tolist()
        return [
            {
                "key": item.key,
                "nll": np.bincount(bucket, weights=row, minlength=len(self.bounds)).tolist(),
                "tokens": tokens,
            }
            for item, row in zip(batch, nll)
        ]

    def metrics(self, answers: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
        """ppl = exp(mean -log p per token); its standard error from the spread between windows (the delta
        method); count: windows."""
        return {"ppl": perplexity([sum(a["nll"]) for a in answers], [sum(a["tokens"]) for a in answers])}

    def write(self, folder: Path, answers: list[dict[str, Any]], title: str) -> dict[str, Any]:
        """perplexity.csv: length (upper bound of the bucket), tokens, nll (mean, nats per token), ppl."""
        rows = []
        for i, bound in enumerate(self.bounds):
            tokens = sum(answer["tokens"][i] for answer in answers)
            here = perplexity([a["nll"][i] for a in answers], [a["tokens"][i] for a in answers])
            nll = sum(answer["nll"][i] for answer in answers) / tokens
            rows.append(
                {
                    "length": bound,
                    "tokens": tokens,
                    "nll": nll,
                    "ppl": here["value"],
                    "stderr": here["stderr"],
                }
            )
        text = io.StringIO()
        table = csv.DictWriter(
            text, ["length", "tokens", "nll", "ppl"], extrasaction="ignore", lineterminator="\n"
        )
        table.writeheader()
        table.writerows(rows)
        write_text(folder / "perplexity.csv", text.getvalue())
        write_json(folder / "perplexity.json", rows)
        return {"by_length": rows}

    def finish(self, run: Run, results: list[dict[str, Any]], model_name: str) -> None:
        """Print and save one row per cell: perplexity by context length, over all, and what was kept."""
        title = f"{model_name}, perplexity of {Path(str(self.settings.text)).name}"
        header = ["method", *(f"<= {row['length']}" for row in results[0]["by_length"]), "all"]
        header += ["kept elements %", "calibration s", "evaluation s"]
        rows = []
        for result in results:
            kept = report.percent(result["kept"], "prefill", "attn")
            seconds = [f"{result['seconds'][name]:.0f}" for name in ("calibration", "evaluation")]
            lengths = [f"{row['ppl']:.2f}" for row in result["by_length"]]
            rows.append([result["method"], *lengths, _with_error(result["metrics"]["ppl"]), kept, *seconds])
        text = report.table(rows, header)
        if run.settings.effective_k:
            text += "\n\n" + report.effective_k(results)
        print(f"\n{title}, by context length in tokens\n\n{text}\n")
        write_text(run.folder / "summary.md", f"# {title}, by context length in tokens\n\n{text}\n")
        write_json(run.folder / "summary.json", results)
        if any(result["k"] is not None and result["kept"] for result in results):
            picture = run.folder / "tradeoff.png"
            for left_out in draw_tradeoff(results, picture, title):
                say(left_out)
            print(f"Picture: {picture}")
        picture = run.folder / "perplexity.png"
        draw_perplexity(results, picture, title)
        print(f"Picture: {picture}")
        print(f"Products: {run.folder}")


def bucket_bounds(max_seq_len: int) -> list[int]:
    """Upper bounds of the buckets of context lengths 1..max_seq_len - 1: 64, 128, ..., the last one
    max_seq_len."""
    bounds, bound = [], SHORTEST_BUCKET
    while bound < max_seq_len - 1:
        bounds.append(bound)
        bound *= 2
    return [*bounds, max_seq_len]


def perplexity(nll: list[float], tokens: list[int]) -> dict[str, Any]:
    """Perplexity over windows of like size from their summed -log p; stderr is None for one window."""
    mean = sum(nll) / sum(tokens)
    value = float(np.exp(mean))
    if len(nll) < 2:
        return {"value": value, "stderr": None, "count": len(nll)}
    spread = np.std(np.array(nll) / np.array(tokens), ddof=1) / len(nll) ** 0.5
    return {"value": value, "stderr": float(value * spread), "count": len(nll)}


def _with_error(metric: dict[str, Any]) -> str:
    """'12.3 ± 0.4 (n=5)'."""
    spread = "" if metric["stderr"] is None else f" ± {metric['stderr']:.2f}"
    return f"{metric['value']:.2f}{spread} (n={metric['count']})"
