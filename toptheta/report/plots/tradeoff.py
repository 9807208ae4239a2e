"""Plot of accuracy against kept elements and V rows, which compares the methods of a run or a table."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from toptheta.report.plots.labels import Label, place_labels
from toptheta.report.plots.style import (
    GREY,
    MARKERS,
    PHASE_NAMES,
    add_legend,
    look,
    new_figure,
    save_figure,
    series_colours,
)
from toptheta.report.results import DECODE, PREFILL, CellResult
from toptheta.report.tables import SCORE_OF, is_share
from toptheta.util.errors import UsageError

MIN_SPAN = 10.0  # of a panel, in % of dense
METRICS = ("acc_norm", "acc", "pass@1")  # the first that all results have is drawn
WORDS = {
    "acc_norm": "accuracy (acc_norm)",
    "acc": "accuracy (acc)",
    "found": "numbers found",
    "ppl": "perplexity",
}
PANELS = (("attn", "kept attention elements"), ("vrow", "kept V rows"))


def draw_tradeoff(
    results: Sequence[CellResult], path: Path | str, title: str, phase: str | None = None
) -> list[str]:
    """Draw accuracy against kept attention elements and kept V rows (% of dense), and write it to `path`.

    results: of one task. Dense ones become a horizontal line; of a sparse method the points of several K are
    joined. Error bars are the standard error of the difference from dense on the same questions if all
    results but one of dense have it (only then can they tell methods apart), else those of each result; those
    of dense ones are bands. phase: the one whose kept shares are drawn; None: decode if every
    sparse result has it, else prefill. Returns a sentence for each result that is not drawn. Raises
    UsageError if there is nothing to draw, or the results have several tasks or no metric in common.
    """
    with look():
        figure, notes = tradeoff_figure(results, title, phase)
    save_figure(figure, path)
    return notes


def tradeoff_figure(
    results: Sequence[CellResult], title: str, phase: str | None = None
) -> tuple[Figure, list[str]]:
    """The figure that `draw_tradeoff` writes, for a notebook to show, and the sentences that it returns."""
    tasks = sorted({result.task for result in results})
    if len(tasks) > 1:
        raise UsageError(
            f"the results are of several tasks ({', '.join(tasks)}): draw one figure for each task."
        )
    metric = _metric(results)
    scale = _scale(results, metric)
    dense = [result for result in results if result.dense]
    sparse = [result for result in results if not result.dense]
    if phase is None:
        decode = all(result.kept_share(DECODE, "attn") is not None for result in sparse)
        phase = DECODE if decode else PREFILL
    placed = [result for result in sparse if result.kept_share(phase, "attn") is not None]
    notes = [
        f"{result.method} has no counts of kept elements in {PHASE_NAMES[phase]} and is not drawn: run it "
        "without --no_statistics."
        for result in sparse
        if not any(result is r for r in placed)
    ]
    if not placed:
        raise UsageError(
            f"no sparse method has counts of kept elements in {PHASE_NAMES[phase]}: run one without "
            "--no_statistics."
        )

    baselines = [result for result in dense if _paired_stderr(result, metric) is None]
    paired = len(baselines) == 1 and all(_paired_stderr(result, metric) is not None for result in placed)
    bar_of = _paired_stderr if paired else _stderr
    families: dict[str, list[CellResult]] = {}
    for result in placed:
        families.setdefault(result.family, []).append(result)
    figure = new_figure(9.0, 4.4, title)
    all_axes = figure.subplots(1, 2, sharey=True)
    labels: dict[str, list[Label]] = {kind: [] for kind, _ in PANELS}
    handles: list[Any] = []
    for index, (name, members) in enumerate(families.items()):
        colour, marker = series_colours(len(families))[index], MARKERS[index % len(MARKERS)]
        label = name if len(members) > 1 else members[0].method
        handles.append(Line2D([], [], color=colour, marker=marker, ms=6, lw=1.2, label=label))
        for (kind, _), axes in zip(PANELS, all_axes):
            points = [(share, r) for r in members if (share := r.kept_share(phase, kind)) is not None]
            points.sort(key=lambda point: point[0])
            x = [100.0 * share for share, _ in points]
            y = [scale * r.metrics[metric].value for _, r in points]
            errors = [scale * (bar_of(r, metric) or 0.0) for _, r in points]
            axes.errorbar(
                x, y, yerr=errors, color=colour, marker=marker, ms=6, lw=1.2, elinewidth=0.9, capsize=2.5
            )
            if len(members) > 1:
                names = [_k_label(r) for _, r in points]
                labels[kind] += [Label(*values) for values in zip(x, y, names, [colour] * len(x))]
    for index, result in enumerate(dense):
        value, error = scale * result.metrics[metric].value, scale * (bar_of(result, metric) or 0.0)
        style = ("-", "--", ":", "-.")[index % 4]
        for axes in all_axes:
            if error:
                axes.axhspan(value - error, value + error, color=GREY, alpha=0.18, lw=0, zorder=0)
            axes.axhline(value, color="black", lw=1.1, ls=style, zorder=1)
        handles.insert(index, Line2D([], [], color="black", lw=1.1, ls=style, label=result.method))
    if paired:
        bar = Line2D([], [], color=GREY, marker="|", ms=9, lw=0, label="± paired standard error, to dense")
        handles.append(bar)
    elif any(_stderr(result, metric) > 0.0 for result in (*placed, *dense)):
        handles.append(Patch(color=GREY, alpha=0.25, lw=0, label="± standard error (band, bars)"))
    for (kind, words), axes in zip(PANELS, all_axes):
        axes.set_xlabel(f"{words} in {PHASE_NAMES[phase]} (% of dense attention)")
        low, high = axes.dataLim.intervalx
        if kind == "vrow" and high - low < MIN_SPAN and labels["attn"]:
            labels[kind] = []  # the points overlap, and are labelled at the same heights in the other panel
        # Space for labels, and a minimum span, so that small differences do not look large.
        room = max(0.12 * (high - low), (MIN_SPAN - (high - low)) / 2)
        if np.isfinite(room):
            axes.set_xlim(max(low - room, 0.0), min(high + room, 101.0))
    task = f" on {tasks[0]}" if tasks[0] else ""
    unit = " (%)" if scale == 100.0 else ""
    all_axes[0].set_ylabel(f"{WORDS.get(metric, metric)}{task}{unit}", parse_math=False)
    add_legend(figure, handles)
    for (kind, _), axes in zip(PANELS, all_axes):
        place_labels(figure, axes, labels[kind])
    return figure, notes


def _metric(results: Sequence[CellResult]) -> str:
    """The metric to draw: the first of METRICS that all results have, else the first one they share."""
    if not results:
        raise UsageError("there are no results to draw: finish at least one run.")
    for name in (*METRICS, *results[0].metrics):
        if all(name in result.metrics and isfinite(result.metrics[name].value) for result in results):
            return name
    raise UsageError("the results have no metric in common: draw results of the same task and metrics.")


def _stderr(result: CellResult, metric: str) -> float:
    """The standard error; 0, which draws no bar, if there is none."""
    stderr = result.metrics[metric].stderr
    return stderr if stderr is not None and isfinite(stderr) else 0.0


def _paired_stderr(result: CellResult, metric: str) -> float | None:
    """That of the difference from dense, question by question; None if there is none."""
    found = result.paired.get("scores", {}).get(SCORE_OF.get(metric, metric))
    return None if found is None else found["stderr"]


def _scale(results: Sequence[CellResult], metric: str) -> float:
    """100 for a share of correct answers, which is shown in %, else 1."""
    return 100.0 if is_share(metric) and all(0.0 <= r.metrics[metric].value <= 1.0 for r in results) else 1.0


def _k_label(result: CellResult) -> str:
    return result.method if result.k is None else f"K={result.k}"
