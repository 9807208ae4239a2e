"""The notebooks run as they are, and on folders of the published project; figures tell what they lack."""

import base64
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError

from notebooks.execute import execute as execute_book
from tests.helpers.paths import ROOT
from tests.report.plots.test_scripts import make_products
from toptheta.calibration.kept_samples import write_calibration_samples
from toptheta.report.plots.kept import draw_size_by_length
from toptheta.report.plots.notebook import open_folder, show
from toptheta.report.plots.perplexity import draw_perplexity, perplexity_figure
from toptheta.report.plots.popularity import popularity_figure, split_generations
from toptheta.report.plots.read import read_popularities, read_results_by_task, read_task_results
from toptheta.report.plots.samples import samples_figure
from toptheta.util.errors import UsageError
from toptheta.util.files import write_text

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 150_000  # of a picture
DECODE = "generative_decoding"


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the notebooks and what they open, as beside the repository's code."""
    (tmp_path / "toptheta").symlink_to(ROOT / "toptheta")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for folder in ("examples", "tables"):
        shutil.copytree(ROOT / "products" / folder, tmp_path / "products" / folder)
    return tmp_path


def execute(workplace: Path, name: str) -> list[bytes]:
    """Run a notebook of the workplace; returns its pictures."""
    book = nbformat.read(workplace / "notebooks" / name, as_version=4)
    execute_book(book, workplace / "notebooks")
    return pictures(book)


def pictures(book: Any) -> list[bytes]:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return [base64.b64decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def test_there_are_six() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list("123456")


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
def test_a_notebook_runs_and_shows_pictures(workplace: Path, name: str) -> None:
    committed = pictures(nbformat.read(ROOT / "notebooks" / name, as_version=4))
    fresh = execute(workplace, name)
    assert fresh and len(committed) == len(fresh)  # what readers on the web see is all there
    assert all(png.startswith(b"\x89PNG") and len(png) < MOST_BYTES for png in [*committed, *fresh])


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS[:3]])
def test_folders_of_the_published_project_open(workplace: Path, name: str) -> None:
    """They hold plain files and no JSON."""
    for path in (workplace / "products" / "examples").rglob("*.*"):
        if path.suffix == ".gz":
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        if path.suffix in (".gz", ".json"):
            path.unlink()
    assert execute(workplace, name)


def test_a_missing_file_is_one_sentence_in_a_notebook(workplace: Path) -> None:
    for path in (workplace / "products" / "examples" / "questions").glob("th.txt*"):
        path.unlink()
    with pytest.raises(CellExecutionError) as error:
        execute(workplace, NOTEBOOKS[1].name)
    assert error.value.traceback.strip().splitlines()[-1].startswith("th.txt is missing or empty in ")
    assert "File " not in error.value.traceback and "Traceback" not in error.value.traceback


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
    (folder / "th.txt.gz").unlink()
    with pytest.raises(UsageError, match=r"th\.txt is missing"):
        samples_figure(folder, [(3, 0)], [(70, 90)])


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


def perplexity_result(method: str, mode: int, ppl: list[float], stderr: float | None = 0.1) -> dict[str, Any]:
    rows = [{"length": 64 * 2**i, "ppl": value, "stderr": stderr} for i, value in enumerate(ppl)]
    return {"method": method, "mode": mode, "by_length": rows}


def test_perplexity_has_a_line_per_method(tmp_path: Path) -> None:
    results = [perplexity_result("Top-k K=64", 1, [30, 22]), perplexity_result("dense", 3, [30, 20], None)]
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
    for others in ([], [{"method": "a"}], [*results, perplexity_result("x", 0, [1])]):
        with pytest.raises(UsageError, match="perplexity"):
            perplexity_figure(others, "t")


def test_results_come_by_task(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(UsageError, match=r"results\.json is missing"):
        read_results_by_task(path)
    path.write_text(json.dumps([{"method": m, "task": t} for m, t in (("a", "x"), ("b", "y"), ("c", "x"))]))
    assert [r["method"] for r in read_task_results(path, "x")] == ["a", "c"]
    with pytest.raises(UsageError, match="no results of z, but of x, y"):
        read_task_results(path, "z")
    for content in ("[]", "{}", "[1]", "[{}]", "nothing"):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"results\.json"):
            read_results_by_task(path)


def test_show_says_what_a_figure_lacks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_products(tmp_path / "run", decode=False)
    (folder / "layer4.txt").unlink()
    picture = show(draw_size_by_length, open_folder(folder, layer_ids=[4, 0]))
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("layer4.txt is missing or empty")
    with pytest.raises(UsageError, match=r"layer4\.txt is missing or empty"):
        show(draw_size_by_length, open_folder(folder, layer_ids=[4]))
    with pytest.raises(UsageError, match="none is no folder"):
        open_folder(tmp_path / "none")
