"""Any run as pandas tables: `toptheta.report.load`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from toptheta.report.compare import distinct_labels, is_cell, unfinished
from toptheta.report.paired import paired_with_dense
from toptheta.report.plots.read import (
    named_layers,
    read_config,
    read_effective_k,
    read_kept,
    read_results,
    read_results_by_task,
    read_thresholds,
)
from toptheta.report.results import ANSWERS, PHASES, CellResult, read_answers
from toptheta.util.errors import UsageError

ANSWER_FIELDS = ("key", "hash", "answer", "target", "question", "choices")


@dataclass(frozen=True)
class LoadedRun:
    """One or several runs. results: of every cell, dense cells of a task first, compared with dense if there
    is such a cell; labels: of each result, unique within a task.

    The tables are read on first use. Each has the columns `task` and `cell` (the label). Tables whose files
    no cell has have no rows.
    """

    folders: tuple[Path, ...]
    results: tuple[CellResult, ...]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def by_task(self) -> dict[str, list[CellResult]]:
        """The results of each task."""
        tasks: dict[str, list[CellResult]] = {}
        for result in self.results:
            tasks.setdefault(result.task, []).append(result)
        return tasks

    @cached_property
    def cells(self) -> pd.DataFrame:
        """A row for each cell: method, name, k, dense, folder; each metric and its standard error (`acc`,
        `acc_stderr`); shares kept by phase (`kept_prefill`, `vrows_prefill`); KV bytes read as a share of
        those of dense attention (`kv_bytes_prefill`); missed keys (`missed_keys`); and seconds."""
        rows = []
        for label, result in zip(self.labels, self.results):
            row: dict[str, Any] = {"task": result.task, "cell": label, "model": result.model}
            row |= {name: getattr(result, name) for name in ("method", "name", "k", "dense", "folder")}
            for name, metric in result.metrics.items():
                row |= {name: metric.value, f"{name}_stderr": metric.stderr}
            for phase in PHASES:
                row[f"kept_{phase}"] = result.kept_share(phase, "attn")
                row[f"vrows_{phase}"] = result.kept_share(phase, "vrow")
                row[f"kv_bytes_{phase}"] = (result.kv_bytes or {}).get(phase)
            row["missed_keys"] = result.missed_keys
            rows.append(row | {f"{name}_s": value for name, value in result.seconds.items()})
        return pd.DataFrame(rows)

    @cached_property
    def kept(self) -> pd.DataFrame:
        """Attention elements: layer, phase, head, n (row length of a decode step, prompt length in prefill;
        tokens), kept, full."""
        return self._joined(lambda folder: _kept(folder, "attn"), "layer phase head n kept full")

    @cached_property
    def vrows(self) -> pd.DataFrame:
        """V rows: layer, phase, group (of query heads that share a KV head), n, kept, full."""
        return self._joined(lambda folder: _kept(folder, "vrow"), "layer phase group n kept full")

    @cached_property
    def thresholds(self) -> pd.DataFrame:
        """layer, head, n (row length, tokens), theta (score or weight), samples, k."""
        columns = "layer head n theta samples k"
        return self._joined(lambda folder: _present(read_thresholds(folder)), columns)

    @cached_property
    def effective_k(self) -> pd.DataFrame:
        """How many elements rows keep, for cells run with --effective_k: the columns of effective_k.csv."""
        columns = "layer phase n_low n_high k rows mean p5 p50 p95"
        return self._joined(lambda folder: _present(read_effective_k(folder)), columns)

    @cached_property
    def answers(self) -> pd.DataFrame:
        """A row for each question: key, hash, answer, target, question and choices (their words), each score,
        and tokens (`prompt_tokens`, `reply_tokens`)."""
        return self._joined(_answers, " ".join(ANSWER_FIELDS))

    def config(self, label: str, task: str | None = None) -> dict[str, Any]:
        """config.json of the cell with this label. Raises UsageError if there is no such cell."""
        for one, result in zip(self.labels, self.results):
            if one == label and task in (None, result.task) and result.folder:
                return read_config(Path(result.folder))
        raise UsageError(f"there is no cell {label!r}: choose from {', '.join(self.labels)}.")

    def _joined(self, read: Callable[[Path], Iterator[pd.DataFrame]], columns: str) -> pd.DataFrame:
        """What `read` finds in the folders of all cells. columns: of a table without rows."""
        parts = []
        for label, result in zip(self.labels, self.results):
            if result.folder and Path(result.folder).is_dir():
                for frame in read(Path(result.folder)):
                    frame.insert(0, "task", result.task)
                    frame.insert(1, "cell", label)
                    parts.append(frame)
        return (
            pd.concat(parts, ignore_index=True)
            if parts
            else pd.DataFrame(columns=["task", "cell", *columns.split()])
        )


def text_of(result: CellResult) -> tuple[str, int] | None:
    """The path of the text whose perplexity was measured, and the length of its windows in tokens, from the
    cell's config.json; None if unknown, and for other tasks."""
    if not result.by_length or not result.folder:
        return None
    settings = read_config(Path(result.folder)).get("settings") or {}
    text, length = settings.get("text"), settings.get("max_seq_len")
    return (text, length) if isinstance(text, str) and isinstance(length, int) else None


def load(*folders: Path | str) -> LoadedRun:
    """Read runs: products/<timestamp>, one of its tasks or cells, or the folder of a table. Cells of one task
    (and text) are compared with its first dense cell. Raises UsageError if a folder has no finished cell, a
    file is damaged, or no folder is given."""
    if not folders:
        raise UsageError('there is no run to load: name its folder, as in load("products/<timestamp>").')
    read = [(result, str(folder)) for folder in folders for result in _results(Path(folder))]
    unique = {(one.folder or str(i)): one for i, (one, _) in enumerate(read)}
    table_of = {id(one): table for one, table in read}
    by_task: dict[tuple[str, str], list[CellResult]] = {}
    for result in unique.values():
        by_task.setdefault((result.model, result.task), []).append(result)
    compared, labels, notes = [], [], [note for folder in folders for note in unfinished(Path(folder))]
    for of_task in by_task.values():
        families = list(dict.fromkeys(result.family for result in of_task))
        of_task.sort(key=lambda one: (not one.dense, families.index(one.family), one.k or 0))  # noqa: B023
        labels += distinct_labels(of_task, [table_of[id(one)] for one in of_task])
        texts: dict[Any, list[int]] = {}
        for i, result in enumerate(of_task):
            texts.setdefault(text_of(result), []).append(i)
        for places in texts.values():
            found, more = paired_with_dense([of_task[i] for i in places])
            for i, result in zip(places, found):
                of_task[i] = result
            notes += more
        compared += of_task
    return LoadedRun(tuple(map(Path, folders)), tuple(compared), tuple(labels), tuple(notes))


def _results(folder: Path) -> list[CellResult]:
    """The results of every finished cell in `folder`; for a table or an example without cells, those in its
    file."""
    if is_cell(folder):
        cells = [folder]
    else:
        inside = [path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/results.json")]
        cells = sorted(cell for cell in inside if is_cell(cell))
    found = [(cell, read_results(cell)) for cell in cells]
    results = [replace(result, folder=str(cell)) for cell, result in found if result is not None]
    for name in ("results.json", "summary.json"):
        if not results and (folder / name).is_file():
            results = [one for of_task in read_results_by_task(folder / name).values() for one in of_task]
    if not results:
        raise UsageError(
            f"{folder} has no finished cell: name the folder of a run, products/<timestamp>, of one of its "
            "tasks or cells, or of a table."
        )
    return results


def _kept(folder: Path, kind: str) -> Iterator[pd.DataFrame]:
    for layer in named_layers(folder):
        for phase in PHASES:
            frame = read_kept(folder, layer, kind, phase)
            if frame is not None:
                frame.insert(1, "phase", phase)
                yield frame


def _present(frame: pd.DataFrame | None) -> Iterator[pd.DataFrame]:
    if frame is not None:
        yield frame


def _answers(folder: Path) -> Iterator[pd.DataFrame]:
    if (folder / ANSWERS).is_file():
        yield pd.DataFrame(
            {name: getattr(one, name) for name in ANSWER_FIELDS}
            | one.score
            | {f"{name}_tokens": count for name, count in one.tokens.items()}
            for one in read_answers(folder)
        )
