"""Plots of thresholds by row length and of evaluated lengths: the figures of plot_th_llama.py."""

from math import ceil, isqrt
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from toptheta.report.plots.effective import draw_effective_k
from toptheta.report.plots.generation import histogram
from toptheta.report.plots.kept import draw_kept, draw_size_by_length
from toptheta.report.plots.read import read_sequence_lengths, read_thresholds
from toptheta.report.plots.report import Drawing, Run, missing_files, spread
from toptheta.report.plots.style import GREY, new_figure, series_colours, series_key

INPUTS = (
    "th.txt, layer<i>.txt, layer<i>_kept_attn_<phase>.csv, effective_k.csv, "
    "sequence_lengths_per_example.csv, plain or .gz"
)
WINDOW = 15  # row lengths in a running mean


def draw_thresholds(run: Run) -> Drawing:
    """th: threshold against row length, a panel per layer, a line per head; below it the number of
    samples."""
    drawing = Drawing("th")
    frame = read_thresholds(run.folder)
    if frame is None:
        drawing.notes.append(missing_files(run, ["th.txt"], "the thresholds"))
        return drawing
    meaning = _theta_meaning(run, frame)
    present = [int(layer) for layer in sorted(frame["layer"].unique())]
    wanted = run.layer_ids if run.layer_ids is not None else spread(present)
    heads = run.head_ids if run.head_ids is not None else tuple(sorted(frame["head"].unique().tolist())[:4])
    frame = frame[frame["layer"].isin(wanted) & frame["head"].isin(heads)].sort_values(["layer", "head", "n"])
    layers = sorted(frame["layer"].unique().tolist())
    for word, lacking in (
        ("layer", sorted(set(wanted) - set(layers))),
        ("head", sorted(set(heads) - set(frame["head"])) if layers else []),
    ):
        if lacking:
            names = f"{word}{'s' if len(lacking) > 1 else ''} {', '.join(map(str, lacking))}"
            drawing.notes.append(
                f"th.txt in {run.folder} has no thresholds of {names}: the plot does not show them."
            )
    if layers:
        drawing.figure = _figure(run, frame, layers, heads, meaning)
    return drawing


def draw_sequence_lengths(run: Run) -> Drawing:
    """sequence_lengths: a histogram of the lengths of evaluated sequences."""
    drawing = Drawing("sequence_lengths")
    frame = read_sequence_lengths(run.folder)
    if frame is None:
        missing = missing_files(run, ["sequence_lengths_per_example.csv"], "the evaluated lengths")
        drawing.notes.append(missing)
        return drawing
    lengths = frame["n"]
    drawing.figure = new_figure(6.0, 3.4, run.title)
    axes = drawing.figure.add_subplot()
    histogram(axes, lengths)
    axes.set_ylabel(f"number of sequences (of {len(lengths)})")
    axes.set_xlabel(f"length of an evaluated sequence (tokens); mean {lengths.mean():.1f}")
    return drawing


FIGURES = (draw_thresholds, draw_size_by_length, draw_kept, draw_effective_k, draw_sequence_lengths)


def _figure(run: Run, frame: pd.DataFrame, layers: list[int], heads: tuple[int, ...], meaning: str) -> Figure:
    columns = len(layers) if len(layers) < 4 else min(4, isqrt(len(layers) - 1) + 1)
    rows = ceil(len(layers) / columns)
    figure = new_figure(max(6.0, 4.4 * columns), 3.3 * rows + 0.9, run.title)
    grid = figure.subplots(2 * rows, columns, squeeze=False, sharex=True, height_ratios=(4.0, 1.0) * rows)
    colours: dict[Any, Any] = dict(zip(heads, series_colours(len(heads))))
    smooth = frame.groupby(["layer", "head"]).size().max() > 4 * WINDOW
    low, high = frame["theta"].min(), frame["theta"].max()
    log = meaning != "score" and low > 0 and high > 50 * low  # weights span decades
    for index, layer in enumerate(layers):
        row, column = divmod(index, columns)
        axes, counts = grid[2 * row, column], grid[2 * row + 1, column]
        part = frame[frame["layer"] == layer]
        for head, line in part.groupby("head"):
            _line(axes, line, colours[head], smooth)
        if log:
            axes.set_yscale("log")
        samples = part.groupby("n")["samples"].mean()
        samples = samples.reindex(range(samples.index.min(), samples.index.max() + 1), fill_value=0.0)
        edges = np.arange(len(samples) + 1) + samples.index[0] - 0.5
        counts.stairs(samples, edges, fill=True, color=GREY, alpha=0.6, lw=0)
        counts.set_ylim(bottom=0)
        counts.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        ks = ", ".join(f"{k:g}" for k in part["k"].unique()[:3])
        axes.set_title(f"layer {layer}, K = {ks}")
        if index % columns == 0:
            axes.set_ylabel("threshold θ" + (f" ({meaning})" if meaning else ""))
            counts.set_ylabel("samples")
        if index + columns >= len(layers):
            counts.set_xlabel("row length n (tokens)")
            counts.tick_params(labelbottom=True)
    for axes in grid.ravel():
        axes.set_visible(axes.has_data())
    figure.align_ylabels(grid[:, 0])
    extra: list[Artist] = [
        Patch(color=GREY, alpha=0.6, lw=0, label="number of calibration samples, mean over heads")
    ]
    if smooth:
        extra.insert(
            0,
            Line2D(
                [],
                [],
                color=GREY,
                lw=0.7,
                label=f"thin line: each row length; thick line: mean over {WINDOW} row lengths",
            ),
        )
    series_key(figure, grid.ravel(), "head", heads, extra)
    return figure


def _line(axes: Axes, line: pd.DataFrame, colour: object, smooth: bool) -> None:
    if not smooth:
        axes.plot(line["n"], line["theta"], color=colour, lw=1.0, marker=".", ms=4)
        return
    axes.plot(line["n"], line["theta"], color=colour, lw=0.5, alpha=0.4)
    mean = line["theta"].rolling(WINDOW, center=True, min_periods=1).mean()
    axes.plot(line["n"], mean, color=colour, lw=1.5)


def _theta_meaning(run: Run, frame: pd.DataFrame) -> str:
    """What theta is compared with: from the config; without one, a negative theta must be a score."""
    if run.placement == "pre-softmax" or frame["theta"].min() < 0:
        return "score"
    return "softmax weight" if run.placement == "post-softmax" else ""
