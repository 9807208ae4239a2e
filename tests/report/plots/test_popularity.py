"""The picture of which V rows each step of a generated text keeps."""

from pathlib import Path

import numpy as np
import pytest

from toptheta.report.plots.popularity import popularity_figure, split_generations
from toptheta.report.plots.read import read_popularities
from toptheta.util.errors import UsageError
from toptheta.util.files import write_text

DECODE = "generative_decoding"


def write_popularity(folder: Path, lengths: list[int], plain: bool = False) -> Path:
    """Steps of these lengths: in group 0 nobody keeps anything, in group 1 two heads keep every other row."""
    lines = []
    for n in lengths:
        for group, counts in ((0, [0] * n), (1, [2 * (i % 2) for i in range(n)])):
            lines.append(f"5,{group},{n},{counts}\n")
    name = f"layer5_kept_vrow_popularities_{DECODE}.txt"
    folder.mkdir(exist_ok=True)
    write_text(folder / (name if plain else f"{name}.gz"), "".join(lines))
    return folder


@pytest.mark.parametrize("plain", [False, True])
def test_popularity_shows_one_text(tmp_path: Path, plain: bool) -> None:
    folder = write_popularity(tmp_path, [8, 9, 10, 5, 6, 7, 8], plain)
    groups = read_popularities(folder, 5, DECODE)
    assert groups is not None and [len(step) for step in groups[1]] == [8, 9, 10, 5, 6, 7, 8]
    assert [len(text) for text in split_generations(groups[1])] == [3, 4]
    figure = popularity_figure(folder, 5, 1, generation=1)
    top, axes = figure.axes[:2]
    grid = axes.images[0].get_array()
    assert grid.shape == (4, 8)
    np.testing.assert_array_equal(grid[0].filled(-1), [0, 2, 0, 2, 0, -1, -1, -1])  # later tokens: not yet
    (bars,) = (patch for patch in top.patches if hasattr(patch, "get_data"))
    np.testing.assert_array_equal(bars.get_data()[0], [0, 100, 0, 100, 0, 100, 0, 100])


def test_what_popularity_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"layer5_kept_vrow_popularities_{DECODE}.*--vrow_popularity"):
        popularity_figure(tmp_path, 5, 0)
    folder = write_popularity(tmp_path / "run", [8, 9, 10])
    with pytest.raises(UsageError, match="no group 2: choose from 0, 1"):
        popularity_figure(folder, 5, 2)
    with pytest.raises(UsageError, match="no generation 1: choose from 0 to 0"):
        popularity_figure(folder, 5, 0, 1)
    with pytest.raises(UsageError, match="mixes the steps of several texts.*--batch_size 1"):
        popularity_figure(write_popularity(tmp_path / "batch", [8, 20, 9, 21, 10, 22]), 5, 0)
    for damaged in ("5,0,3,[1, 2]\n", "5,0,3,[1, 2, 3\n", "4,0,1,[1]\n", "5,0,2,[1, .]\n"):
        write_text(folder / f"layer5_kept_vrow_popularities_{DECODE}.txt", "5,0,2,[1, 0]\n" + damaged)
        with pytest.raises(UsageError, match=r"\.txt, line 2: "):
            popularity_figure(folder, 5, 0)
