"""Results as markdown tables and CSV, all built from columns by one function. summary.py prints and writes
them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor, log10
from typing import Any

from toptheta.report.results import DECODE, PHASES, PREFILL, CellResult, Metric

WORST_LAYERS = 3
PHASE_WORDS = {PREFILL: "prefill", DECODE: "decode"}
PLAIN_METRICS = ("ppl", "perplexity", "bits_per_byte", "kl", "nll")  # parts of names of metrics not in %
HUNDREDS = ("bleu", "rouge1", "rouge2", "rougeL", "ter", "chrf")  # how metrics begin that lm-eval has in %
PAIRED = ("acc_norm", "acc", "passed")  # the first of these scores is compared in tables
SCORE_OF = {"pass@1": "passed"}  # a question's score, where it has another name than the metric
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


def count_columns(results: Sequence[CellResult]) -> list[Column]:
    """The numbers of requests that did not fit in memory, and of prompts that were cut, if any."""
    names = {"failed": "failed", "cut_prompts": "prompts cut"}
    return [
        Column(header, partial(_count_of, name))
        for name, header in names.items()
        if any(name in result.extra for result in results)
    ]


def _count_of(name: str, result: CellResult) -> str:
    return str(result.extra.get(name, 0))


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
    smallest, wanted = abs(numbers[-1]), 1 if metric.stderr is not None else 2
    digits = 4 if smallest == 0.0 else max(4, wanted - 1 - floor(log10(smallest)))
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
    columns += metric_columns(results) + count_columns(results)
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
