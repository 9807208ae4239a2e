"""Tables of sweeps: table.md and table.csv of reproduce.py."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isnan, log
from typing import Any

import numpy as np

from toptheta.report.results import DECODE, PHASES, CellResult
from toptheta.report.tables import (
    SCORE_OF,
    Column,
    kept_columns,
    metric_columns,
    paired_columns,
    table,
)

PAIRED_FIELDS = {  # columns of table.csv, and their keys in a comparison with dense
    "minus_dense": "scores.value",
    "minus_dense_stderr": "scores.stderr",
    "lost": "flips.lost",
    "gained": "flips.gained",
    "mcnemar_p": "flips.mcnemar_p",
}


@dataclass(frozen=True)
class SweepRow:
    """A cell of a sweep's table. method: its name in the table, without K; result: None if it was not run."""

    task: str
    method: str
    k: int | None
    result: CellResult | None


def with_k(method: str, k: int | None) -> str:
    """A method's name in a table, with its K."""
    return method if k is None else f"{method} K={k}"


def sweep_markdown(
    title: str, table_name: str, rows: Sequence[SweepRow], at_vrows: Sequence[float] = ()
) -> str:
    """table.md of a sweep: the hardware and versions, and a table for each task; with `at_vrows`, also one of
    KL where methods keep these shares of V rows."""
    text = f"# {title}\n\n`python reproduce.py --table {table_name}`{_machines(rows)}\n"
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        text += f"\n## {task}\n\n{_task_table(of_task)}\n"
        if at_vrows:
            text += (
                "\nKL to dense where methods keep the same share of V rows in decode, interpolated between "
            )
            text += f"two K (-: not between them):\n\n{at_equal_vrows(of_task, at_vrows)}\n"
    return text


def _machines(rows: Sequence[SweepRow]) -> str:
    """The hardware and versions of the cells."""
    environments = [row.result.extra["environment"] for row in rows if row.result is not None]
    machines = {
        f"{e['device_name']} ({e['device']}, {e['threads']} threads), torch {e['torch']}, "
        f"transformers {e['transformers']}, lm-eval {e['lm_eval']}"
        for e in environments
    }
    missing = len(rows) - len(environments)
    text = f" on {'; '.join(sorted(machines))}. ± is the standard error, n the count."
    return text + (f" {missing} of {len(rows)} cells were not run." if missing else "")


def _task_table(rows: Sequence[SweepRow]) -> str:
    results = [row.result for row in rows if row.result is not None]
    columns = metric_columns(results) + paired_columns(results) + kept_columns(results, ",")
    columns += calibration_columns(results)
    columns.append(Column("minutes", lambda result: f"{sum(result.seconds.values()) / 60:.1f}"))
    lines = []
    for row in rows:
        if row.result is None:
            cells = ["not run"] + [""] * (len(columns) - 1)
        else:
            cells = [column.text(row.result) for column in columns]
        lines.append([row.method, "-" if row.k is None else str(row.k), *cells])
    return table(lines, ["method", "K", *(column.header for column in columns)])


def calibration_columns(results: Sequence[CellResult]) -> list[Column]:
    """For cells with effective K: what rows keep relative to K, and the cost of the calibration."""
    if not any(result.effective_k for result in results):
        return []

    def kept(result: CellResult) -> str:
        if not result.effective_k:
            return "-"
        last = result.effective_k[-1]  # decode, where there was any
        mean, low, high = (last[name] / last["k"] for name in ("mean", "p5", "p95"))
        return f"{mean:.2f} ({low:.2f} to {high:.2f})"

    def cost(result: CellResult) -> str:
        forward = result.extra.get("dense_window_s")
        return f"{result.seconds['calibration'] / forward:.1f}" if forward and result.effective_k else "-"

    return [Column("kept / K: mean (p5 to p95)", kept), Column("calibration, dense forwards", cost)]


def at_equal_vrows(rows: Sequence[SweepRow], shares: Sequence[float]) -> str:
    """KL to dense of each method where it keeps these shares of V rows in decode: ln KL is linear in the ln
    of the share between two K."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        kl = row.result.metrics.get("kl") if row.result is not None and row.k is not None else None
        kept = row.result.kept_share(DECODE, "vrow") if row.result is not None else None
        if kl is not None and kl.value > 0.0 and kept:
            points.setdefault(row.method, []).append((log(kept), log(kl.value)))
    lines = []
    for method, found in points.items():
        ends = np.array(sorted(found))
        at = [exp(x) for x in np.interp(np.log(shares), ends[:, 0], ends[:, 1], np.nan, np.nan)]
        lines.append([method, *("-" if isnan(x) else f"{x:.4f}" for x in at)])
    return table(lines, ["method", *(f"{100.0 * share:g} % of V rows" for share in shares)])


def sweep_csv(rows: Sequence[SweepRow]) -> str:
    """table.csv of a sweep: a line per cell and metric; a cell that was not run has a line without
    numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kept = [(phase, what) for phase in PHASES for what in ("attn", "vrow")]
    header = ["task", "method", "k", "metric", "value", "stderr", "count"]
    header += [*(f"kept_{what}_{phase}" for phase, what in kept), "calibration_s", "evaluation_s", "device"]
    found = [row.result for row in rows if row.result is not None]
    misses = ["missed_keys"] if any(result.missed_keys is not None for result in found) else []
    fields = list(PAIRED_FIELDS) if any(result.paired for result in found) else []
    header += [*misses, *fields]
    writer.writerow(header)
    for row in rows:
        result, first = row.result, [row.task, row.method, row.k]
        if result is None:
            writer.writerow([*first, *[""] * (len(header) - len(first))])
            continue
        shares = [result.kept_share(phase, what) for phase, what in kept]
        seconds = [result.seconds["calibration"], result.seconds["evaluation"]]
        about = [result.extra["environment"]["device_name"], *(result.missed_keys for _ in misses)]
        for name, metric in result.metrics.items():
            numbers = [metric.value, metric.stderr, metric.count]
            paired = [_paired_field(result, SCORE_OF.get(name, name), field) for field in fields]
            writer.writerow([*first, name, *numbers, *shares, *seconds, *about, *paired])
    return out.getvalue()


def _paired_field(result: CellResult, name: str, field: str) -> Any:
    of, _, what = PAIRED_FIELDS[field].partition(".")
    return result.paired.get(of, {}).get(name, {}).get(what)
