"""Histograms of individual calibration samples, with the threshold derived from them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from toptheta.calibration.kept_samples import read_calibration_samples
from toptheta.report.plots.read import read_config, read_thresholds
from toptheta.report.plots.style import COLOURS, GREY, add_legend, new_figure
from toptheta.util.errors import UsageError

BINS = 40
SPREAD = 3.0  # the bins extend this many interquartile ranges beyond the quartiles


def samples_figure(
    folder: Path | str,
    heads: Sequence[tuple[int, int]],
    lengths: Sequence[tuple[int, int]],
    title: str | None = None,
) -> Figure:
    """Histograms of the calibration samples: a row per (layer, head), a column per range of lengths.

    A sample is the (K+1)-th largest score (or weight) of one attention row. heads: pairs (layer, head);
    lengths: pairs (shortest, longest) of row lengths in tokens, both included. The line is the mean of
    the thresholds in th.txt over these rows, the band their range. Raises UsageError if a file is missing, if
    a head or a range of lengths has no samples, or if there are none of them.
    """
    if not heads or not lengths:
        raise UsageError(
            f"there are no {'lengths' if heads else 'heads'} to draw: give pairs, heads as in [(0, 3)] for "
            "layer 0, head 3, and lengths as in [(65, 200)]."
        )
    folder = Path(folder)
    samples = read_calibration_samples(folder)
    thresholds = read_thresholds(folder)
    if thresholds is None:
        raise UsageError(
            f"th.txt is missing or empty in {folder}: calibrate the run, or name another folder."
        )
    config = read_config(folder)
    if title is None:
        words = [str(config[key]) for key in ("model", "method") if key in config]
        title = ", ".join(words) or folder.resolve().name
    figure = new_figure(1.0 + 3.3 * len(lengths), 1.3 + 2.1 * len(heads), title)
    grid = figure.subplots(len(heads), len(lengths), squeeze=False, sharex="row")
    for row, (layer, head) in zip(grid, heads):
        if layer not in samples:
            raise UsageError(
                f"the samples in {folder} have no layer {layer}: choose from {_names(list(samples))}."
            )
        n, values = samples[layer]
        if not 0 <= head < values.shape[1]:
            raise UsageError(
                f"the samples in {folder} have no head {head}: choose from 0 to {values.shape[1] - 1}."
            )
        of_head = thresholds[(thresholds["layer"] == layer) & (thresholds["head"] == head)]
        theta = of_head.set_index("n")["theta"]
        if theta.empty:
            raise UsageError(f"th.txt in {folder} has no threshold of layer {layer}, head {head}.")
        chosen = []
        for shortest, longest in lengths:
            inside = (n >= shortest) & (n <= longest)
            if not inside.any():
                raise UsageError(
                    f"layer {layer} has no samples of rows of {shortest} to {longest} tokens: "
                    f"choose lengths from {n.min()} to {n.max()}."
                )
            chosen.append((values[inside, head], theta.reindex(n[inside]).dropna().to_numpy()))
        together = np.concatenate([part for part, _ in chosen])
        # The same bins in a row of panels; extreme samples are counted in the outermost bins, so that they do
        # not determine the range.
        low, quarter, three_quarters, high = np.quantile(together, (0.0, 0.25, 0.75, 1.0))
        most = SPREAD * (three_quarters - quarter)
        first, last = max(low, quarter - most), min(high, three_quarters + most)
        if first == last:  # all samples are the same
            first, last = first - 0.5, last + 0.5
        edges = np.linspace(first, last, BINS + 1)
        for axes, (part, theta_here), (shortest, longest) in zip(row, chosen, lengths):
            _panel(axes, part, theta_here, edges)
            axes.set_title(
                f"layer {layer}, head {head}, rows of {shortest:,} to {longest:,} tokens", fontsize=8.5
            )
        row[0].set_ylabel("rows")
    placement = (config.get("settings") or {}).get("placement")
    score = placement == "pre-softmax" or float(thresholds["theta"].min()) < 0
    k = ", ".join(f"{value:g}" for value in thresholds["k"].unique()[:3])
    for axes in grid[-1]:
        axes.set_xlabel(f"(K+1)-th largest {'score' if score else 'weight'} of a row, K = {k}")
    handles = [
        Patch(color=GREY, alpha=0.55, lw=0, label="calibration samples"),
        Line2D([], [], color=COLOURS[1], lw=1.8, label="threshold θ, mean over these rows"),
        Patch(color=COLOURS[1], alpha=0.2, lw=0, label="range of θ over these row lengths"),
    ]
    add_legend(figure, handles)
    return figure


def _panel(axes: Axes, values: np.ndarray, theta: np.ndarray, edges: np.ndarray) -> None:
    counts = np.histogram(values.clip(edges[0], edges[-1]), edges)[0]
    axes.stairs(counts, edges, fill=True, color=GREY, alpha=0.55, lw=0)
    axes.set_ylim(0.0, 1.2 * counts.max())
    if theta.size:
        axes.axvspan(theta.min(), theta.max(), color=COLOURS[1], alpha=0.2, lw=0, zorder=0)
        axes.axvline(theta.mean(), color=COLOURS[1], lw=1.8)
    above = 100.0 * (values > theta.mean()).mean() if theta.size else np.nan
    words = f"{len(values):,} rows, θ = {theta.mean():.3g}\n{above:.0f} % above θ" if theta.size else "no θ"
    axes.text(0.98, 0.97, words, transform=axes.transAxes, ha="right", va="top", fontsize=8)


def _names(ids: list[int]) -> str:
    return ", ".join(map(str, sorted(ids)))
