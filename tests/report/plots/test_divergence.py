"""The picture of KL by KV bytes: what is drawn, and what is not."""

from pathlib import Path

import numpy as np
import pytest

from toptheta.report.plots.divergence import V_ROWS, divergence_figure, draw_divergence
from toptheta.report.results import DECODE, CellResult, Kept, Metric
from toptheta.util.errors import UsageError


def cell(method: str, k: int | None, kl: float, read: float | None, dense: bool = False) -> CellResult:
    kv_bytes = {"prefill": None, DECODE: read}
    kept = {"prefill": None, DECODE: None if read is None else Kept(0.01, round(2 * read - 1, 2))}
    metrics = {"kl": Metric(kl, 0.1 * kl, 3)}
    return CellResult(method, k=k, dense=dense, metrics=metrics, kv_bytes=kv_bytes, kept=kept)


CELLS = [
    cell("dense", None, 0.0, 1.0, dense=True),
    cell("dense bfloat16", None, 0.001, 1.0, dense=True),
    cell("Top-k K=64", 64, 0.01, 0.6),
    cell("Top-k K=16", 16, 0.2, 0.52),
    cell("Top-p p=0.5", None, 0.3, 0.52),
    cell("Top-p p=0.9", None, 0.02, 0.7),
    cell("uncounted K=64", 64, 0.5, None),
]


def test_lines_points_and_floors(tmp_path: Path) -> None:
    """A line for each method through its budgets in order; what is closer than dense of another type is
    grey; what has no KV bytes, or no KL, has no place."""
    figure = divergence_figure({"novel": CELLS, "code": CELLS[2:4]}, "a title")
    novel, code = figure.axes
    assert (novel.get_title(), code.get_title()) == ("novel", "code")
    points = [container[0].get_xydata() for container in novel.containers]
    assert np.allclose(points, [[[52, 0.2], [60, 0.01]], [[52, 0.3], [70, 0.02]]])
    bars = novel.containers[0][2][0].get_segments()
    assert np.allclose(bars[0], [[52, 0.18], [52, 0.22]])
    band = novel.patches[0].get_extents().transformed(novel.transData.inverted())
    assert np.allclose([band.y0, band.y1], [novel.get_ylim()[0], 0.001]) and not code.patches
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:2] == ["Top-k", "Top-p"]
    assert names[2:] == [
        "closer than dense attention in another type",
        "50 %: all of K, which scoring every key needs",
    ]
    draw_divergence({"novel": CELLS}, tmp_path / "kl.png", "a title")
    assert (tmp_path / "kl.png").stat().st_size > 10_000
    with pytest.raises(UsageError, match="nothing to draw"):
        draw_divergence({"novel": [CELLS[0], CELLS[-1]]}, tmp_path / "none.png", "a title")


def test_by_v_rows() -> None:
    """The same lines against the V rows; no line for what scoring every key needs."""
    (axes,) = (figure := divergence_figure({"novel": CELLS}, "a title", V_ROWS)).axes
    points = [container[0].get_xydata() for container in axes.containers]
    assert np.allclose(points, [[[4, 0.2], [20, 0.01]], [[4, 0.3], [40, 0.02]]])
    assert axes.get_xlabel() == "V rows that a decode step reads (% of dense attention)"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["Top-k", "Top-p", "closer than dense attention in another type"]
    with pytest.raises(UsageError, match="V rows of decode steps"):
        divergence_figure({"novel": CELLS[-1:]}, "a title", V_ROWS)


def test_floors_of_several_panels() -> None:
    """Each panel's is within the axis that they share, whichever comes first."""
    other = [cell("dense bfloat16", None, 1e-5, 1.0, dense=True), *CELLS[2:4]]
    for panels in ({"novel": CELLS, "code": other}, {"code": other, "novel": CELLS}):
        for axes in divergence_figure(panels, "a title").axes:
            low, high = axes.get_ylim()
            floor = {"novel": 0.001, "code": 1e-5}[axes.get_title()]
            band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
            assert low < floor < high and np.allclose([band.y0, band.y1], [low, floor])


def test_a_long_legend_lies_below_the_axes() -> None:
    lines = [cell(f"a method with a long name number {i} K=64", 64, 0.01 * (i + 1), 0.6) for i in range(28)]
    figure = divergence_figure({"novel": lines}, "a title")
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert legend.get_window_extent().y1 < axes.get_window_extent().y0
    assert axes.get_window_extent().height > 1.8 * figure.dpi


def test_labelled_rows_share_the_marker_of_their_method() -> None:
    """Rows of one method with labels: its marker, and a colour for each label that the panel explains."""
    rows = [cell(f"Top-theta: {n} prompts", None, 0.01 * n, 0.6) for n in (1, 2)]
    others = [cell(f"budget: {n} prompts", None, 0.001 * n, 0.6) for n in (1, 2)]
    figure = divergence_figure({"count": [*rows, *others, CELLS[2]], "text": [rows[0]]}, "a title")
    lines = {container.get_label(): container[0] for container in figure.axes[0].containers}
    drawn = [(line.get_marker(), line.get_color()) for line in lines.values()]
    assert len(drawn) == 5 and len({marker for marker, _ in drawn}) == 3
    assert drawn[0][0] == drawn[1][0] != drawn[2][0] and drawn[0][1] == drawn[2][1] != drawn[1][1]
    texts = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert texts == [["1 prompts", "2 prompts"], ["1 prompts"]]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:-1] == ["Top-theta", "budget", "Top-k"]


def test_every_panel_has_tick_labels() -> None:
    figure = divergence_figure(dict.fromkeys(("a", "b", "c"), CELLS[2:4]), "a title")
    figure.draw_without_rendering()
    shown = [any(label.get_visible() for label in axes.get_xticklabels()) for axes in figure.axes]
    assert shown == [True, True, True]
