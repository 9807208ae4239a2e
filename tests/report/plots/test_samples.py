"""Histograms of calibration samples."""

from pathlib import Path

import numpy as np
import pytest

from toptheta.calibration.kept_samples import write_calibration_samples
from toptheta.report.plots.samples import samples_figure
from toptheta.util.errors import UsageError
from toptheta.util.files import write_text


def write_samples(folder: Path, values: np.ndarray, n: np.ndarray, theta: float = 0.5) -> Path:
    folder.mkdir(exist_ok=True)
    write_calibration_samples(folder, {3: (n, values)})
    lines = [f"L3_H{head}:{length} {theta + head} 4 64\n" for head in (0, 1) for length in np.unique(n)]
    write_text(folder / "th.txt.gz", "".join(lines))
    return folder


def test_histograms_hold_every_sample_of_their_lengths(tmp_path: Path) -> None:
    """Wild samples fall into the outermost bins; the line is at the threshold."""
    rng = np.random.default_rng(0)
    n = np.repeat(np.arange(100, 200, dtype=np.int32), 5)
    values = rng.normal([0.5, 1.5], 0.1, (500, 2)).astype(np.float32)
    values[7, 1] = 1e6
    figure = samples_figure(write_samples(tmp_path, values, n), [(3, 1)], [(100, 149), (150, 400)])
    left, right = figure.axes
    for axes, inside in ((left, n < 150), (right, n >= 150)):
        (bars,) = (patch for patch in axes.patches if hasattr(patch, "get_data"))
        counts, edges, _ = bars.get_data()
        assert counts.sum() == inside.sum()
        typical = values[inside & (values[:, 1] < 2), 1]
        middle = (edges[:-1] + edges[1:]) / 2
        assert np.average(middle, weights=counts) == pytest.approx(typical.mean(), abs=0.02)
        assert [line.get_xdata()[0] for line in axes.get_lines()] == [1.5]
    assert left.get_title() == "layer 3, head 1, rows of 100 to 149 tokens"


def test_equal_samples_have_a_histogram(tmp_path: Path) -> None:
    folder = write_samples(tmp_path, np.ones((3, 2), np.float32), np.array([70, 80, 90], np.int32))
    (axes,) = samples_figure(folder, [(3, 0)], [(70, 90)]).axes
    (bars,) = (patch for patch in axes.patches if hasattr(patch, "get_data"))
    assert bars.get_data()[0].sum() == 3


def test_what_samples_lack_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"calib_samples\.safetensors.*--calib_dump_samples"):
        samples_figure(tmp_path, [(3, 0)], [(1, 2)])
    folder = write_samples(tmp_path / "run", np.ones((3, 2), np.float32), np.array([70, 80, 90], np.int32))
    for heads, lengths, words in (
        ([(0, 0)], [(70, 90)], "no layer 0: choose from 3"),
        ([(3, 2)], [(70, 90)], "no head 2: choose from 0 to 1"),
        ([(3, 0)], [(91, 99)], "rows of 91 to 99 tokens: choose lengths from 70 to 90"),
    ):
        with pytest.raises(UsageError, match=words):
            samples_figure(folder, heads, lengths)
    with pytest.raises(UsageError, match=r"^there are no heads to draw: give pairs"):
        samples_figure(folder, [], [(70, 90)])
    with pytest.raises(UsageError, match=r"^there are no lengths to draw: give pairs"):
        samples_figure(folder, [(3, 0)], [])
    (folder / "th.txt.gz").unlink()
    with pytest.raises(UsageError, match=r"th\.txt is missing"):
        samples_figure(folder, [(3, 0)], [(70, 90)])
