"""Plot of KL to dense attention against what a decode step reads, KV bytes or V rows: one line per method,
one panel per text. Rows of a table that have a label ("method: label") have the method's marker, and a colour
for the label, explained in the panel."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from toptheta.report.plots.style import (
    COLOURS,
    GREY,
    MARKERS,
    add_legend,
    look,
    new_figure,
    save_figure,
    series_colours,
)
from toptheta.report.results import DECODE, CellResult, Metric
from toptheta.util.errors import UsageError

ALL_OF_K = 50.0  # % of dense: the part that is K, which a method reads if it needs the score of every key
FLOOR_ALPHA = 0.15
MANY_LINES = 16  # for which a single panel is wider
LABEL = ": "  # between a method and the label of its row
SIZES = {"ms": 5, "lw": 1.2}
COLUMNS = 2  # panels side by side
ROUNDING = 1e-7  # nats: smaller ones are rounding of float32 alone
TICKS = (1, 2, 5, 10, 15, 20, 30, 40, 50, 70, 100)


class Price(NamedTuple):
    """What decode steps read. share: of a result, as a share of dense attention, None if it was not counted;
    all_of_k: whether methods that score every key have a floor."""

    name: str
    share: Callable[[CellResult], float | None]
    all_of_k: bool


KV_BYTES = Price("KV bytes", lambda result: (result.kv_bytes or {}).get(DECODE), True)
V_ROWS = Price("V rows", lambda result: result.kept_share(DECODE, "vrow"), False)


def draw_divergence(
    panels: dict[str, Sequence[CellResult]], path: Path | str, title: str, price: Price = KV_BYTES
) -> None:
    """Draw KL(dense || method), with standard errors, against what a decode step reads in % of dense. panels:
    results by name, those of one text each. What is closer than dense attention in another type, where
    rounding is as large as the difference, is grey. Raises UsageError if no result has both numbers."""
    with look():
        figure = divergence_figure(panels, title, price)
    save_figure(figure, path)


def divergence_figure(panels: dict[str, Sequence[CellResult]], title: str, price: Price = KV_BYTES) -> Figure:
    """The figure that `draw_divergence` writes, for a notebook to show."""
    panels = {name: found for name, results in panels.items() if (found := _drawable(results, price))}
    if not panels:
        raise UsageError(
            f"no result differs from dense attention and has the {price.name} of decode steps: there is "
            "nothing to draw."
        )
    lines = list(dict.fromkeys(r.family for results in panels.values() for r in results if not r.dense))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width = 5.2 if len(lines) <= MANY_LINES else 8.0
    figure = new_figure(max(width, 5.2 * columns) + 0.4, 4.0 * rows + 1.1, title)
    all_axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    looks, methods = _looks(lines), list(dict.fromkeys(line.partition(LABEL)[0] for line in lines))
    labelled = len(methods) < len(lines)
    drawn = list(zip(all_axes, panels.items()))
    for axes, (name, results) in drawn:
        here = list(dict.fromkeys(result.family for result in results if not result.dense))
        if labelled:
            looks = _labelled_looks(here, methods)
            _explain_labels(axes, looks)
        for line in here:
            _draw_line(axes, [result for result in results if result.family == line], looks[line], price)
        if price.all_of_k:
            axes.axvline(ALL_OF_K, color="black", lw=0.9, ls=":", zorder=0)
        axes.set_title(name, parse_math=False)
        axes.set(xscale="log", yscale="log")
    floors = [(axes, floor) for axes, (_, results) in drawn if (floor := _floor(results)) is not None]
    for axes, floor in floors:
        axes.axhline(floor, color=GREY, lw=1.0, zorder=0)
    low, high = all_axes[0].get_ylim()  # of all panels, with every floor
    for axes, floor in floors:
        axes.axhspan(low, floor, color=GREY, alpha=FLOOR_ALPHA, lw=0, zorder=0)
    all_axes[0].set_ylim(low, high)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes in all_axes[: len(panels)]:  # a shared axis has its numbers below the last row only
        axes.xaxis.set_tick_params(labelbottom=True)
    _label(figure, columns, price)
    if labelled:
        plain = {"color": "black", "ls": "none"} | SIZES
        looks = {method: {"marker": MARKERS[i % len(MARKERS)]} | plain for i, method in enumerate(methods)}
    handles: list[Artist] = [Line2D([], [], label=line, **look) for line, look in looks.items()]
    if floors:
        label = "closer than dense attention in another type"
        handles.append(Patch(color=GREY, alpha=FLOOR_ALPHA, lw=0, label=label))
    if price.all_of_k:
        label = "50 %: all of K, which scoring every key needs"
        handles.append(Line2D([], [], color="black", lw=0.9, ls=":", label=label))
    add_legend(figure, handles)
    return figure


def _drawable(results: Sequence[CellResult], price: Price) -> list[CellResult]:
    return [result for result in results if _kl(result) is not None and price.share(result) is not None]


def _kl(result: CellResult) -> Metric | None:
    """None if it is that of the dense reference itself, or of a method that kept all: a logarithmic axis
    cannot show 0."""
    metric = result.metrics.get("kl")
    return metric if metric is not None and metric.value > ROUNDING else None


def _looks(lines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The styles of lines: each has a colour of its own, and lines are dashed once all colours are used."""
    looks = {}
    for i, line in enumerate(lines):
        again, number = divmod(i, len(COLOURS))
        marker = MARKERS[(i + again) % len(MARKERS)]
        looks[line] = {"color": COLOURS[number], "ls": ("-", "--", ":")[again % 3], "marker": marker} | SIZES
    return looks


def _labelled_looks(lines: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The styles of a panel's lines: a marker for each method, a colour for each label."""
    labels = list(dict.fromkeys(label for line in lines if (label := line.partition(LABEL)[2])))
    colours = {"": "black"} | dict(zip(labels, series_colours(len(labels))))
    looks = {}
    for line in lines:
        method, _, label = line.partition(LABEL)
        marker = MARKERS[methods.index(method) % len(MARKERS)]
        looks[line] = {"color": colours[label], "ls": "-", "marker": marker} | SIZES
    return looks


def _explain_labels(axes: Axes, looks: dict[str, dict[str, Any]]) -> None:
    colours = {line.partition(LABEL)[2]: look["color"] for line, look in looks.items()}
    handles = [Patch(color=colour, label=label) for label, colour in colours.items() if label]
    for text in axes.legend(handles=handles, fontsize="small").get_texts():
        text.set_parse_math(False)


def _draw_line(axes: Axes, results: Sequence[CellResult], look_of_it: dict[str, Any], price: Price) -> None:
    points = []
    for result in results:
        metric = result.metrics["kl"]
        points.append((100.0 * (price.share(result) or 0.0), metric.value, metric.stderr or 0.0))
    x, y, errors = np.array(sorted(points)).reshape(-1, 3).T
    errors = np.minimum(errors, 0.999 * y)  # the axis is logarithmic
    axes.errorbar(x, y, errors, elinewidth=0.9, capsize=2.0, **look_of_it)


def _floor(results: Sequence[CellResult]) -> float | None:
    """The KL of dense attention in another type, the largest of several."""
    return max((result.metrics["kl"].value for result in results if result.dense), default=None)


def _label(figure: Figure, columns: int, price: Price) -> None:
    for i, axes in enumerate(figure.axes):
        if i % columns == 0:
            axes.set_ylabel("KL(dense || method), nats per token")
        axes.set_xlabel(f"{price.name} that a decode step reads (% of dense attention)")
        low, high = axes.get_xlim()
        ticks: list[float] = [tick for tick in TICKS if low <= tick <= high]
        if len(ticks) < 3:  # a narrow range
            round_ones = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
            ticks = [tick for tick in round_ones if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
