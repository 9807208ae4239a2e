"""Labels of points, each placed near its own point such that it covers as little as possible."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

_ANGLES = np.deg2rad([30, -30, 150, -150, 90, -90, 0, 180, 60, -60, 120, -120])
_DISTANCES = (6.0, 11.0, 17.0)  # points, from the centre of the marker to the edge of the text
_MARKER = 4.5  # points, half a marker
_UNREADABLE = 200.0  # the cost of covering another label: then there is none


@dataclass(frozen=True)
class Label:
    """A text and the coordinates of its point, in data units."""

    x: float
    y: float
    text: str
    colour: Any


def place_labels(figure: Figure, axes: Axes, labels: Sequence[Label]) -> None:
    """Write each label next to its point, except where it would cover another one. Call it last, when layout,
    limits and lines are final."""
    if not labels:
        return
    figure.draw_without_rendering()
    pixels = figure.dpi / 72.0
    points = axes.transData.transform([(label.x, label.y) for label in labels])
    obstacles = _along_lines(axes)
    placed: list[tuple[np.ndarray, np.ndarray]] = []
    for label, point in zip(labels, points):
        note = axes.annotate(
            label.text,
            (label.x, label.y),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=label.colour,
            parse_math=False,
        )
        note.set_in_layout(False)
        extent = note.get_window_extent()
        half = np.array([extent.width, extent.height]) / 2
        best_cost, best = np.inf, point
        for distance in _DISTANCES:
            for angle in _ANGLES:
                way = np.array([np.cos(angle), np.sin(angle)])
                centre = point + way * distance * pixels + np.sign(way.round(6)) * half
                cost = distance + _cost(
                    axes, centre, half, point, points, obstacles, placed, _MARKER * pixels
                )
                if cost < best_cost:
                    best_cost, best = cost, centre
        if best_cost >= _UNREADABLE:
            note.remove()
            continue
        note.set_position(tuple((best - point) / pixels))
        placed.append((best, half))


def _cost(
    axes: Axes,
    centre: np.ndarray,
    half: np.ndarray,
    own: np.ndarray,
    points: np.ndarray,
    obstacles: np.ndarray,
    placed: Sequence[tuple[np.ndarray, np.ndarray]],
    marker: float,
) -> float:
    """The cost of a position: what the label covers, whether it is nearer to another point, and whether it
    leaves the axes."""
    cost = 3.0 * (np.abs(obstacles - centre) < half + 1).all(axis=1).sum() if len(obstacles) else 0.0
    cost += 60.0 * (np.abs(points - centre) < half + marker).all(axis=1).sum()
    cost += _UNREADABLE * sum(
        (np.abs(other - centre) < half + other_half + 1).all() for other, other_half in placed
    )
    gaps = np.linalg.norm(np.maximum(np.abs(points - centre) - half, 0), axis=1)
    own_gap = np.linalg.norm(np.maximum(np.abs(own - centre) - half, 0))
    cost += 15.0 * (gaps < own_gap - 0.5).sum()
    inside = axes.bbox.contains(*(centre - half)) and axes.bbox.contains(*(centre + half))
    return float(cost + (0.0 if inside else 500.0))


def _along_lines(axes: Axes) -> np.ndarray:
    """Points every few pixels along the lines and error bars of the axes, `[points, 2]` in pixels."""
    paths = [
        axes.transData.transform(segment)
        for bars in axes.collections
        if isinstance(bars, LineCollection)
        for segment in bars.get_segments()
    ]
    steps = [np.empty((0, 2))]
    for line in axes.get_lines():
        corners = line.get_transform().transform(line.get_xydata())
        steps.append(corners)
        if line.get_linestyle() != "None":  # the caps of error bars are lines with markers only
            paths.append(corners)
    for corners in paths:
        for start, end in pairwise(corners):
            steps.append(np.linspace(start, end, max(2, int(np.hypot(*(end - start)) / 4))))
    return np.concatenate(steps)
