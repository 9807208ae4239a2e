"""The table of methods in docs/methods.md."""

from pathlib import Path

from toptheta.methods.base import names
from toptheta.report.methods import methods_table

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_it() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    shown = text.partition("<!-- methods -->\n")[2].partition("<!-- end methods -->")[0]
    table = methods_table()
    assert shown == table + "\n", "copy what `python -m toptheta.report.methods` prints into docs/methods.md"
    rows = table.splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == names()
    assert all(cell.strip() for row in rows for cell in row.strip("|").split("|"))
