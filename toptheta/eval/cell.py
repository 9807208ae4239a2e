"""Output of a run: folders, files in the published project's formats, answers that survive a crash.

A run's folder is `products/<timestamp>`. A run of several cells has one sub-folder for each. Until a cell is
complete, finished answers are in chunks (partial.py); `finish` joins them. A cell without `results.json` is
unfinished.
"""

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from toptheta.attention import effective_k as effective
from toptheta.eval import partial, processes
from toptheta.models.recorder import DECODE, PREFILL, LayerRecord, count_steps
from toptheta.report.results import Answer, CellResult, Kept, read_result, write_answers
from toptheta.util.console import say
from toptheta.util.files import atomic_path, packed, write_json, write_text
from toptheta.util.interrupts import uninterrupted

CHECKPOINT_SECONDS = 20.0
ANSWERS = "answers.json"  # of a chunk
HISTOGRAMS = "effective_k.npz"  # of a chunk: arrays {phase}/{layer}
NO_FILES: Mapping[str, str] = {}
COUNTED = ("attn_kept", "attn_full", "vrow_kept", "vrow_full", "kv_read", "kv_dense", "wanted", "missed")
EMPTY_KEPT = dict.fromkeys(COUNTED, 0)


class Cell:
    """The product folder of one cell. ratio_to_k: K per layer, for layer{i}.txt, if the method aims at K;
    answers: finished answers by request key; kept: totals by phase; effective_k: whether individual rows are
    counted, which needs ratio_to_k. take_calls: returns the numbers of calls computed dense and of all calls
    since it was last called, see CellResult.computed_dense; calls: both numbers in total."""

    def __init__(self, path: Path, ratio_to_k: tuple[int, ...] | None = None, effective_k: bool = False):
        self.path = path
        self.ratio_to_k = ratio_to_k
        self.effective_k = effective_k and ratio_to_k is not None
        self.answers: dict[str, Any] = {}
        self.kept: dict[str, dict[str, int]] = {}
        self.seconds = 0.0
        self.take_calls: Callable[[], tuple[int, int]] | None = None
        self.calls = (0, 0)
        self._lines: dict[str, list[str]] = {}
        self._new_answers: dict[str, Any] = {}
        self._new_kept: dict[str, dict[str, int]] = {}
        self._new_histograms: dict[str, np.ndarray] = {}
        self._since = time.monotonic()
        self._partial = path / "partial"
        self.failed: set[str] = set()  # requests without an answer of the model
        self._written: list[str] = []  # chunks that this process has added
        self.finished, self.answers, self.seconds, self.kept, self.calls = processes.from_first(self._load)

    def _load(self) -> tuple[bool, dict[str, Any], float, dict[str, dict[str, int]], tuple[int, int]]:
        """Load what earlier starts have finished; returns whether the cell is complete, answers, seconds,
        totals and calls."""
        finished = (self.path / "results.json").is_file()
        if finished:
            shutil.rmtree(self._partial, ignore_errors=True)  # it was killed before it came to this
        partial.remove_damaged(self._partial, ANSWERS)
        for chunk in partial.chunks(self._partial):
            self._take_chunk(chunk)
        return finished, self.answers, self.seconds, self.kept, self.calls

    def _take_chunk(self, chunk: Path) -> None:
        saved = json.loads(partial.read(chunk, ANSWERS))
        self.answers.update(saved["answers"])
        self.seconds += saved["seconds"]
        self.failed.update(saved.get("failed", []))
        self._add_calls(saved.get("calls", (0, 0)))
        _add_kept(self.kept, saved["kept"])

    def _add_calls(self, more: Sequence[int]) -> None:
        self.calls = (self.calls[0] + more[0], self.calls[1] + more[1])

    def fail(self, key: str, answer: Any) -> None:
        """Record a request as failed, with `answer` in place of its answer."""
        self.failed.add(key)
        self.add({key: answer}, {}, {})
        say(f"Out of memory on {key} alone: it counts as failed.")

    def result(self) -> CellResult:
        return read_result(self.path / "results.json")

    def start_clock(self) -> None:
        """Time from here on counts as this cell's evaluation."""
        self._since = time.monotonic()

    def add(
        self,
        answers: dict[str, Any],
        prefill: dict[int, LayerRecord],
        decode: dict[int, list[LayerRecord]],
        decode_steps: np.ndarray | None = None,
        last: bool = True,
    ) -> None:
        """Add a finished request's answers and counts, all or none of them. decode_steps `[B]`: the number of
        steps of each sequence to count; last: False if more follows that has to be in the same chunk."""
        with uninterrupted():
            self._take_all(answers, prefill, decode, decode_steps)
            if last and time.monotonic() - self._since > CHECKPOINT_SECONDS:
                self.checkpoint()

    def _take_all(
        self,
        answers: dict[str, Any],
        prefill: dict[int, LayerRecord],
        decode: dict[int, list[LayerRecord]],
        decode_steps: np.ndarray | None,
    ) -> None:
        self.answers.update(answers)
        self._new_answers.update(answers)
        for layer, record in prefill.items():
            self._take(layer, PREFILL, [record], (record.n > 0)[None])
            if self.effective_k and record.histogram is not None:
                _add_histograms(self._new_histograms, {f"{PREFILL}/{layer}": record.histogram})
            if layer == min(prefill):
                self._add_lines("sequence_lengths_per_example.csv", [f"{n}\n" for n in record.n if n > 0])
        for layer, steps in decode.items():
            live = np.stack([record.n for record in steps]) > 0  # [steps, B]
            if decode_steps is not None:
                live &= np.arange(len(steps))[:, None] < decode_steps
            self._take(layer, DECODE, steps, live)
            if self.effective_k:
                self._count_steps(layer, steps, live)

    def _add_lines(self, name: str, lines: list[str]) -> None:
        """Append lines to a product file (a name ending in .gz is compressed)."""
        self._lines.setdefault(name, []).extend(lines)

    def _take(self, layer: int, phase: str, records: list[LayerRecord], live: np.ndarray) -> None:
        """Add a layer's records to the totals and to the lines of product files, in the order of records,
        then of sequences. live: `[records, B]`, those that count."""

        def stacked(name: str) -> np.ndarray:
            return np.stack([getattr(record, name) for record in records])[live]

        attn, vrow, n, full = (stacked(name) for name in ("attn", "vrow", "n", "full"))
        totals = self._new_kept.setdefault(phase, dict(EMPTY_KEPT))
        totals["attn_kept"] += int(attn.sum())
        totals["attn_full"] += int(full.sum()) * attn.shape[1]
        totals["vrow_kept"] += int(vrow.sum())
        totals["vrow_full"] += int(n.sum()) * vrow.shape[1]
        if all(record.kv_read is not None for record in records):
            read = stacked("kv_read")
            totals["kv_read"] += int(read.sum())
            totals["kv_dense"] += int(stacked("kv_dense").sum()) * read.shape[1]
        if all(record.missed is not None for record in records):
            totals["wanted"] += int(stacked("wanted").sum())
            totals["missed"] += int(stacked("missed").sum())
        lengths, by_head = n.tolist(), attn.tolist()
        self._add_lines(
            f"layer{layer}_kept_attn_{phase}.csv.gz",
            [
                f"{layer},{head},{length},{kept},{of}\n"
                for length, of, heads in zip(lengths, full.tolist(), by_head)
                for head, kept in enumerate(heads)
            ],
        )
        self._add_lines(
            f"layer{layer}_kept_vrow_{phase}.csv.gz",
            [
                f"{layer},{group},{length},{kept},{length}\n"
                for length, groups in zip(lengths, vrow.tolist())
                for group, kept in enumerate(groups)
            ],
        )
        if self.ratio_to_k is not None and lengths:
            k = self.ratio_to_k[layer]
            self._add_lines(
                f"layer{layer}.txt.gz",
                [
                    f"L{layer}_H{head}:{length} {k} {phase} {kept / topk if topk else 1.0:.6g}\n"
                    for length, topk, heads in zip(lengths, stacked("topk").tolist(), by_head)
                    for head, kept in enumerate(heads)
                ],
            )
        popularity = [
            f"{layer},{group},{record.n[b]},{counts[: record.n[b]].tolist()}\n"
            for record, of_record in zip(records, live)
            if record.popularity is not None
            for b in np.flatnonzero(of_record)
            for group, counts in enumerate(record.popularity[b])
        ]
        if popularity:
            self._add_lines(f"layer{layer}_kept_vrow_popularities_{phase}.txt.gz", popularity)

    def _count_steps(self, layer: int, steps: list[LayerRecord], live: np.ndarray) -> None:
        """Add decode rows to the histogram of a layer, unless it is left dense."""
        assert self.ratio_to_k is not None
        k = self.ratio_to_k[layer]
        if k > 0:
            _add_histograms(self._new_histograms, {f"{DECODE}/{layer}": count_steps(steps, k, live)})

    def checkpoint(self) -> None:
        """Write everything since the last checkpoint as a new chunk."""
        now = time.monotonic()
        with uninterrupted():
            if self._new_answers:
                seconds = (now - self._since) / processes.world_size()  # they work at the same time
                failed = sorted(self.failed & self._new_answers.keys())
                saved = {"answers": self._new_answers, "kept": self._new_kept, "seconds": seconds}
                saved |= {"failed": failed} if failed else {}
                if self.take_calls is not None:
                    calls = self.take_calls()
                    saved["calls"] = calls
                    self._add_calls(calls)
                files = {name: packed(name, "".join(lines), 3) for name, lines in self._lines.items()}
                files[ANSWERS] = json.dumps(saved).encode()
                if self._new_histograms:
                    arrays = io.BytesIO()
                    np.savez_compressed(arrays, **self._new_histograms)  # type: ignore[arg-type]
                    files[HISTOGRAMS] = arrays.getvalue()
                self._written.append(partial.write(self._partial, files))
                self.seconds += seconds
                _add_kept(self.kept, self._new_kept)
                self._lines, self._new_answers, self._new_kept, self._new_histograms = {}, {}, {}, {}
            self._since = now

    def join(self) -> None:
        """Collect the results of all processes in the first one. Raises UsageError if their files are not
        visible to it."""
        self.checkpoint()
        for others in processes.gather(self._written)[1:]:
            for name in others:
                processes.wait_for_file(self._partial / name)
                self._take_chunk(self._partial / name)
        self._written.clear()

    def finish(
        self, result: CellResult, answers: Sequence[Answer], files: Mapping[str, str] = NO_FILES
    ) -> CellResult:
        """Join the chunks into the product files, write `files` (texts by name), answers.jsonl and, last,
        results.json.

        Returns the result, with effective_k if it is counted: `effective.overall` for each phase.
        """
        self.checkpoint()
        chunks = partial.chunks(self._partial)
        for name in sorted(
            {name for chunk in chunks for name in partial.names(chunk)} - {ANSWERS, HISTOGRAMS, *files}
        ):
            with atomic_path(self.path / name) as temporary, open(temporary, "wb") as joined:
                for chunk in chunks:
                    joined.write(partial.read(chunk, name))  # gzip members may simply follow each other
        if self.effective_k:
            result = replace(result, effective_k=self._write_effective_k(chunks))
        for name, text in files.items():
            write_text(self.path / name, text)
        write_answers(self.path, answers)
        write_json(self.path / "results.json", result.to_json())
        shutil.rmtree(self._partial, ignore_errors=True)
        return result

    def _write_effective_k(self, chunks: list[Path]) -> list[dict[str, Any]]:
        """Write effective_k.csv from the histograms of all chunks; returns it over all lengths."""
        assert self.ratio_to_k is not None
        ks, totals = self.ratio_to_k, dict[str, np.ndarray]()
        for chunk in chunks:
            if data := partial.read(chunk, HISTOGRAMS):
                with np.load(io.BytesIO(data)) as saved:
                    _add_histograms(totals, dict(saved))
        rows, total = list[dict[str, Any]](), list[dict[str, Any]]()
        for phase in (PREFILL, DECODE):
            found = {
                layer: totals[f"{phase}/{layer}"] for layer in range(len(ks)) if f"{phase}/{layer}" in totals
            }
            for layer, histogram in found.items():
                rows += effective.by_length(histogram, layer, phase, ks[layer])
            total += effective.overall(found, phase, ks)
        text = io.StringIO()
        table = csv.DictWriter(text, effective.COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(self.path / "effective_k.csv", text.getvalue())
        return total

    def kept_shares(self) -> dict[str, Kept | None]:
        """The shares of elements and V rows kept, by phase; None for a phase that did not occur. Call it
        after `checkpoint`."""
        shares: dict[str, Kept | None] = {}
        for phase in (PREFILL, DECODE):
            totals = self.kept.get(phase)
            shares[phase] = None
            if totals and totals["attn_full"]:
                attn, vrow = (totals[f"{what}_kept"] / totals[f"{what}_full"] for what in ("attn", "vrow"))
                shares[phase] = Kept(attn, vrow)
        return shares

    def kv_bytes(self) -> dict[str, float | None]:
        """KV bytes read as a share of those of dense attention, by phase, as `kept_shares`."""
        totals = {phase: self.kept.get(phase, EMPTY_KEPT) for phase in (PREFILL, DECODE)}
        return {p: t["kv_read"] / t["kv_dense"] if t["kv_dense"] else None for p, t in totals.items()}

    def missed_keys(self) -> float | None:
        """Of the keys that the rule keeps by their scores in decode steps, the share that a quantized copy of
        K misses; None if there is no copy."""
        totals = EMPTY_KEPT | self.kept.get(DECODE, EMPTY_KEPT)  # older chunks do not have all of them
        return totals["missed"] / totals["wanted"] if totals["wanted"] else None


def _add_kept(totals: dict[str, dict[str, int]], more: dict[str, dict[str, int]]) -> None:
    for phase, values in more.items():
        into = totals.setdefault(phase, dict(EMPTY_KEPT))
        for name, value in values.items():
            into[name] += value


def _add_histograms(totals: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> None:
    for name, histogram in more.items():
        totals[name] = totals[name] + histogram if name in totals else histogram
