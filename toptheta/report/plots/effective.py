"""Plots of effective K: how many elements individual rows keep, compared with the K of the calibration."""

from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from toptheta.report.plots.kept import layer_axis
from toptheta.report.plots.read import read_effective_k, read_results
from toptheta.report.plots.report import Drawing, Run, missing_files, spread
from toptheta.report.plots.style import (
    GREY,
    PHASE_COLOURS,
    PHASE_MARKERS,
    PHASE_NAMES,
    add_legend,
    new_figure,
)
from toptheta.report.results import PHASES

COLUMNS = 4
KEPT_LABEL = "elements kept per row"


def draw_effective_k(run: Run) -> Drawing:
    """effective_k: mean, 5th and 95th percentile of the elements that individual rows keep, by row length
    (some layers) and by layer."""
    drawing = Drawing("effective_k")
    frame = read_effective_k(run.folder)
    if frame is None:
        missing = missing_files(run, ["effective_k.csv"], "the elements that individual rows keep")
        drawing.notes.append(f"{missing} A Top-theta run writes it with --effective_k.")
        return drawing
    present = tuple(int(layer) for layer in sorted(frame["layer"].unique()))
    wanted = present if run.layer_ids is None else run.layer_ids
    if lacking := sorted(set(wanted) - set(present)):
        names = ", ".join(map(str, lacking))
        drawing.notes.append(f"effective_k.csv in {run.folder} has no rows of layers {names}.")
    panels = [i for i in wanted if i in present] if run.layer_ids is not None else spread(present)
    if not panels:
        return drawing
    overview = _by_layer(run, wanted)
    if not overview:
        drawing.notes.append(
            missing_files(run, ["results.json"], "the panel that compares all layers", some=True)
        )

    columns, rows = min(COLUMNS, len(panels)), ceil(len(panels) / COLUMNS)
    bottom = 1 if overview else 0
    width = max(6.5, 2.9 * columns, 1.8 + 0.2 * len(overview))
    figure = new_figure(width, 1.0 + 2.7 * (rows + bottom), run.title)
    grid = figure.add_gridspec(rows + bottom, columns)
    first: Axes | None = None
    for place, layer in enumerate(panels):
        row, column = divmod(place, columns)
        axes = figure.add_subplot(grid[row, column], sharex=first, sharey=first)
        first = first or axes
        _panel(axes, frame[frame["layer"] == layer])
        axes.set_title(f"layer {layer}, K = {frame.loc[frame['layer'] == layer, 'k'].iloc[0]}")
        if place + columns >= len(panels):
            axes.set_xlabel("row length n (tokens)")
        if column == 0:
            axes.set_ylabel(KEPT_LABEL)
        else:
            axes.tick_params(labelleft=False)
    if overview:
        _overview(figure.add_subplot(grid[rows, :]), overview)
    phases = [phase for phase in PHASES if (frame["phase"] == phase).any()]
    handles: list[Artist] = [
        Line2D([], [], color=PHASE_COLOURS[p], marker=PHASE_MARKERS[p], ms=4, lw=1.4, label=PHASE_NAMES[p])
        for p in phases
    ]
    handles += [
        Line2D([], [], color="black", lw=1.0, ls="--", label="K"),
        Patch(
            color=GREY,
            alpha=0.3,
            lw=0,
            label="line or marker: mean; band or bar: 5th to 95th percentile of the rows of all heads",
        ),
    ]
    add_legend(figure, handles)
    drawing.figure = figure
    return drawing


def _by_layer(run: Run, wanted: tuple[int, ...]) -> list[dict[str, Any]]:
    """layer, phase, k, mean, p5, p95 over all lengths, from results.json."""
    result = read_results(run.folder)
    phases = (result.effective_k if result is not None else None) or []
    return [
        layer | {"phase": one["phase"], "k": one["k"]}
        for one in phases
        for layer in one["layers"]
        if layer["layer"] in wanted
    ]


def _panel(axes: Axes, frame: pd.DataFrame) -> None:
    """The elements that the rows of one layer keep, by row length."""
    for phase in PHASES:
        part = frame[frame["phase"] == phase].sort_values("n_low")
        if part.empty:
            continue
        colour = PHASE_COLOURS[phase]
        # Steps as wide as the bins, without a band at lengths that no row had.
        for _, bins in part.groupby((part["n_low"] != part["n_high"].shift() + 1).cumsum()):
            x = np.column_stack([bins["n_low"], bins["n_high"] + 1]).ravel()
            axes.fill_between(x, bins["p5"].repeat(2), bins["p95"].repeat(2), color=colour, alpha=0.2, lw=0)
        middle = np.sqrt(part["n_low"] * part["n_high"])
        axes.plot(middle, part["mean"], color=colour, marker=PHASE_MARKERS[phase], ms=3.5, lw=1.4)
    axes.axhline(frame["k"].iloc[0], color="black", lw=1.0, ls="--")
    _octaves(axes, "x")
    _octaves(axes, "y")


def _overview(axes: Axes, layers: list[dict[str, Any]]) -> None:
    """All layers next to each other, over all lengths."""
    frame = pd.DataFrame(layers)
    ids = sorted(frame["layer"].unique().tolist())
    phases = [phase for phase in PHASES if (frame["phase"] == phase).any()]
    for phase in phases:
        part = frame[frame["phase"] == phase]
        x = np.searchsorted(ids, part["layer"]) + (
            0.0 if len(phases) == 1 else -0.17 if phase == PHASES[0] else 0.17
        )
        colour = PHASE_COLOURS[phase]
        axes.vlines(x, part["p5"], part["p95"], color=colour, alpha=0.35, lw=4.0)
        axes.plot(x, part["mean"], color=colour, ls="", marker=PHASE_MARKERS[phase], ms=3.5)
    k = frame.groupby("layer")["k"].first()
    axes.stairs(k, np.arange(len(k) + 1) - 0.5, baseline=None, color="black", lw=1.0, ls="--")
    axes.set_title("by layer, all row lengths")
    axes.set_ylabel(KEPT_LABEL)
    _octaves(axes, "y")
    layer_axis(axes, ids)


def _octaves(axes: Axes, which: str) -> None:
    """A log scale with plain numbers at powers of two, because the ratio of kept elements to K matters."""
    axes.set(**{f"{which}scale": "log"})
    axis, (low, high) = (axes.xaxis, axes.get_xlim()) if which == "x" else (axes.yaxis, axes.get_ylim())
    few = high < 3 * low  # powers of two alone would leave the axis with one number or none
    axis.set_major_locator(LogLocator(base=2.0, subs=(1.0, 1.25, 1.5, 1.75) if few else (1.0,), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
