"""Figures in a notebook say what they lack."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.helpers import LAYERS, make_products
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


def test_a_run_of_several_cells_is_no_cell(tmp_path: Path) -> None:
    for cell in ("mode0_k64", "mode3"):
        make_products(tmp_path / cell, decode=False)
    for layer_ids in (None, [0]):
        with pytest.raises(UsageError, match=r"of a run, .*: name one of its cells \(mode0_k64, mode3\)"):
            open_folder(tmp_path, layer_ids=layer_ids)
    assert open_folder(tmp_path / "mode3").num_layers == LAYERS
    (tmp_path / "mode3" / "config.json").unlink()  # as of the published project
    assert open_folder(tmp_path / "mode3").num_layers == LAYERS


@pytest.mark.parametrize("name", ["layer_ids", "head_ids"])
@pytest.mark.parametrize("ids", ["0", 0, [], [-1], [1.5], ["0"]], ids=str)
def test_wrong_ids(name: str, ids: Any, tmp_path: Path) -> None:
    folder = make_products(tmp_path / "run", decode=False)
    with pytest.raises(UsageError, match=rf"^{name} is .*: give {name}=\[0, 1, 15\]\.$"):
        open_folder(folder, **{name: ids})


def test_ids_that_do_not_exist(tmp_path: Path) -> None:
    folder = make_products(tmp_path / "run", decode=False)
    with pytest.raises(
        UsageError, match=r"^there is no layer 99: the run has 6 layers, choose from 0 to 5\.$"
    ):
        open_folder(folder, layer_ids=[0, 99])
    with pytest.raises(UsageError, match=r"^there is no head 9: the run has 9 heads, choose from 0 to 8\.$"):
        open_folder(folder, head_ids=np.arange(10))
