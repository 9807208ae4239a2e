"""Perplexity of a text by context length, teacher-forced in windows of --max_seq_len tokens.

The text is cut into complete windows, each computed separately; a remainder at the end is not used. The first
windows are for calibration and never evaluated: a quarter of them, at most 20, unless --calib_samples is
given. With --calib_text calibration uses windows of another text, and the same windows are evaluated as
without. A token's context length is the number of tokens
before it in its window; context lengths are grouped in buckets whose upper bounds are powers of two.

The first --decode_from tokens of a window (default half) are a prompt: computed dense and not counted. The
others are decode steps after it. Predictions are compared with those of dense attention, token by token
(models/divergence.py).
"""

import csv
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toptheta.eval.settings import GenSettings
from toptheta.eval.tasks.base import Engine, Outcome
from toptheta.eval.tasks.items import (
    CALIBRATION_ITEMS,
    Item,
    ItemJob,
    calibration_count,
    mean_and_stderr,
    split_off,
)
from toptheta.eval.tasks.texts import text_of
from toptheta.models import divergence
from toptheta.models import generation as chunked
from toptheta.models.loading import ModelSource
from toptheta.models.patch import model_device, update_model
from toptheta.report.results import Answer, Metric
from toptheta.util.errors import UsageError

SHORTEST_BUCKET = 64  # contexts of 1 to 64 tokens
READINGS_BYTES = 2 << 30  # of windows as dense attention reads them, kept for the cells that follow
KL_QUANTILES = {"kl_q99": 0.99, "kl_q99.9": 0.999}  # over tokens, by the metric's name


class PerplexityJob(ItemJob):
    """Windows of the text; the answer to a window is its summed -log p and number of tokens in each bucket,
    and the divergence of each token's prediction from dense attention."""

    unit = "window"
    options = (*ItemJob.options, "decode_from")

    def __init__(self, settings: GenSettings, tokenizer: Any):
        super().__init__(settings, tokenizer)
        assert settings.text is not None
        # What the tokenizer puts before every text (BOS), if anything.
        self.start = tokenizer("")["input_ids"]
        windows = self._windows(settings.text, "--text", 2)
        usual = min(CALIBRATION_ITEMS, max(1, len(windows) // 4))
        first, rest = split_off(windows, settings, usual, "windows")
        if settings.calib_text:
            others = self._windows(settings.calib_text, "--calib_text", 1)
            count = calibration_count(settings, usual, len(others))
            if settings.calib_samples and count > len(others):
                raise UsageError(
                    f"--calib_samples {count}: --calib_text {settings.calib_text} has only {len(others)} "
                    f"windows of {settings.max_seq_len} tokens; give at most that."
                )
            first = others[:count]
        self.calibration = [
            self._item(f"calibration{i}", window, settings.calib_seq_len) for i, window in enumerate(first)
        ]
        self.items = [self._item(f"window{i}", window) for i, window in enumerate(rest[: settings.num_tasks])]
        given = settings.decode_from
        self.decode_from = settings.max_seq_len // 2 if given is None else given
        self.bounds = bucket_bounds(settings.max_seq_len, self.decode_from)
        self.judge: Any = None  # the dense model, where it is another one
        self._several_cells = len(settings.cells()) > 1
        self._readings: dict[tuple[str, ...], divergence.DenseReading] = {}

    def _windows(self, path: str, flag: str, least: int) -> list[list[int]]:
        """The text cut into windows of --max_seq_len tokens. Raises UsageError for fewer than `least`."""
        ids = self.tokenizer(text_of(path, flag), add_special_tokens=False)["input_ids"]
        width = self.settings.max_seq_len - len(self.start)
        windows = [ids[at : at + width] for at in range(0, len(ids) - width + 1, width)]
        if len(windows) < least:
            wanted = "one window" if least == 1 else "two windows (to calibrate and to evaluate)"
            raise UsageError(
                f"{flag} {path} has {len(ids)} tokens, fewer than {wanted} of {width}: lower --max_seq_len, "
                "or give a longer text."
            )
        return windows

    def load(self, source: ModelSource) -> Engine:
        engine, dtype = super().load(source), self.settings.reference_dtype
        if dtype != "auto" and getattr(torch, dtype) != engine.model.dtype:
            judge = self.load_stock(source, dtype)
            self.judge = update_model(judge)
        return engine

    def _item(self, key: str, window: list[int], length: int | None = None) -> Item:
        return Item(key, (self.start + window)[:length])

    def run(self, model: Any, batch: list[Item]) -> list[dict[str, Any]]:
        ids = torch.tensor([item.ids for item in batch], device=model_device(model))
        how = self.decode_from, self.settings.prefill_chunk
        dense = self._dense_reading(model if self.judge is None else self.judge, ids, batch)
        found = divergence.against_dense(model, ids, *how, dense, self.judge)
        bucket = np.searchsorted(self.bounds, np.arange(self.decode_from + 1, ids.shape[1]))
        tokens = np.bincount(bucket, minlength=len(self.bounds)).tolist()
        return [
            {
                "key": item.key,
                "nll": np.bincount(bucket, weights=nll, minlength=len(self.bounds)).tolist(),
                "tokens": tokens,
                "dense_nll": float(dense_nll.sum()),
                "kl": kl.tolist(),
                "same_top": int(same_top.sum()),
                "dense_s": dense.seconds / len(batch),
            }
            for item, nll, dense_nll, kl, same_top in zip(
                batch,
                found.nll.double().numpy(),
                found.dense_nll.double().numpy(),
                found.kl.double().numpy(),
                found.same_top.numpy(),
            )
        ]

    def _dense_reading(self, judge: Any, ids: torch.Tensor, batch: list[Item]) -> divergence.DenseReading:
        """Dense attention's results for a batch, cached for the other cells as far as READINGS_BYTES
        allows."""
        key = tuple(item.key for item in batch)
        if key not in self._readings:
            start = time.monotonic()
            found = divergence.read_dense(judge, ids, self.decode_from, self.settings.prefill_chunk)
            finite = bool(found.hidden.isfinite().all())
            found = replace(found, seconds=time.monotonic() - start)
            kept = sum(one.nbytes + one.room for one in self._readings.values())
            full = kept + found.nbytes > READINGS_BYTES
            if full or not self._several_cells or not finite:  # that is for `checked` to see again
                return found
            if len(self.settings.k) > 1 and kept + 2 * found.nbytes <= READINGS_BYTES:
                found = replace(found, room=found.nbytes)
            self._readings[key] = found
        return self._readings[key]

    def calibrate_on(self, model: Any, batch: list[Item]) -> None:
        """All rows of a window, for any --decode_from, so that thresholds of every length are calibrated."""
        ids = torch.tensor([item.ids for item in batch], device=model_device(model))
        chunked.negative_log_likelihood(model, ids, self.settings.prefill_chunk)

    def outcome(self, answers: list[dict[str, Any]]) -> Outcome:
        """With perplexity by length, also as perplexity.csv: length (upper bound of the bucket), tokens, nll
        (mean, nats per token), ppl. The scores of a window are means of its tokens: nll, and kl, same_top and
        ln_ppl_ratio against dense. dense_window_s: seconds of dense attention for a window."""
        rows = [self._bucket(answers, i) for i in range(len(self.bounds))]
        text = io.StringIO()
        columns = ["length", "tokens", "nll", "ppl"]
        table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        nll, tokens = [sum(a["nll"]) for a in answers], [sum(a["tokens"]) for a in answers]
        scores = [{"nll": one / count} for one, count in zip(nll, tokens)]
        metrics = {"ppl": perplexity(nll, tokens)}
        if all("kl" in answer for answer in answers):  # earlier versions did not compare
            for score, answer in zip(scores, answers):
                score |= _against_dense(answer)
            metrics |= divergences(scores, [kl for answer in answers for kl in answer["kl"]])
        kept = [
            Answer(item.key, self._hash(item), None, score, {"prompt": len(item.ids)})
            for item, score in zip(self.items, scores)
        ]
        files = {"perplexity.csv": text.getvalue(), "perplexity.json": json.dumps(rows, indent=1) + "\n"}
        extra = {
            "by_length": rows,
            "dense_window_s": float(np.mean([a.get("dense_s", 0.0) for a in answers])),
        }
        return Outcome(metrics, kept, extra, files)

    def _hash(self, item: Item) -> str:
        """The hash of the window and of its counted part."""
        return f"{item.hash}/{self.decode_from}" if self.decode_from else item.hash

    def _bucket(self, answers: list[dict[str, Any]], i: int) -> dict[str, Any]:
        nll, tokens = [answer["nll"][i] for answer in answers], [answer["tokens"][i] for answer in answers]
        here = perplexity(nll, tokens)
        return {
            "length": self.bounds[i],
            "first": (self.bounds[i - 1] if i else self.decode_from) + 1,
            "tokens": sum(tokens),
            "nll": sum(nll) / sum(tokens),
            "ppl": here.value,
            "stderr": here.stderr,
        }

    def title(self, model_name: str) -> str:
        return f"{model_name}, perplexity of {Path(str(self.settings.text)).name}"


def bucket_bounds(max_seq_len: int, decode_from: int = 0) -> list[int]:
    """Upper bounds of the buckets of context lengths decode_from + 1..max_seq_len - 1: those of 64, 128, ...
    that hold any, the last one max_seq_len."""
    bounds, bound = [], SHORTEST_BUCKET
    while bound < max_seq_len - 1:
        bounds.append(bound)
        bound *= 2
    return [bound for bound in [*bounds, max_seq_len] if bound > decode_from]


def _against_dense(answer: dict[str, Any]) -> dict[str, float]:
    """A window's scores against dense, as means over its tokens."""
    count = sum(answer["tokens"])
    return {
        "kl": sum(answer["kl"]) / count,
        "same_top": answer["same_top"] / count,
        "ln_ppl_ratio": (sum(answer["nll"]) - answer["dense_nll"]) / count,
    }


def divergences(scores: list[dict[str, float]], kl: list[float]) -> dict[str, Metric]:
    """The metrics of llama.cpp's --kl-divergence. From the scores of windows of equal size: the mean
    KL(dense || method) in nats, the share of tokens with the same most likely token, and the log ratio of
    perplexities, with standard errors between windows; from the `kl` of all tokens: high quantiles."""
    metrics = {"kl": mean_and_stderr([score["kl"] for score in scores])}
    for name, share in KL_QUANTILES.items():
        metrics[name] = Metric(float(np.quantile(kl, share)), None, len(kl))
    for name in ("same_top", "ln_ppl_ratio"):
        metrics[name] = mean_and_stderr([score[name] for score in scores])
    return metrics


def perplexity(nll: list[float], tokens: list[int]) -> Metric:
    """exp(mean -log p per token) over windows of equal size, from their summed -log p. The standard error is
    that between windows (by the delta method), None for one window; count: windows."""
    value = float(np.exp(sum(nll) / sum(tokens)))
    if len(nll) < 2:
        return Metric(value, None, len(nll))
    spread = np.std(np.array(nll) / np.array(tokens), ddof=1) / len(nll) ** 0.5
    return Metric(value, float(value * spread), len(nll))
