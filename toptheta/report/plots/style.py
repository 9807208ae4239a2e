"""Style of the figures: colours that colour-blind readers can distinguish (Okabe-Ito, PuOr, viridis), sizes,
titles, saving.

Figures are created without pyplot, which would change global state and look for a window system.
"""

import textwrap
from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from toptheta.util.files import atomic_path

# Okabe-Ito without its yellow, which is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#767676"
PHASE_COLOURS = {"prefill": COLOURS[0], "generative_decoding": COLOURS[1]}
PHASE_MARKERS = {"prefill": "o", "generative_decoding": "s"}
PHASE_NAMES = {"prefill": "prefill", "generative_decoding": "decode"}
PASSED, FAILED = COLOURS[2], COLOURS[1]

_RC: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "figure.titlesize": 11.0,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # text in PDF and SVG stays text, for search and for editing
    "svg.fonttype": "none",
    "agg.path.chunksize": 10000,
}


def new_figure(width: float, height: float, title: str, **options: Any) -> Figure:
    """An empty figure of width x height inches with a title, to be drawn on within `look()`."""
    figure = Figure(figsize=(width, height), layout="constrained", **options)
    # A title is the user's text, in which a dollar sign does not start a formula.
    figure.suptitle(textwrap.fill(title, max(20, int(width * 11))), parse_math=False)
    return figure


def look() -> Any:
    """A context in which figures have this project's style."""
    return mpl.rc_context(_RC)


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write the figure atomically, in the format of the path's suffix. Raises OSError, with the path."""
    path = Path(path)
    try:
        with atomic_path(path) as temporary, look():
            figure.savefig(temporary, dpi=150, format=path.suffix[1:])
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


LEGEND_SHARE = 0.4  # of a figure's height


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend below all axes, in as many columns as fit the figure's width; its text contains no formulas.
    The figure grows by what a long legend would take from the axes."""
    for rows in range(1, len(handles) + 1):
        columns = ceil(len(handles) / rows)
        legend = figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)
        for text in legend.get_texts():
            text.set_parse_math(False)
        size = legend.get_window_extent()
        if columns == 1 or size.width < 0.97 * figure.bbox.width:
            more = size.height / figure.dpi - LEGEND_SHARE * figure.get_figheight()
            figure.set_figheight(figure.get_figheight() + max(0.0, more))
            return
        legend.remove()


def series_colours(count: int) -> list[Any]:
    """`count` colours: distinct ones if there are enough, else shades from dark to light."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(mpl.colormaps["viridis"](np.linspace(0.0, 0.92, count)))


def series_key(
    figure: Figure, axes: Iterable[Axes], word: str, ids: Sequence[int], extra: Sequence[Artist] = ()
) -> None:
    """A legend, or for many ids a colour bar, of the colour of each `word` (layer, head)."""
    colours = series_colours(len(ids))
    handles: list[Artist] = list(extra)
    if len(ids) <= len(COLOURS):
        handles = [Line2D([], [], color=c, lw=2, label=f"{word} {i}") for c, i in zip(colours, ids)] + handles
    else:
        norm = BoundaryNorm(np.arange(len(ids) + 1) - 0.5, len(ids))
        shown = np.unique(np.linspace(0, len(ids) - 1, min(len(ids), 12)).round().astype(int))
        bar = figure.colorbar(
            ScalarMappable(norm, ListedColormap(colours)),
            ax=list(axes),
            ticks=shown,
            label=word,
            aspect=max(30.0, 5.0 * figure.get_figheight()),
            pad=0.01,
        )
        bar.set_ticklabels([str(ids[i]) for i in shown])
        bar.minorticks_off()
    if handles:
        add_legend(figure, handles)
