"""Perplexity of a text by context length, teacher-forced in windows of --max_seq_len tokens.

The text is cut into whole windows, each read on its own; what is left at the end is not used. The first
windows calibrate and are never evaluated: a quarter of them, at most 20, unless --calib_samples says
otherwise. A token's context length is the number of tokens before it in its window; lengths fall into buckets
whose upper bounds are powers of two.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toptheta.eval.settings import GenSettings
from toptheta.eval.tasks.base import Outcome
from toptheta.eval.tasks.items import CALIBRATION_ITEMS, Item, ItemJob, split_off
from toptheta.models import generation as chunked
from toptheta.models.patch import model_device
from toptheta.report.results import Answer, Metric
from toptheta.util.errors import UsageError
from toptheta.util.files import read_text

SHORTEST_BUCKET = 64  # contexts of 1 to 64 tokens


class PerplexityJob(ItemJob):
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

    def outcome(self, answers: list[dict[str, Any]]) -> Outcome:
        """With perplexity by length, also as perplexity.csv: length (upper bound of the bucket), tokens, nll
        (mean, nats per token), ppl. The score of a window is its nll per token."""
        rows = [self._bucket(answers, i) for i in range(len(self.bounds))]
        text = io.StringIO()
        columns = ["length", "tokens", "nll", "ppl"]
        table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        nll, tokens = [sum(a["nll"]) for a in answers], [sum(a["tokens"]) for a in answers]
        kept = [
            Answer(item.key, item.hash, None, {"nll": one / count}, {"prompt": len(item.ids)})
            for item, one, count in zip(self.items, nll, tokens)
        ]
        files = {"perplexity.csv": text.getvalue(), "perplexity.json": json.dumps(rows, indent=1) + "\n"}
        return Outcome({"ppl": perplexity(nll, tokens)}, kept, {"by_length": rows}, files)

    def _bucket(self, answers: list[dict[str, Any]], i: int) -> dict[str, Any]:
        nll, tokens = [answer["nll"][i] for answer in answers], [answer["tokens"][i] for answer in answers]
        here = perplexity(nll, tokens)
        return {
            "length": self.bounds[i],
            "tokens": sum(tokens),
            "nll": sum(nll) / sum(tokens),
            "ppl": here.value,
            "stderr": here.stderr,
        }

    def title(self, model_name: str) -> str:
        return f"{model_name}, perplexity of {Path(str(self.settings.text)).name}"


def bucket_bounds(max_seq_len: int) -> list[int]:
    """Upper bounds of the buckets of context lengths 1..max_seq_len - 1: 64, 128, ..., the last one
    max_seq_len."""
    bounds, bound = [], SHORTEST_BUCKET
    while bound < max_seq_len - 1:
        bounds.append(bound)
        bound *= 2
    return [*bounds, max_seq_len]


def perplexity(nll: list[float], tokens: list[int]) -> Metric:
    """exp(mean -log p per token) over windows of like size, from their summed -log p. The standard error
    comes from the spread between windows (the delta method), None for one window; count: windows."""
    value = float(np.exp(sum(nll) / sum(tokens)))
    if len(nll) < 2:
        return Metric(value, None, len(nll))
    spread = np.std(np.array(nll) / np.array(tokens), ddof=1) / len(nll) ** 0.5
    return Metric(value, float(value * spread), len(nll))
