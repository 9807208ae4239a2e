"""Results as markdown tables and CSV, all built from columns by one function. summary.py prints and writes
them.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, floor, isnan, log, log10
from typing import Any

import numpy as np

from toptheta.report.results import DECODE, PHASES, PREFILL, CellResult, Metric

WORST_LAYERS = 3
PHASE_WORDS = {PREFILL: "prefill", DECODE: "decode"}
PLAIN_METRICS = ("ppl", "perplexity", "bits_per_byte", "kl", "nll")  # parts of names of metrics not in %
HUNDREDS = ("bleu", "rouge1", "rouge2", "rougeL", "ter", "chrf")  # how metrics begin that lm-eval has in %
PAIRED = ("acc_norm", "acc", "passed")  # the first of these scores is compared in tables
SCORE_OF = {"pass@1": "passed"}  # a question's score, where it has another name than the metric
PAIRED_FIELDS = {  # columns of table.csv, and their keys in a comparison with dense
    "minus_dense": "scores.value",
    "minus_dense_stderr": "scores.stderr",
    "lost": "flips.lost",
    "gained": "flips.gained",
    "mcnemar_p": "flips.mcnemar_p",
}
TEXT_METRICS = (  # of a text against dense attention, and their headers
    ("kl", "KL to dense"),
    ("kl_q99", "KL 99%"),
    ("kl_q99.9", "KL 99.9%"),
    ("same_top", "same top token %"),
    ("ln_ppl_ratio", "ln ppl ratio"),
)


@dataclass(frozen=True)
class Column:
    """A column: its header, and its text for a row, which may be of any type."""

    header: str
    text: Callable[[Any], str]


def build(rows: Sequence[Any], columns: Sequence[Column]) -> str:
    """A markdown table of `rows`."""
    return table([[column.text(row) for column in columns] for row in rows], [c.header for c in columns])


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A markdown table with aligned columns."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(c).ljust(w) for c, w in zip(cells, widths)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def is_share(metric: str) -> bool:
    """Whether a metric is a share from 0 to 1, which tables show in %."""
    return not metric.startswith(HUNDREDS) and not any(name in metric for name in PLAIN_METRICS)


def score(metric: Metric | None, in_percent: bool = True, digits: int = 1) -> str:
    """'45.0 ± 5.0 (n=100)'."""
    if metric is None:
        return "-"
    factor = 100.0 if in_percent else 1.0
    text = f"{factor * metric.value:.{digits}f}"
    if metric.stderr is not None:
        text += f" ± {factor * metric.stderr:.{digits}f}"
    return text if metric.count is None else f"{text} (n={metric.count})"


def failed_columns(results: Sequence[CellResult]) -> list[Column]:
    """The number of requests that did not fit in memory, if any."""
    if not any("failed" in result.extra for result in results):
        return []
    return [Column("failed", lambda result: str(result.extra.get("failed", 0)))]


def dense_call_columns(results: Sequence[CellResult]) -> list[Column]:
    """The share of layer calls computed dense, for runs with `when_slower`."""
    if not any(result.computed_dense for result in results):
        return []

    def share_of(result: CellResult) -> str:
        found = result.computed_dense
        return "-" if found is None else f"{100.0 * found.dense / max(found.calls, 1):.1f}"

    return [Column("calls computed dense %", share_of)]


def paired_columns(results: Sequence[CellResult]) -> list[Column]:
    """For a run with a dense cell and questions with a score: the difference from dense with its paired
    standard error, and the flips in both directions."""
    scores = list(dict.fromkeys(name for r in results for name in r.paired.get("scores", {})))
    scores.sort(key=lambda name: PAIRED.index(name) if name in PAIRED else len(PAIRED))
    if not scores or scores[0] == "nll":
        return []
    name = scores[0]
    columns = [Column(f"{name} minus dense" + " %" * is_share(name), lambda result: difference(result, name))]
    if any(name in result.paired.get("flips", {}) for result in results):
        columns.append(Column("lost / gained %", lambda result: flips(result, name)))
    return columns


def difference(result: CellResult, name: str) -> str:
    """'-1.7 ± 1.2': a score minus that of dense."""
    found = result.paired.get("scores", {}).get(name)
    if found is None:
        return "-"
    factor = 100.0 if is_share(name) else 1.0
    text = f"{factor * found['value']:+.1f}"
    return text if found["stderr"] is None else f"{text} ± {factor * found['stderr']:.1f}"


def flips(result: CellResult, name: str) -> str:
    """'5.0 / 3.3': shares of questions that only dense answered correctly, and that only the other did."""
    found = result.paired.get("flips", {}).get(name)
    if found is None:
        return "-"
    return " / ".join(f"{100.0 * found[way] / found['count']:.1f}" for way in ("lost", "gained"))


def small(metric: Metric) -> str:
    """'0.0123 ± 0.0004', or with more digits where needed to show the standard error (or, without one, two
    digits of the value): '0.00118 ± 0.00004', '1.2e-07 ± 3.0e-08'."""
    numbers = [metric.value] if metric.stderr is None else [metric.value, metric.stderr]
    least, wanted = abs(numbers[-1]), 1 if metric.stderr is not None else 2
    digits = 4 if least == 0.0 else max(4, wanted - 1 - floor(log10(least)))
    spec = f".{digits}f" if digits <= 6 else ".1e"
    return " ± ".join(format(number, spec) for number in numbers)


def share(result: CellResult, phase: str, what: str) -> str:
    """The kept share, in percent."""
    value = result.kept_share(phase, what)
    return "-" if value is None else f"{100.0 * value:.1f}"


def metric_columns(results: Sequence[CellResult]) -> list[Column]:
    """A column for each metric of the results; for perplexity by context length, one for each length; for
    needles also the share found, in %, at each length and at each depth."""
    lengths = [row["length"] for result in results[:1] for row in result.by_length]
    if lengths and all([row["length"] for row in result.by_length] == lengths for result in results):
        several = len(lengths) > 1
        columns = [_length_column(length, i) for i, length in enumerate(lengths)] if several else []
        columns.append(
            Column(
                "all" if several else "perplexity", lambda result: score(result.metrics.get("ppl"), False, 2)
            )
        )
        return columns + [_text_column(*one) for one in TEXT_METRICS if _have(results, one[0])]
    columns = [_metric_column(name) for name in dict.fromkeys(name for r in results for name in r.metrics)]
    for name, words in (("length", "at {:,} tokens %"), ("depth", "at depth {:g} %")):  # of needles
        at = sorted({point[name] for result in results for point in result.grid})
        columns += [_found_column(words.format(value), name, value) for value in at]
    return columns


def _found_column(header: str, name: str, value: float) -> Column:
    def text(result: CellResult) -> str:
        here = [point for point in result.grid if point[name] == value]
        count = sum(point["count"] for point in here)
        return f"{100.0 * sum(point['found'] for point in here) / count:.0f}" if count else "-"

    return Column(header, text)


def _have(results: Sequence[CellResult], name: str) -> bool:
    return any(name in result.metrics for result in results)


def _text_column(name: str, header: str) -> Column:
    def text(result: CellResult) -> str:
        metric = result.metrics.get(name)
        paired = result.paired.get("text", {}).get(name)
        if paired is not None:  # the reference is the dense cell, which may have another type
            metric = Metric(paired["value"], paired["stderr"])
        if metric is None:
            return "-"
        uncounted = Metric(metric.value, metric.stderr)  # the perplexity's column shows the count
        return score(uncounted) if is_share(name) else small(uncounted)

    return Column(header, text)


def _length_column(length: int, i: int) -> Column:
    return Column(f"<= {length}", lambda result: f"{result.by_length[i]['ppl']:.2f}")


def _metric_column(name: str) -> Column:
    if is_share(name):
        return Column(f"{name} %", lambda result: score(result.metrics.get(name)))
    return Column(name, lambda result: score(result.metrics.get(name), False, 2))


def kept_columns(results: Sequence[CellResult], comma: str = "") -> list[Column]:
    """Kept elements and V rows of each phase that occurred, and the KV bytes read in decode. For a text
    computed as a prompt, every V row is kept by some row, so only elements are shown."""
    if results and all(result.by_length and not (result.kept or {}).get(DECODE) for result in results):
        return [Column("kept elements %", lambda result: share(result, PREFILL, "attn"))]
    columns = []
    for phase in PHASES:
        if any((result.kept or {}).get(phase) for result in results):
            for what, words in (("attn", "kept elements"), ("vrow", "kept V rows")):
                columns.append(_kept_column(f"{words}{comma} {PHASE_WORDS[phase]} %", phase, what))
    if any((result.kv_bytes or {}).get(DECODE) is not None for result in results):
        columns.append(Column("KV bytes, decode %", _kv_bytes))
    if any(result.missed_keys is not None for result in results):
        columns.append(Column("missed keys %", _missed_keys))
    return columns


def _kv_bytes(result: CellResult) -> str:
    value = (result.kv_bytes or {}).get(DECODE)
    return "-" if value is None else f"{100.0 * value:.1f}"


def _missed_keys(result: CellResult) -> str:
    return "-" if result.missed_keys is None else f"{100.0 * result.missed_keys:.2f}"


def _kept_column(header: str, phase: str, what: str) -> Column:
    return Column(header, lambda result: share(result, phase, what))


def results_table(results: Sequence[CellResult]) -> str:
    """One row per cell of a run: method, every metric, kept shares, time."""
    columns = [Column("method", lambda result: result.method)]
    columns += metric_columns(results) + failed_columns(results)
    columns += paired_columns(results) + kept_columns(results) + dense_call_columns(results)
    columns += [_seconds_column(name) for name in ("calibration", "evaluation")]
    return build(results, columns)


def _seconds_column(name: str) -> Column:
    return Column(f"{name} s", lambda result: f"{result.seconds.get(name, 0.0):.0f}")


def effective_k(results: Sequence[CellResult]) -> str:
    """Kept elements of individual rows, against K: a row per cell, phase and K. Layers are ranked by the
    factor by which their 5th or 95th percentile differs from K."""
    header = ["effective K", "phase", "K", "rows", "mean", "p5", "p95"]
    header.append("layers farthest from K: mean (p5 to p95)")
    rows = []
    for result in results:
        for one in result.effective_k or []:
            k = one["k"]

            def distance(layer: dict[str, Any], k: int = k) -> float:
                return max(k / max(layer["p5"], 1.0), layer["p95"] / k)

            worst = sorted(one["layers"], key=distance, reverse=True)[:WORST_LAYERS]
            layers = [f"{x['layer']}: {x['mean']:.0f} ({x['p5']:.0f} to {x['p95']:.0f})" for x in worst]
            numbers = [f"{one[name]:.1f}" for name in ("mean", "p5", "p95")]
            phase = PHASE_WORDS[one["phase"]]
            rows.append([result.method, phase, k, one["rows"], *numbers, ", ".join(layers)])
    if not rows:
        return "Effective K: there are no counts, because no evaluated row was longer than K."
    return table(rows, header)


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


def settings_line(config: dict[str, Any]) -> str:
    """The line that the published project puts before each result."""
    s = config["settings"]
    names = (
        "placement",
        "sdc",
        "sdc_scale",
        "vmc",
        "capk",
        "calib_tac",
        "calib_add_sigma",
        "calib_sample_frac",
        "calib_load_path",
    )
    return f"K:{config['k_per_layer']} mode:{config['mode']} layer:None " + " ".join(
        f"{n}:{s[n]}" for n in names
    )
