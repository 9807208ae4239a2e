"""Heat map of needles: how many numbers hidden in a long text were found, by context length and depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from toptheta.report.plots.style import look, new_figure, save_figure


def draw_needle(rows: Sequence[dict[str, Any]], path: Path | str, title: str) -> None:
    """Draw rows of needle.csv (length, depth, found, count) as a heat map, and write it to `path`."""
    with look():
        figure = needle_figure(rows, title)
    save_figure(figure, path)


def needle_figure(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """The figure that `draw_needle` writes, for a notebook to show."""
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    share = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        if row["count"]:
            at = depths.index(row["depth"]), lengths.index(row["length"])
            share[at] = 100.0 * row["found"] / row["count"]
    figure = new_figure(max(4.8, 1.8 + 0.75 * len(lengths)), 1.6 + 0.42 * len(depths), title)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="viridis", vmin=0.0, vmax=100.0, aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("position of the needle in the context (%)")
    for row in rows:
        if row["count"]:
            x, y = lengths.index(row["length"]), depths.index(row["depth"])
            colour = "black" if share[y, x] > 60.0 else "white"
            axes.text(x, y, f"{row['found']}/{row['count']}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="needles found (%)")
    return figure
