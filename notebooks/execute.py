#!/usr/bin/env python3
"""Execute notebooks in place, pictures included: all (`make notebooks`), or those that are named."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def execute(book: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in `folder`, in place of the outputs that were there. Raises CellExecutionError."""
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.metadata.pop("execution", None)
    resources = {"metadata": {"path": str(folder)}}
    # Times of execution would change the file each time.
    NotebookClient(book, timeout=300, record_timing=False, resources=resources).execute()
    book.metadata.pop("language_info", None)


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        execute(book, path.resolve().parent)
        nbformat.write(book, path)
        print(path)


if __name__ == "__main__":
    main()
