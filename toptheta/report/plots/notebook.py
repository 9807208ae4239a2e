"""Figures in a notebook, the same as those that the scripts write to files."""

import io
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from toptheta.report.plots.flags import Request
from toptheta.report.plots.report import Drawing, Run, cells_in, open_run
from toptheta.report.plots.style import look
from toptheta.util.errors import UsageError

DPI = 80  # as wide as a notebook's column, and small enough to be stored in the notebook


@dataclass(frozen=True)
class Picture:
    """A PNG image that a notebook shows as the value of a cell."""

    png: bytes

    def __repr__(self) -> str:
        return "Picture()"

    def _repr_png_(self) -> bytes:
        return self.png


def open_folder(
    folder: Path | str,
    title: str | None = None,
    layer_ids: Sequence[int] | None = None,
    head_ids: Sequence[int] | None = None,
) -> Run:
    """A run's folder for the `draw_...` functions; ids: draw these only. Raises UsageError."""
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder: name the folder of a run, products/<timestamp>.")
    layers, heads = _ids("layer_ids", layer_ids), _ids("head_ids", head_ids)
    run = open_run(Request(path, path, "png", title, layers, heads))
    cells = "" if run.num_layers else cells_in(path)
    if cells:
        raise UsageError(f"{path} is the folder of a run, and a figure shows a single cell: name {cells}.")
    return run


def _ids(name: str, ids: Any) -> tuple[int, ...] | None:
    if ids is None:
        return None
    try:
        found = sorted({operator.index(one) for one in ids})
    except TypeError:
        found = []
    if not found or found[0] < 0:
        raise UsageError(
            f"{name} is {ids!r}, but must be whole numbers from 0, in a list: give {name}=[0, 1, 15]."
        )
    return tuple(found)


def show(draw: Callable[..., Figure | Drawing | tuple[Figure, list[str]]], *args: Any, **kw: Any) -> Picture:
    """Call `draw` with the other arguments, return its figure as an image, and print what the figure lacks.

    Raises UsageError if there is nothing to draw.
    """
    with look():
        drawn = draw(*args, **kw)
        notes: list[str] = []
        if isinstance(drawn, Drawing):
            notes, figure = drawn.notes, drawn.figure
        elif isinstance(drawn, tuple):
            figure, notes = drawn
        else:
            figure = drawn
        if figure is None:
            raise UsageError(" ".join(notes) or "there is nothing to draw.")
        for note in notes:
            print(note)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
    return Picture(png.getvalue())
