"""Figures in a notebook say what they lack."""

from pathlib import Path

import pytest

from tests.report.helpers import make_products
from toptheta.report.plots.kept import draw_size_by_length
from toptheta.report.plots.notebook import open_folder, show
from toptheta.util.errors import UsageError


def test_show_says_what_a_figure_lacks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_products(tmp_path / "run", decode=False)
    (folder / "layer4.txt").unlink()
    picture = show(draw_size_by_length, open_folder(folder, layer_ids=[4, 0]))
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("layer4.txt is missing or empty")
    with pytest.raises(UsageError, match=r"layer4\.txt is missing or empty"):
        show(draw_size_by_length, open_folder(folder, layer_ids=[4]))
    with pytest.raises(UsageError, match="none is not a folder"):
        open_folder(tmp_path / "none")
