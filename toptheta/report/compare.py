"""Comparison of the cells of any runs, for compare.py."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from toptheta.report.paired import Comparison, Difference, compare
from toptheta.report.results import CellResult, Metric, read_answers, read_result
from toptheta.report.tables import Column, build, is_share, score, small
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import one_of, timestamp, write_json, write_text
from toptheta.util.schema import read_json

EXPLANATION = (
    "± is the standard error (paired for differences), with the 95% interval in brackets. Lost: questions "
    "that only the baseline answered correctly; gained: that only the other did; p: McNemar's exact test of "
    "lost against gained."
)


@dataclass(frozen=True)
class Compared:
    """A cell compared with the baseline; comparison: None for the baseline itself."""

    label: str
    result: CellResult
    comparison: Comparison | None


def compare_runs(runs: Sequence[str], output_dir: str | None = None) -> list[Compared]:
    """Compare the cells in the folders `runs` with the first one; print the table, and write compare.md,
    .csv, .json and .png. Raises UsageError for fewer than two cells, or cells with different questions."""
    from toptheta.report.plots.compare import draw_comparison

    folders = {folder: run for run in runs for folder in cells_of(run)}
    for run in runs:
        for note in unfinished(Path(run)):
            say(note)
    if len(folders) < 2:
        raise UsageError(f"{' '.join(runs)} is one cell only: name another run or cell to compare it with.")
    results = [_result(folder) for folder in folders]
    for result, (folder, run) in zip(results, folders.items()):
        if not result.metrics and (folder / "samples.jsonl").is_file():
            raise UsageError(
                f"{folder} has no scores yet, because scoring runs its programs: first run "
                f"python gen_llama.py --score {run} --allow_code_execution."
            )
    labels = distinct_labels(results)
    baseline = read_answers(str(results[0].folder))
    rows = [Compared(labels[0], results[0], None)]
    for label, result in zip(labels[1:], results[1:]):
        found = compare(baseline, read_answers(str(result.folder)), (labels[0], label))
        rows.append(Compared(label, result, found))
    title = f"{results[0].model}, {results[0].task}: compared with {labels[0]}"
    folder = Path(output_dir) if output_dir else Path("products") / "compare" / timestamp()
    table = comparison_table(rows)
    write_text(folder / "compare.md", f"# {title}\n\n{table}\n\n{EXPLANATION}\n\n{_sources(rows)}\n")
    write_text(folder / "compare.csv", comparison_csv(rows))
    write_json(folder / "compare.json", [_to_json(row) for row in rows])
    draw_comparison(
        [(row.label, row.comparison) for row in rows if row.comparison], folder / "compare.png", title
    )
    print(f"{title}\n\n{table}\n\n{EXPLANATION}\nWritten: {folder}")
    return rows


def cells_of(run: str) -> list[Path]:
    """The folders of a run's cells, dense ones first; for a cell, its own. Raises UsageError if there is no
    finished cell."""
    folder = Path(run)
    if is_cell(folder):
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/results.json"))
    cells = [cell for cell in found if is_cell(cell)]
    if not cells and (found or (folder / "results.json").is_file()):
        raise UsageError(
            f"{run} holds a table, and a table has no answers to compare: name the folder of a run, "
            "products/<timestamp>, or of one of its cells."
        )
    if not cells:
        tasks = one_of("tasks", folder, ["*/*/results.json"], up=2)
        raise UsageError(
            f"{run} has no finished cell: name {tasks + ', ' if tasks else ''}the folder of a run, "
            "products/<timestamp>, or of one of its cells."
        )
    return sorted(cells, key=lambda cell: not _result(cell).dense)


def is_cell(folder: Path) -> bool:
    """Whether results.json in `folder` is that of a cell, not of a table. Raises UsageError if it is
    damaged."""
    path = folder / "results.json"
    return path.is_file() and not isinstance(read_json(path, Any, "run the cell again"), list)


class _Started(TypedDict, total=False):
    """What run.json says of a run's cells; earlier versions did not."""

    cells: list[str]


def unfinished(folder: Path) -> list[str]:
    """A note on the cells that a run has not finished; none for a finished run, and for other folders. Raises
    UsageError if run.json is damaged."""
    if not (folder / "run.json").is_file():
        return []
    cells = read_json(folder / "run.json", _Started, "correct it, or remove it").get("cells", [])
    missing = [cell for cell in cells if not (folder / cell / "results.json").is_file()]
    if not missing:
        return []
    count = f"{len(missing)} of its {len(cells)} cells have no result"
    return [f"{folder} is not finished: {count} ({', '.join(missing)})."]


def _result(folder: Path) -> CellResult:
    try:
        return replace(read_result(folder / "results.json"), folder=str(folder))
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}): run the cell again.") from None


def distinct_labels(results: Sequence[CellResult], tables: Sequence[str] = ()) -> list[str]:
    """The methods' labels; equal ones are distinguished by model, type or folder. tables: for results without
    a folder, the name of the table that they are from."""
    labels = [result.method for result in results]
    for facts in ([result.model for result in results], [_dtype(result) for result in results]):
        if len(set(facts)) > 1:
            times = Counter(labels)
            labels = [f"{label}, {f}" if times[label] > 1 else label for label, f in zip(labels, facts)]
    for label in [label for label, count in Counter(labels).items() if count > 1]:
        alike = [i for i, one in enumerate(labels) if one == label]
        folders = [results[i].folder or (tables[i] if tables else "") for i in alike]
        for i, short in zip(alike, _short(folders)):
            labels[i] = f"{label}, {short}"
    return labels


def _short(folders: Sequence[str]) -> list[str]:
    """As few names of each folder, from the first that differs, as tell the folders apart."""
    parts = [Path(folder).parts for folder in folders]
    longest = max(map(len, parts))
    first = next((i for i in range(longest) if len({one[: i + 1] for one in parts}) > 1), 0)
    n, different = 1, len(set(parts))
    while n < longest and len({one[first : first + n] for one in parts}) < different:
        n += 1
    return ["/".join(one[first : first + n]) for one in parts]


def _dtype(result: CellResult) -> str:
    try:
        return str(read_json(Path(str(result.folder)) / "config.json", dict, "").get("dtype", ""))
    except (OSError, UsageError):
        return ""


def comparison_table(rows: Sequence[Compared]) -> str:
    """A row for each cell, the baseline first."""
    found = [row.comparison for row in rows if row.comparison is not None]
    columns = [Column("method", lambda row: row.label)]
    metrics = dict.fromkeys(name for row in rows for name in row.result.metrics)
    shown = [name for name in metrics if not any(name in one.text for one in found)]
    columns += [_metric_column(name) for name in shown if not name.startswith("kl_")]
    for name in dict.fromkeys(name for one in found for name in one.scores):
        if name != "nll":
            columns.append(_difference_column(name))
            if any(name in one.flips for one in found):
                columns.append(_flips_column(name))
    columns += [column for header, column in _more_columns() if any(header in _more(one) for one in found)]
    return build(rows, columns)


def _metric_column(name: str) -> Column:
    share = is_share(name)
    header = f"{name} %" if share else name
    return Column(header, lambda row: score(row.result.metrics.get(name), share, 1 if share else 2))


def _difference_column(name: str) -> Column:
    share = is_share(name)

    def text(row: Compared) -> str:
        one = row.comparison and row.comparison.scores.get(name)
        return _with_interval(one, 100.0 if share else 1.0, 1 if share else 3) if one else "-"

    return Column(f"{name} difference" + (" %" if share else ""), text)


def _with_interval(one: Difference, factor: float, digits: int) -> str:
    """'-1.7 ± 1.2 (-4.0 to 0.6)'."""
    text = f"{factor * one.value:+.{digits}f}"
    if one.stderr is None or one.interval is None:
        return text
    low, high = (f"{factor * end:+.{digits}f}" for end in one.interval)
    return f"{text} ± {factor * one.stderr:.{digits}f} ({low} to {high})"


def _flips_column(name: str) -> Column:
    def text(row: Compared) -> str:
        one = row.comparison and row.comparison.flips.get(name)
        return f"{one.lost} / {one.gained} of {one.count}, p={one.p:.2g}" if one else "-"

    return Column(f"{name} lost / gained", text)


def _more(one: Comparison) -> dict[str, str]:
    """Comparisons besides the scores, as text by header."""
    texts = {}
    if one.target_logprob is not None:
        texts["log p of the correct answer"] = _with_interval(one.target_logprob, 1.0, 3)
    if one.completions is not None:
        texts["identical completions %"] = score(one.completions.identical)
        if one.completions.first_difference is not None:
            texts["first different token, median"] = f"{one.completions.first_difference:g}"
    for name, metric in one.text.items():
        uncounted = Metric(metric.value, metric.stderr)
        share = is_share(name)
        texts[f"{name} %" if share else name] = score(uncounted) if share else small(uncounted)
    return texts


def _more_columns() -> list[tuple[str, Column]]:
    headers = ["log p of the correct answer", "identical completions %", "first different token, median"]
    headers += ["kl", "same_top %", "ln_ppl_ratio"]

    def column(header: str) -> Column:
        return Column(header, lambda row: _more(row.comparison).get(header, "-") if row.comparison else "-")

    return [(header, column(header)) for header in headers]


def comparison_csv(rows: Sequence[Compared]) -> str:
    """A line for each cell and compared quantity: a score, target_logprob, identical, kl, ..."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["method", "folder", "compared", "value", "stderr", "low", "high", "count", "clusters"]
    writer.writerow([*header, "lost", "gained", "mcnemar_p"])
    for row in rows:
        if row.comparison is None:
            continue
        first = [row.label, row.result.folder]
        differences = dict(row.comparison.scores)
        if row.comparison.target_logprob is not None:
            differences["target_logprob"] = row.comparison.target_logprob
        for name, one in differences.items():
            low, high = one.interval or (None, None)
            flips = row.comparison.flips.get(name)
            last = [flips.lost, flips.gained, flips.p] if flips else [None] * 3
            writer.writerow([*first, name, one.value, one.stderr, low, high, one.count, one.clusters, *last])
        plain = dict(row.comparison.text)
        if row.comparison.completions is not None:
            plain["identical"] = row.comparison.completions.identical
            place = row.comparison.completions.first_difference
            if place is not None:
                plain["first_difference"] = Metric(place)
        for name, metric in plain.items():
            numbers = [metric.value, metric.stderr, None, None, metric.count]
            writer.writerow([*first, name, *numbers, *[None] * 4])
    return out.getvalue()


def _to_json(row: Compared) -> dict[str, Any]:
    compared = row.comparison.to_json() if row.comparison else None
    return {"label": row.label, "result": row.result.to_json(), "compared": compared}


def _sources(rows: Sequence[Compared]) -> str:
    return "\n".join(f"- {row.label}: `{row.result.folder}`" for row in rows)
