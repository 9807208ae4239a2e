"""The figure of perplexity by length, a line per method."""

from pathlib import Path

import pytest

from toptheta.report.plots.perplexity import draw_perplexity, perplexity_figure
from toptheta.report.results import CellResult
from toptheta.util.errors import UsageError


def perplexity_result(method: str, dense: bool, ppl: list[float], stderr: float | None = 0.1) -> CellResult:
    rows = [{"length": 64 * 2**i, "ppl": value, "stderr": stderr} for i, value in enumerate(ppl)]
    return CellResult(method, dense=dense, extra={"by_length": rows})


def test_perplexity_has_a_line_per_method(tmp_path: Path) -> None:
    results = [
        perplexity_result("Top-k K=64", False, [30, 22]),
        perplexity_result("dense", True, [30, 20], None),
    ]
    figure = perplexity_figure(results, "t")
    axes, above = figure.axes
    lines = [line for line in axes.get_lines() if line.get_linestyle() == "-"]
    assert [list(line.get_ydata()) for line in lines] == [[30, 20], [30, 22]]
    assert [list(line.get_ydata()) for line in above.get_lines()] == [[0, 0], pytest.approx([0, 10])]
    assert len(perplexity_figure(results[:1], "t").axes) == 1  # nothing to compare with
    assert [line.get_color() for line in lines][0] == "black"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1 to\n64", "65 to\n128"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "Top-k K=64"]
    draw_perplexity(results, tmp_path / "p.png", "t")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    for others in ([], [CellResult("a")], [*results, perplexity_result("x", False, [1])]):
        with pytest.raises(UsageError, match="perplexities"):
            perplexity_figure(others, "t")
