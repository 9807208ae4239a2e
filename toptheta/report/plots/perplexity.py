"""Plot of perplexity by context length, a line for each method, and of the increase over dense attention."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from toptheta.report.plots.style import MARKERS, add_legend, look, new_figure, save_figure, series_colours
from toptheta.report.results import CellResult
from toptheta.util.errors import UsageError

SPREAD = 0.12  # horizontal distance between methods, so that their error bars do not overlap


def draw_perplexity(results: Sequence[CellResult], path: Path | str, title: str) -> None:
    """Draw results of a perplexity run, which have `by_length`, and write the figure to `path`."""
    with look():
        figure = perplexity_figure(results, title)
    save_figure(figure, path)


def perplexity_figure(results: Sequence[CellResult], title: str) -> Figure:
    """The figure that `draw_perplexity` writes, for a notebook to show. Raises UsageError if a result has no
    perplexity by length, or their lengths differ."""
    bounds = [[row["length"] for row in result.by_length] for result in results]
    if not bounds or not bounds[0] or any(other != bounds[0] for other in bounds):
        raise UsageError(
            "the results have no perplexities for the same context lengths: draw the results of one run."
        )
    dense = [result for result in results if result.dense]
    sparse = [result for result in results if not result.dense]
    compared = bool(dense and sparse)
    figure = new_figure(11.0 if compared else 7.0, 4.2, title)
    panels = figure.subplots(1, 1 + compared, squeeze=False)[0]
    axes = panels[0]
    looks = [("black", "o")] * len(dense)
    looks += list(zip(series_colours(len(sparse)), [*MARKERS[1:], MARKERS[0]] * len(sparse)))
    handles, stderr = [], False
    for i, (result, (colour, marker)) in enumerate(zip([*dense, *sparse], looks)):
        rows = result.by_length
        shift = SPREAD * (i - (len(results) - 1) / 2)
        errors = [row.get("stderr") or 0.0 for row in rows]
        stderr = stderr or any(errors)
        axes.errorbar(
            [place + shift for place in range(len(rows))],
            [row["ppl"] for row in rows],
            yerr=errors,
            color=colour,
            marker=marker,
            ms=5,
            lw=1.3,
            elinewidth=0.9,
            capsize=2.5,
        )
        line: dict[str, Any] = {"color": colour, "marker": marker, "ms": 5, "lw": 1.3}
        handles.append(Line2D([], [], label=result.method, **line))
        if compared:
            above = [100 * (row["ppl"] / base["ppl"] - 1) for row, base in zip(rows, dense[0].by_length)]
            panels[1].plot(range(len(rows)), above, **line)
    lows = [results[0].by_length[0].get("first", 1), *(bound + 1 for bound in bounds[0][:-1])]
    ranges = [f"{low:,} to\n{high:,}" for low, high in zip(lows, bounds[0])]
    for panel in panels:
        panel.set_xticks(range(len(ranges)), ranges)
        panel.set_xlabel("context length (tokens before the predicted one)")
    if compared:
        panels[1].set_ylabel("increase of perplexity over dense attention (%)")
    axes.set_ylabel("perplexity" + (" ± standard error" if stderr else ""))
    add_legend(figure, handles)
    return figure
