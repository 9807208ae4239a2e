"""The picture of effective K, and its table where it is empty or damaged."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.effective_k import histogram_of, rows_of_csv
from toptheta.eval.cell import Cell
from toptheta.models.recorder import LayerRecord
from toptheta.report.plots import read
from toptheta.report.plots.flags import check_request, plot_parser
from toptheta.report.plots.report import draw_report
from toptheta.report.plots.thresholds import FIGURES, INPUTS
from toptheta.report.results import CellResult
from toptheta.util.errors import UsageError


def finished_cell(folder: Path, layers: int = 3, top: int = 900) -> Path:
    """A finished cell's folder, as Cell writes it, of rows of up to `top` tokens that keep about 64."""
    rng = np.random.default_rng(0)
    cell = Cell(folder, (64,) * layers, effective_k=True)
    n = rng.integers(65, top, size=3000)
    records = {
        layer: LayerRecord(
            *[np.ones((1, 1), int)] * 2,
            *[np.ones(1, int)] * 3,
            histogram=histogram_of(np.minimum(n, 64 + rng.integers(-40, 90, size=len(n))), n),
        )
        for layer in range(layers)
    }
    cell.add({"answer": 1}, records, {})
    cell.finish(CellResult("Top-theta K=64"), [])
    config = {"num_layers": layers, "num_heads": 1, "model": "Tiny", "method": "Top-theta K=64"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plot(folder: Path, capsys: pytest.CaptureFixture, *flags: str) -> tuple[str, str]:
    """What plot_th_llama.py prints, with exit code 0: standard output and errors."""
    arguments = plot_parser("").parse_args(["-d", str(folder), "-t", "t", *flags])
    assert draw_report(check_request(arguments), FIGURES, INPUTS) == 0
    return capsys.readouterr()


def test_the_picture_is_drawn_and_the_table_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = finished_cell(tmp_path / "cell")
    frame = read.read_effective_k(folder)
    assert frame is not None and frame.to_dict("records") == rows_of_csv(folder)
    out, err = plot(folder, capsys, "--format", "svg", "--layer-ids", "0,2")
    assert str(folder / "effective_k.svg") in out.splitlines() and "effective_k" not in err
    svg = (folder / "effective_k.svg").read_text()
    assert "layer 0, K = 64" in svg and "layer 2, K = 64" in svg and "layer 1, K" not in svg
    assert "by layer, all row lengths" in svg

    (folder / "results.json").unlink()
    _, err = plot(folder, capsys)
    assert (folder / "effective_k.png").is_file() and "results.json is missing or empty" in err


def test_a_table_that_is_empty_or_damaged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = finished_cell(tmp_path / "cell")
    (folder / "sequence_lengths_per_example.csv").write_text("900\n")
    text = (folder / "effective_k.csv").read_text()
    lines = text.splitlines(keepends=True)
    (folder / "effective_k.csv").write_text(lines[0])
    assert read.read_effective_k(folder) is None
    _, err = plot(folder, capsys)
    assert "effective_k.csv is missing or empty" in err and "writes it with --effective_k" in err
    assert not (folder / "effective_k.png").exists()
    lines[3] = "0,warmup,91,107,64,5,66.0,31.0,65.0,113.0\n"
    (folder / "effective_k.csv").write_text("".join(lines))
    with pytest.raises(UsageError, match=r"effective_k\.csv, line 4: '0,warmup"):
        read.read_effective_k(folder)
