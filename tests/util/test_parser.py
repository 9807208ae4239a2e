"""Flags that the parser of all commands refuses."""

import pytest

from toptheta.util.errors import UsageError
from toptheta.util.parser import StrictParser


def parser() -> StrictParser:
    made = StrictParser(prog="it")
    made.add_argument("runs", nargs="*", metavar="RUN")
    made.add_argument("-d", "--dir")
    made.add_argument("--vmc", action="store_true")
    made.add_argument("--prefix", metavar="TEXT")
    return made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-d", "a", "--dir=b"], "--dir is given 2 times"),
        (["--vmc", "--vmc", "--vmc"], "--vmc is given 3 times"),
        (["--dir", ""], "--dir is empty: give a value, or leave it out"),
        (["-d", " "], "--dir is empty"),
        (["a", ""], r"RUN is empty: give a value\."),
        (["--di", "a"], "Unrecognized arguments: --di"),
        (["--dir"], "expected one argument; it --help lists every flag"),
    ],
)
def test_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parser().parse_args(words)


def test_accepted() -> None:
    assert parser().parse_args(["--prefix", "", "a", "a", "--vmc"]).runs == ["a", "a"]
    assert parser().parse_args(["--vmc", "--", "--vmc", "--dir"]).runs == ["--vmc", "--dir"]
