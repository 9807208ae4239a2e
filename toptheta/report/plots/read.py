"""Readers of a run's folder: pandas DataFrames from its files (formats: docs/scripts.md).

Files may be plain or gzipped, of this program or of the published project. A reader returns None if its file
is missing or empty, and raises UsageError with file and line number if a line is damaged. Tables are parsed
in bulk, because a run of a large model writes millions of lines; only the search for a damaged line is done
line by line.
"""

import re
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from toptheta.report.results import PHASES, CellResult
from toptheta.util.errors import UsageError
from toptheta.util.files import find_file
from toptheta.util.line_files import (
    INT,
    LAYER_HEAD,
    SIZE,
    THRESHOLDS,
    LineFormat,
    damaged,
    file_content,
    read_lines,
)
from toptheta.util.schema import Count, parse_json, typed

_LENGTHS = LineFormat({"n": "int64"}, INT, "128")
_COMPLETIONS = LineFormat({"prompt": "int64", "completion": "int64"}, rf"{INT} {INT}", "131 74")


def read_thresholds(folder: Path) -> pd.DataFrame | None:
    """th.txt: layer, head, n (row length, tokens), theta (score or weight), samples (calibration rows), k."""
    frame = _read(folder, "th.txt", THRESHOLDS)
    # The published project appends to th.txt when it copies one; the last line of a row length is valid.
    if frame is None:
        return None
    return frame.drop_duplicates(["layer", "head", "n"], keep="last", ignore_index=True)


def read_sizes(folder: Path, layer: int) -> pd.DataFrame | None:
    """layer{i}.txt: layer, head, n (tokens), k, phase (one of PHASES), ratio (kept / what Top-k would
    keep)."""
    columns = {
        "layer": "int64",
        "head": "int64",
        "n": "int64",
        "k": "int64",
        "phase": "category",
        "ratio": "float64",
    }
    form = LineFormat(
        columns,
        rf"L{layer}_H{INT}:{INT} {INT} (?:{'|'.join(PHASES)}) {SIZE}",
        f"L{layer}_H0:130 64 prefill 1.05",
        replace=LAYER_HEAD,
        words=PHASES,
        strict=True,
    )
    return _read(folder, f"layer{layer}.txt", form, layer)


def read_kept(folder: Path, layer: int, kind: str, phase: str) -> pd.DataFrame | None:
    """layer{i}_kept_{kind}_{phase}.csv. kind 'attn': layer, head, n, kept, full, counting attention elements;
    kind 'vrow': layer, group, n, kept, full, counting V rows."""
    unit = {"attn": "head", "vrow": "group"}[kind]
    columns = {"layer": "int64", unit: "int64", "n": "int64", "kept": "float64", "full": "float64"}
    pattern = rf"{layer},{INT},{INT},{SIZE},{SIZE}"
    form = LineFormat(columns, pattern, f"{layer},0,130,64,130", separator=",")
    return _read(folder, f"layer{layer}_kept_{kind}_{phase}.csv", form, layer)


def read_effective_k(folder: Path) -> pd.DataFrame | None:
    """effective_k.csv: layer, phase, n_low, n_high (tokens, both included), k, rows (counted rows of these
    lengths), and the mean and percentiles of the elements that they keep."""
    columns = dict.fromkeys(("layer", "phase", "n_low", "n_high", "k", "rows"), "int64")
    columns |= {"phase": "category"} | dict.fromkeys(("mean", "p5", "p50", "p95"), "float64")
    header = ",".join(columns)
    sizes = ",".join([SIZE] * 4)
    form = LineFormat(
        columns,
        rf"{header}|{INT},(?:{'|'.join(PHASES)}),{INT},{INT},{INT},{INT},{sizes}",
        "3,prefill,91,107,64,1530,66.2,31.0,65.0,113.0",
        separator=",",
        replace=((header.encode(), b""),),
        words=PHASES,
        strict=True,
    )
    return _read(folder, "effective_k.csv", form)


def read_popularities(folder: Path, layer: int, phase: str) -> dict[int, list[np.ndarray]] | None:
    """layer{i}_kept_vrow_popularities_{phase}.txt: by group its lines in file order, each with the number of
    (row, head) pairs that keep each V row, `[n]`."""
    path = find_file(folder, f"layer{layer}_kept_vrow_popularities_{phase}.txt")
    if path is None:
        return None
    groups: dict[int, list[np.ndarray]] = {}
    for number, line in enumerate(file_content(path).decode("latin-1").splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(rf"{layer},({INT}),({INT}),\[([\d., ]*)\]", line.strip())
        try:
            counts = np.array(match[3].split(","), dtype=float) if match else np.empty(0)
        except ValueError:
            counts = np.empty(0)
        if match is None or len(counts) != int(match[2]) or not np.isfinite(counts).all():
            raise damaged(path, number, line, f"{layer},0,4,[3, 0, 1, 3]")
        groups.setdefault(int(match[1]), []).append(counts)
    return groups or None


def read_sequence_lengths(folder: Path) -> pd.DataFrame | None:
    """sequence_lengths_per_example.csv: n (tokens), a row for each evaluated sequence."""
    return _read(folder, "sequence_lengths_per_example.csv", _LENGTHS)


def read_completion_lengths(folder: Path) -> pd.DataFrame | None:
    """prompt_completion_lengths_per_sample.csv: prompt, completion, total (tokens), a row for each sample."""
    frame = _read(folder, "prompt_completion_lengths_per_sample.csv", _COMPLETIONS)
    return None if frame is None else frame.assign(total=frame["prompt"] + frame["completion"])


class _Outcome(TypedDict):
    task_id: str
    passed: bool


class Outcome(_Outcome, total=False):
    """The keys of a sample's outcome that are read; the file has the sample's keys in addition."""

    result: str


def read_outcomes(folder: Path) -> pd.DataFrame | None:
    """samples.jsonl_results.jsonl: task_id, passed, result; a row for each sample, in their order."""
    path = find_file(folder, "samples.jsonl_results.jsonl")
    if path is None:
        return None
    rows = []
    for number, line in enumerate(file_content(path).decode("utf-8", "replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = typed(parse_json(line), Outcome)
        except ValueError:
            example = '{"task_id": "HumanEval/0", "passed": true, "result": "passed"}'
            raise damaged(path, number, line, example) from None
        rows.append({"task_id": row["task_id"], "passed": row["passed"], "result": row.get("result", "")})
    return pd.DataFrame(rows) if rows else None


class _Settings(TypedDict, total=False):
    placement: str | None


class Config(TypedDict, total=False):
    """The keys of config.json that are read."""

    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    settings: _Settings | None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, the settings of the run; empty for folders of the published project, which have none."""
    config = _read_json(folder, "config.json") or {}
    try:
        typed(config, Config)
    except ValueError as error:
        raise UsageError(f"{folder / 'config.json'} is damaged ({error}): run the cell again.") from None
    return config


def read_results(folder: Path) -> CellResult | None:
    """results.json of a cell."""
    value = _read_json(folder, "results.json")
    try:
        return None if value is None else CellResult.from_json(value)
    except UsageError as error:
        raise UsageError(f"{folder / 'results.json'}: {error}") from None


def read_results_by_task(path: Path | str) -> dict[str, list[CellResult]]:
    """The results in a table's results.json or a run's summary.json, by task. Raises UsageError if the file
    is missing or contains no results."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is missing: finish the run, or name another file.")
    values = _json(path)
    try:
        results = [CellResult.from_json(value) for value in values] if isinstance(values, list) else []
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if not results:
        raise UsageError(
            f"{path} contains no list of results: name a table's results.json or a run's summary.json."
        )
    tasks: dict[str, list[CellResult]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result)
    return tasks


def named_layers(folder: Path) -> list[int]:
    """The layers whose index occurs in file names of the folder, ascending."""
    found = (
        re.match(r"layer(\d{1,6})(?:_kept_\w+)?\.(?:txt|csv)(?:\.gz)?$", path.name)
        for path in folder.iterdir()
    )
    return sorted({int(match[1]) for match in found if match})


def _read(folder: Path, name: str, form: LineFormat, layer: int | None = None) -> pd.DataFrame | None:
    path = find_file(folder, name)
    return None if path is None else read_lines(path, form, layer)


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    path = find_file(folder, name)
    if path is None:
        return None
    value = _json(path)
    if not isinstance(value, dict):
        raise UsageError(
            f"{path}, line 1: the file must contain a JSON object {{...}}: correct it, or remove the file."
        )
    return value


def _json(path: Path) -> Any:
    try:
        return parse_json(file_content(path))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is damaged ({error}): correct it, or remove the file.") from None
