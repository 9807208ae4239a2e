"""Plot of differences from a baseline with their 95% intervals: one panel for each compared quantity."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure

from toptheta.report.paired import Comparison, Difference
from toptheta.report.plots.style import GREY, look, new_figure, save_figure, series_colours
from toptheta.report.tables import is_share
from toptheta.util.errors import UsageError

WORDS = {  # axis labels of quantities, by key
    "nll": "ln(perplexity / baseline's perplexity)",
    "kl": "KL(dense || method), nats",
    "target_logprob": "log-probability of the correct answer,\ndifference from the baseline (nats)",
}
LABEL_WIDTH = 40  # characters in a line of a cell's label


def draw_comparison(compared: Sequence[tuple[str, Comparison]], path: Path | str, title: str) -> None:
    """Draw the comparisons of cells (by label) with one baseline, and write the figure to `path`. Raises
    UsageError if there is no difference to draw."""
    with look():
        figure = comparison_figure(compared, title)
    save_figure(figure, path)


def comparison_figure(compared: Sequence[tuple[str, Comparison]], title: str) -> Figure:
    """The figure that `draw_comparison` writes, for a notebook to show."""
    panels: dict[str, dict[str, Difference]] = {}
    for label, comparison in compared:
        for name, one in _differences(comparison).items():
            factor = 100.0 if name not in WORDS and is_share(name) else 1.0
            panels.setdefault(WORDS.get(name) or _words(name), {})[label] = _scaled(one, factor)
    if not panels:
        raise UsageError("the runs have no score in common: score them first, or compare other runs.")
    labels = [label for label, _ in compared]
    colours = dict(zip(labels, series_colours(len(labels))))
    shown = [fill(label, LABEL_WIDTH) for label in labels]
    lines = [line for label in shown for line in label.split("\n")]
    width = 3.6 * len(panels) + max(3.0, 1.0 + 0.08 * max(map(len, lines)))
    figure = new_figure(width, 1.6 + 0.36 * max(len(labels), 0.6 * len(lines)), title)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (words, differences) in zip(all_axes, panels.items()):
        axes.axvline(0.0, color=GREY, lw=1.0, zorder=1)
        for place, label in enumerate(labels):
            if label not in differences:
                continue
            one = differences[label]
            low, high = one.interval or (one.value, one.value)
            errors = [[one.value - low], [high - one.value]]
            axes.errorbar(
                [one.value], [place], xerr=errors, fmt="o", color=colours[label], ms=5, lw=1.4, capsize=3
            )
        axes.set_xlabel(words, parse_math=False)
        axes.grid(axis="y", visible=False)
    all_axes[0].set_yticks(range(len(labels)), shown, parse_math=False)
    all_axes[0].set_ylim(len(labels) - 0.5, -0.5)
    return figure


def _differences(comparison: Comparison) -> dict[str, Difference]:
    """The quantities with an interval: differences of scores and of the correct answer's log-probability, and
    KL."""
    found = dict(comparison.scores)
    if comparison.target_logprob is not None:
        found["target_logprob"] = comparison.target_logprob
    if "kl" in comparison.text:
        kl = comparison.text["kl"]
        found["kl"] = Difference(kl.value, kl.stderr, comparison.count)
    return found


def _words(name: str) -> str:
    return f"{name}, difference from the baseline" + ("\n(percentage points)" if is_share(name) else "")


def _scaled(one: Difference, factor: float) -> Difference:
    stderr = None if one.stderr is None else factor * one.stderr
    return Difference(factor * one.value, stderr, one.count, one.clusters)
