"""Plots of the lengths of prompts and completions by outcome: the figures of plot_gen_llama.py."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from toptheta.report.plots.kept import draw_size_by_layer
from toptheta.report.plots.read import read_completion_lengths, read_outcomes
from toptheta.report.plots.report import Drawing, Run, missing_files
from toptheta.report.plots.style import FAILED, GREY, PASSED, add_legend, new_figure

INPUTS = "prompt_completion_lengths_per_sample.csv, samples.jsonl_results.jsonl, layer<i>.txt, plain or .gz"
MAX_BINS = 30
LENGTHS = {
    "prompt": "prompt length",
    "completion": "completion length",
    "total": "prompt + completion length",
}


def draw_lengths(run: Run) -> Drawing:
    """lengths: histograms of prompt, completion and total lengths, split by passed and failed."""
    drawing = Drawing("lengths")
    lengths = read_completion_lengths(run.folder)
    if lengths is None:
        missing = missing_files(run, ["prompt_completion_lengths_per_sample.csv"], "the lengths")
        drawing.notes.append(missing)
        return drawing
    passed = _passed(run, drawing, len(lengths))
    figure = new_figure(10.5, 3.6, run.title)
    all_axes = figure.subplots(1, 3)
    for axes, (column, words) in zip(all_axes, LENGTHS.items()):
        histogram(axes, lengths[column], passed)
        axes.set_xlabel(f"{words} (tokens)\nmean {lengths[column].mean():.1f}")
    all_axes[0].set_ylabel("samples")
    if passed is None:
        handles = [Patch(facecolor=GREY, label=f"all samples ({len(lengths)})")]
    else:
        handles = [
            Patch(facecolor=PASSED, label=f"passed ({passed.sum()})"),
            Patch(
                facecolor=FAILED, hatch="////", edgecolor="white", lw=0, label=f"failed ({(~passed).sum()})"
            ),
        ]
    add_legend(figure, handles)
    drawing.figure = figure
    return drawing


FIGURES = (draw_lengths, draw_size_by_layer)


def _passed(run: Run, drawing: Drawing, count: int) -> pd.Series | None:
    """Whether each of `count` samples passed; None, and a note, if the outcomes are not known."""
    outcomes = read_outcomes(run.folder)
    name = "samples.jsonl_results.jsonl"
    if outcomes is None:
        drawing.notes.append(missing_files(run, [name], "which samples passed"))
        return None
    if len(outcomes) != count:
        drawing.notes.append(
            f"{name} has {len(outcomes)} samples, but prompt_completion_lengths_per_sample.csv in "
            f"{run.folder} has "
            f"{count}: the plot does not show which samples passed."
        )
        return None
    return outcomes["passed"]


def histogram(axes: Axes, lengths: pd.Series, passed: pd.Series | None = None) -> None:
    """A histogram of lengths in whole tokens; with `passed`, failed samples are stacked on passed ones."""
    low, high = int(lengths.min()), int(lengths.max())
    # Equally wide bins of whole tokens; otherwise some would contain one more length than others.
    width = max(1, -(-(high - low + 1) // MAX_BINS))
    edges = np.arange(low, high + width + 1, width) - 0.5
    if passed is None:
        axes.bar(edges[:-1], np.histogram(lengths, edges)[0], width, align="edge", color=GREY, lw=0)
    else:
        good, bad = np.histogram(lengths[passed], edges)[0], np.histogram(lengths[~passed], edges)[0]
        axes.bar(edges[:-1], good, width, align="edge", color=PASSED, lw=0)
        # Hatched, so that they also differ in print without colour.
        axes.bar(edges[:-1], bad, width, good, align="edge", color=FAILED, lw=0, hatch="////", ec="white")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
