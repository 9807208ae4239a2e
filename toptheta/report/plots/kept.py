"""Plots of kept elements and V rows, relative to Top-k (by row length, by layer) and to dense attention (by
layer)."""

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from toptheta.report.plots.read import read_kept, read_sizes
from toptheta.report.plots.report import Drawing, Run, missing_files, spread
from toptheta.report.plots.style import (
    GREY,
    PHASE_COLOURS,
    PHASE_MARKERS,
    PHASE_NAMES,
    add_legend,
    new_figure,
    series_colours,
    series_key,
)
from toptheta.report.results import PHASES
from toptheta.util.files import find_file

MAX_BINS = 40  # of row lengths
SIZE_LABEL = "elements kept / kept by Top-k"
NO_DATA = "#d0d0d0"
KINDS = {"attn": "attention elements", "vrow": "V rows"}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def draw_size_by_length(run: Run) -> Drawing:
    """size: kept elements relative to Top-k by row length and phase, as lines for some layers and as a heat
    map of all."""
    drawing = Drawing("size")
    lines = run.layer_ids or spread([i for i in run.layers if find_file(run.folder, f"layer{i}.txt")])
    sums, frames = [], {}  # frames only of layers with a line: all would not fit in memory
    for layer, frame in _sizes(run, drawing):
        sums.append(
            frame.groupby(["phase", "n"], observed=True)["ratio"].agg(["sum", "count"]).assign(layer=layer)
        )
        if layer in lines:
            frames[layer] = frame
    if not sums:
        return drawing
    lines = tuple(layer for layer in lines if layer in frames)
    table = pd.concat(sums).reset_index()
    layers = tuple(int(layer) for layer in sorted(table["layer"].unique()))
    phases = [phase for phase in PHASES if (table["phase"] == phase).any()]
    low, high = int(table["n"].min()), int(table["n"].max())
    edges = np.linspace(low - 0.5, high + 0.5, _bins(table) + 1)

    rows = 2 if len(layers) > 1 else 1
    map_height = min(8.0, 1.7 + 0.06 * len(layers))
    figure = new_figure(
        1.0 + 4.6 * max(len(phases), 1.3), 3.6 + (map_height if rows == 2 else 0.0), run.title
    )
    all_axes = figure.subplots(
        rows, len(phases), squeeze=False, sharex=True, sharey="row", height_ratios=(3.0, map_height)[:rows]
    )
    bands = len(lines) <= 6  # more would cover each other
    for axes, phase in zip(all_axes[0], phases):
        for layer, colour in zip(lines, series_colours(len(lines))):
            frame = frames[layer]
            _line(axes, frame[frame["phase"] == phase], edges, colour, bands)
        axes.axhline(1.0, color="black", lw=1.0, ls="--")
        axes.set_title(PHASE_NAMES[phase])
    all_axes[0, 0].set_ylim(bottom=0.0)
    all_axes[0, 0].set_ylabel(f"{SIZE_LABEL}\n({run.head_words})")
    extra: list[Artist] = [
        Line2D([], [], color="black", lw=1.0, ls="--", label="Top-k"),
        Patch(
            color=GREY,
            alpha=0.25,
            lw=0,
            label="line: median; band: 10th to 90th percentile over heads and rows",
        )
        if bands
        else Line2D([], [], color=GREY, lw=1.4, label="median over heads and rows"),
    ]
    if rows == 2:
        extra += _map(figure, all_axes[1], table, phases, layers, edges)
    for axes in all_axes[-1]:
        axes.set_xlabel("row length n (tokens)")
    series_key(figure, all_axes[0], "layer", lines, extra)
    drawing.figure = figure
    return drawing


def draw_size_by_layer(run: Run) -> Drawing:
    """size_by_layer: kept elements relative to Top-k, their distribution over heads and rows by layer."""
    drawing = Drawing("size_by_layer")
    boxes: dict[str, list[dict]] = {phase: [] for phase in PHASES}
    for layer, frame in _sizes(run, drawing):
        for phase, ratios in frame.groupby("phase", observed=True)["ratio"]:
            low, q1, median, q3, high = ratios.quantile(QUANTILES)
            box = {
                "whislo": low,
                "q1": q1,
                "med": median,
                "q3": q3,
                "whishi": high,
                "mean": ratios.mean(),
                "fliers": [],
                "label": layer,
            }
            boxes[str(phase)].append(box)
    phases = [phase for phase in PHASES if boxes[phase]]
    if not phases:
        return drawing
    layers = sorted({box["label"] for phase in phases for box in boxes[phase]})
    places = {layer: place for place, layer in enumerate(layers)}
    figure = new_figure(max(6.5, 1.8 + 0.2 * len(layers)), 0.9 + 2.7 * len(phases), run.title)
    all_axes = figure.subplots(len(phases), 1, squeeze=False, sharex=True)[:, 0]
    for axes, phase in zip(all_axes, phases):
        colour = PHASE_COLOURS[phase]
        axes.bxp(
            boxes[phase],
            positions=[places[box["label"]] for box in boxes[phase]],
            widths=0.6,
            showfliers=False,
            showmeans=True,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": colour, "edgecolor": colour, "alpha": 0.45},
            medianprops={"color": "black", "lw": 1.4},
            meanprops={"marker": "o", "ms": 3.5, "mfc": "white", "mec": "black", "mew": 0.8},
            whiskerprops={"color": colour},
            capprops={"color": colour},
        )
        axes.axhline(1.0, color="black", lw=1.0, ls="--")
        axes.set_ylim(bottom=0.0)
        axes.set_ylabel(SIZE_LABEL)
        axes.set_title(f"{PHASE_NAMES[phase]}, {run.head_words}")
    layer_axis(all_axes[-1], layers)
    handles = [
        Line2D([], [], color="black", lw=1.0, ls="--", label="Top-k"),
        Line2D([], [], color="black", lw=1.4, label="median"),
        Line2D([], [], ls="", marker="o", ms=3.5, mfc="white", mec="black", label="mean"),
        Patch(
            facecolor=GREY,
            alpha=0.45,
            label="box: middle half of heads and rows; whiskers: 5th to 95th percentile",
        ),
    ]
    add_legend(figure, handles)
    drawing.figure = figure
    return drawing


def draw_kept(run: Run) -> Drawing:
    """kept_attn: kept attention elements and V rows, in % of dense attention, by layer and phase."""
    drawing = Drawing("kept_attn")
    tables = {}
    for kind in KINDS:
        table = _kept_table(run, drawing, kind)
        if table is not None:
            tables[kind] = table
    if not tables:
        return drawing
    layers = sorted({layer for table in tables.values() for layer in table["layer"]})
    places = {layer: place for place, layer in enumerate(layers)}
    figure = new_figure(max(6.5, 1.8 + 0.2 * len(layers)), 0.9 + 2.7 * len(tables), run.title)
    all_axes = figure.subplots(len(tables), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (kind, table) in zip(all_axes, tables.items()):
        for phase in PHASES:
            part = table[table["phase"] == phase]
            if part.empty:
                continue
            x = part["layer"].map(places)
            colour = PHASE_COLOURS[phase]
            axes.fill_between(x, part["low"], part["high"], color=colour, alpha=0.2, lw=0)
            axes.plot(x, part["mean"], color=colour, marker=PHASE_MARKERS[phase], ms=4, lw=1.4)
        what = KINDS[kind]
        axes.set_title(f"{what}, {'all groups' if kind == 'vrow' else run.head_words}")
        axes.set_ylabel(f"kept {what}\n(% of dense attention)")
        axes.set_ylim(0.0, None if table["high"].max() < 60 else 104.0)
    layer_axis(all_axes[-1], layers)
    handles: list[Artist] = [
        Line2D([], [], color=PHASE_COLOURS[p], marker=PHASE_MARKERS[p], ms=4, lw=1.4, label=PHASE_NAMES[p])
        for p in PHASES
        if any((table["phase"] == p).any() for table in tables.values())
    ]
    handles.append(
        Patch(
            color=GREY,
            alpha=0.25,
            lw=0,
            label="band: from the head (or group) that keeps fewest to the one that keeps most",
        )
    )
    add_legend(figure, handles)
    drawing.figure = figure
    return drawing


def _sizes(run: Run, drawing: Drawing) -> Iterator[tuple[int, pd.DataFrame]]:
    """For one layer after the other its index and the sizes of the chosen heads; then a note on missing
    files."""
    missing, some = [], False
    for layer in run.layers or (0,):
        frame = read_sizes(run.folder, layer)
        if frame is not None and run.head_ids is not None:
            frame = frame[frame["head"].isin(run.head_ids)]
        if frame is None or frame.empty:
            missing.append(f"layer{layer}.txt")
        else:
            some = True
            yield layer, frame
    if missing:
        drawing.notes.append(missing_files(run, missing, "the kept elements relative to Top-k", some))


def _kept_table(run: Run, drawing: Drawing, kind: str) -> pd.DataFrame | None:
    """layer, phase, mean, low, high (%) over all rows: of all heads (or groups) together, and of those that
    keep fewest and most."""
    unit = "head" if kind == "attn" else "group"
    records = []
    for phase in PHASES:
        missing = []
        for layer in run.layers or (0,):
            frame = read_kept(run.folder, layer, kind, phase)
            if frame is not None and kind == "attn" and run.head_ids is not None:
                frame = frame[frame["head"].isin(run.head_ids)]
            if frame is None or not frame["full"].sum() > 0:
                missing.append(f"layer{layer}_kept_{kind}_{phase}.csv")
                continue
            sums = frame.groupby(unit)[["kept", "full"]].sum()
            share = 100.0 * sums["kept"] / sums["full"]
            mean = 100.0 * sums["kept"].sum() / sums["full"].sum()
            records.append(
                {"layer": layer, "phase": phase, "mean": mean, "low": share.min(), "high": share.max()}
            )
        if missing:
            what = f"the kept {KINDS[kind]} in {PHASE_NAMES[phase]}"
            some = any(record["phase"] == phase for record in records)
            drawing.notes.append(missing_files(run, missing, what, some))
    return pd.DataFrame(records) if records else None


def _line(axes: Axes, frame: pd.DataFrame, edges: np.ndarray, colour: Any, band: bool) -> None:
    """The median of the ratios in each bin of row lengths, with a band from the 10th to the 90th
    percentile."""
    if frame.empty:
        return
    bins = np.digitize(frame["n"], edges)
    ratios = frame["ratio"].groupby(bins)
    x = frame["n"].groupby(bins).mean()
    if band:
        axes.fill_between(x, ratios.quantile(0.1), ratios.quantile(0.9), color=colour, alpha=0.15, lw=0)
    axes.plot(x, ratios.median(), color=colour, lw=1.4, marker="." if len(x) < 60 else None, ms=4)


def _bins(table: pd.DataFrame) -> int:
    """The number of bins of row lengths: few if few lengths occur, so that most bins are not empty."""
    lengths = table["n"]
    distinct = int(table.groupby("phase")["n"].nunique().min())
    return min(MAX_BINS, int(lengths.max() - lengths.min()) + 1, max(8, distinct // 3))


def _map(
    figure: Figure,
    all_axes: np.ndarray,
    table: pd.DataFrame,
    phases: list[str],
    layers: tuple[int, ...],
    edges: np.ndarray,
) -> list[Patch]:
    """A heat map of mean ratios, layers by bins of lengths; white is as many as Top-k. Returns legend
    entries."""
    grids = {}
    for phase in phases:
        part = table[table["phase"] == phase]
        at = (np.searchsorted(layers, part["layer"]), np.digitize(part["n"], edges) - 1)
        sums, counts = np.zeros((len(layers), len(edges) - 1)), np.zeros((len(layers), len(edges) - 1))
        np.add.at(sums, at, part["sum"])
        np.add.at(counts, at, part["count"])
        grids[phase] = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    values = np.concatenate([grid[grid > 0] for grid in grids.values()])
    # Symmetric about 1 on a log scale; a single extreme row length must not determine the range.
    spread_of_logs = np.quantile(np.abs(np.log(values)), 0.99) if values.size else 0.0
    most = float(np.clip(np.exp(spread_of_logs), 1.25, 8.0))
    norm = LogNorm(1.0 / most, most)
    cmap = mpl.colormaps["PuOr_r"].with_extremes(bad=NO_DATA)
    for axes, phase in zip(all_axes, phases):
        grid = np.where(grids[phase] == 0.0, 1e-6, grids[phase])  # a log scale would show 0 as no data
        mesh = axes.pcolormesh(
            edges, np.arange(len(layers) + 1) - 0.5, grid, norm=norm, cmap=cmap, rasterized=True
        )
        axes.grid(False)
        layer_axis(axes, layers, "y")
        axes.set_ylabel("layer" if phase == phases[0] else "")
    coarse, fine = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5)
    ticks = [tick for tick in (coarse if most > 2.5 else fine) if 0.999 / most <= tick <= 1.001 * most]
    bar = figure.colorbar(
        mesh, ax=list(all_axes), extend="both", aspect=15, pad=0.01, label="mean of kept / kept by Top-k"
    )
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    empty = any(np.isnan(grid).any() for grid in grids.values())
    return [Patch(color=NO_DATA, label="no rows of these lengths")] if empty else []


def layer_axis(axes: Axes, layers: Sequence[int], which: str = "x") -> None:
    """An axis of the drawn layers at equal distances, with as many numbers as fit."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if len(layers) <= 12:
        axis.set_major_locator(FixedLocator(range(len(layers))))
    else:
        axis.set_major_locator(MaxNLocator(12, integer=True))

    def name(place: float, _: object) -> str:
        return str(layers[int(place)]) if place in range(len(layers)) else ""

    axis.set_major_formatter(FuncFormatter(name))
    if which == "x":
        axes.set_xlim(-0.7, len(layers) - 0.3)
        axes.set_xlabel("layer")
