"""The table of a sweep: markdown for people, CSV and JSON for programs, a picture for each task."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from toptheta.models.recorder import DECODE, PREFILL
from toptheta.report import tables as report
from toptheta.report.plots.tradeoff import draw_tradeoff
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import write_json, write_text


class Row(Protocol):
    """What the table needs to know of a cell."""

    @property
    def task(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def k(self) -> int | None: ...
    @property
    def name(self) -> str: ...


def write_table(
    folder: Path, title: str, table: str, rows: Sequence[tuple[Row, dict[str, Any] | None]]
) -> None:
    """Write table.md, table.csv, results.json and <task>.png into `folder`, and print the table.

    rows: cells in order, with their results, None where a cell was not run.
    """
    text = f"# {title}\n\n`python reproduce.py --table {table}`{_where(rows)}\n"
    pictures, results = [], []
    for task in dict.fromkeys(row.task for row, _ in rows):
        of_task = [(row, result) for row, result in rows if row.task == task]
        text += f"\n## {task}\n\n{_markdown(of_task)}\n"
        named = [_named(row, result) for row, result in of_task if result is not None]
        results += named
        if any(result["k"] is not None and result["kept"] for result in named):
            picture = folder / f"{task}.png"
            try:
                for left_out in draw_tradeoff(named, picture, f"{title}: {task}"):
                    say(left_out)
                pictures.append(picture)
            except UsageError as error:
                say(f"{task}: no picture, because {error}")
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", _csv(rows))
    write_json(folder / "results.json", results)
    print(text)
    say(f"Written: {', '.join(str(p) for p in [folder / 'table.md', folder / 'table.csv', *pictures])}")


def _named(row: Row, result: dict[str, Any]) -> dict[str, Any]:
    """A result under the table's name for it, without the folder it came from."""
    method = row.method if row.k is None else f"{row.method} K={row.k}"
    return {key: value for key, value in result.items() if key != "folder"} | {"method": method}


def _where(rows: Sequence[tuple[Row, dict[str, Any] | None]]) -> str:
    """On what the cells were computed."""
    machines = {
        f"{e['device_name']} ({e['device']}, {e['threads']} threads), torch {e['torch']}, "
        f"transformers {e['transformers']}, lm-eval {e['lm_eval']}"
        for e in (result["environment"] for _, result in rows if result is not None)
    }
    missing = sum(result is None for _, result in rows)
    text = f" on {'; '.join(sorted(machines))}. ± is the standard error, n the count."
    return text + (f" {missing} of {len(rows)} cells were not run." if missing else "")


def _markdown(rows: Sequence[tuple[Row, dict[str, Any] | None]]) -> str:
    results = [result for _, result in rows if result is not None]
    metrics = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    phases = [p for p in (PREFILL, DECODE) if any((r.get("kept") or {}).get(p) for r in results)]
    words = {PREFILL: "prefill", DECODE: "decode"}
    header = ["method", "K", *(f"{name} %" for name in metrics)]
    for phase in phases:
        header += [f"kept elements, {words[phase]} %", f"kept V rows, {words[phase]} %"]
    header += ["minutes"]
    lines = []
    for row, result in rows:
        line = [row.method, "-" if row.k is None else str(row.k)]
        if result is None:
            lines.append(line + ["not run"] + [""] * (len(header) - 3))
            continue
        line += [report.score(result["metrics"].get(name)) for name in metrics]
        for phase in phases:
            line += [report.percent(result.get("kept"), phase, what) for what in ("attn", "vrow")]
        lines.append(line + [f"{sum(result['seconds'].values()) / 60:.1f}"])
    return report.table(lines, header)


def _csv(rows: Sequence[tuple[Row, dict[str, Any] | None]]) -> str:
    """One line per cell and metric; a cell that was not run has one line without numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kept_names = [f"kept_{what}_{phase}" for phase in (PREFILL, DECODE) for what in ("attn", "vrow")]
    header = ["task", "method", "k", "metric", "value", "stderr", "count", *kept_names]
    writer.writerow([*header, "calibration_s", "evaluation_s", "device"])
    for row, result in rows:
        first = [row.task, row.method, "" if row.k is None else row.k]
        if result is None:
            writer.writerow([*first, *[""] * (len(header) - len(first) + 3)])
            continue
        kept = [
            ((result.get("kept") or {}).get(phase) or {}).get(what, "")
            for phase in (PREFILL, DECODE)
            for what in ("attn", "vrow")
        ]
        seconds = result["seconds"]
        last = [seconds["calibration"], seconds["evaluation"], result["environment"]["device_name"]]
        for name, metric in result["metrics"].items():
            numbers = [metric["value"], metric["stderr"], metric["count"]]
            writer.writerow([*first, name, *numbers, *kept, *last])
    return out.getvalue()
