"""The notebooks run as they are, and on folders of the published project."""

import base64
import gzip
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from notebooks.execute import execute as execute_book
from tests.helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 150_000  # of a picture


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


def test_there_are_seven() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list("1234567")


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
def test_a_notebook_runs_and_shows_pictures(workplace: Path, name: str) -> None:
    committed = pictures(nbformat.read(ROOT / "notebooks" / name, as_version=4))
    fresh = execute(workplace, name)
    assert fresh and len(committed) == len(fresh)  # what readers on the web see is all there
    assert all(png.startswith(b"\x89PNG") and len(png) < MOST_BYTES for png in [*committed, *fresh])


@pytest.mark.long
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
