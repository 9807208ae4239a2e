"""Options: one declaration gives the flag, its reading, JSON and the check."""

import argparse
import json
from dataclasses import asdict, dataclass

import pytest

from toptheta.util.errors import UsageError
from toptheta.util.options import add_flags, at_least, check_options, from_flags, from_json, option, to_flags


@dataclass(frozen=True)
class Colours:
    count: int = option(2, "how many", metavar="N", group="paint", rule=at_least(1))
    share: float = option(0.5, "of it", metavar="X", group="paint")
    limit: float | None = option(None, "at most", metavar="X", rule=at_least(0))
    name: str | None = option(None, "what", group="paint")
    kind: str = option("oil", "which", choices=("oil", "water"), hint=True)
    glossy: bool = option(False, "shines")
    dry: bool = option(True, "does not dry")
    sizes: tuple[int, ...] = option((1,), "sizes", metavar="N[,N]")
    layers: dict[int, int] = option({}, "coats of single layers")
    words: tuple[str, ...] = option((), "words", parse=lambda text: tuple(text.split("+")))


def read(flags: str) -> Colours:
    parser = argparse.ArgumentParser()
    add_flags(parser, Colours)
    return from_flags(Colours, parser.parse_args(flags.split()))


def test_flags_follow_the_types() -> None:
    assert read("") == Colours()
    given = read(
        "--count 3 --share 1 --limit 2 --name x --kind water --glossy --no_dry --sizes 4,5 "
        "--layers {0:7,1:8} --words a+b,c"
    )
    assert given == Colours(3, 1.0, 2.0, "x", "water", True, False, (4, 5), {0: 7, 1: 8}, ("a", "b,c"))
    assert type(given.share) is float and type(given.limit) is float


def test_flags_that_give_a_value() -> None:
    given = Colours(3, 1.0, 2.5, "x", "water", True, False, (4, 5), {0: 7, 1: 8})
    assert to_flags(Colours()) == [] and read(" ".join(to_flags(given))) == given
    assert to_flags(Colours(share=1.0)) == ["--share", "1"]
    assert to_flags(Colours(name="Chat-v1.0")) == ["--name", "Chat-v1.0"]
    assert read(" ".join(to_flags(Colours(name="-x")))).name == "-x"


def test_help_shows_groups_and_metavars() -> None:
    parser = argparse.ArgumentParser(prog="p")
    groups = add_flags(parser, Colours)
    text = parser.format_help()
    assert "\npaint:\n  --count N" in text and "--sizes N[,N]" in text and "--no_dry" in text
    assert "--dry" not in text and list(groups) == ["", "paint"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--count many", "--count is 'many': give a whole number."),
        ("--share x", "--share is 'x': give a number."),
        ("--sizes 1,x", "--sizes is 'x': give a whole number."),
        ("--layers 1=2", "--layers is '1=2': give layer:K pairs, e.g. 0:512,1:512."),
        ("--layers 1:x", "--layers is 'x': give a whole number."),
    ],
)
def test_text_that_cannot_be_read(flags: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        read(flags)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "--count is 0: give at least 1."),
        ({"count": "x"}, "--count is 'x': give at least 1."),
        ({"count": None}, "--count is None: give at least 1."),
        ({"limit": -1.0}, "--limit is -1.0: give at least 0."),
        ({"kind": "oik"}, "--kind is 'oik': choose one of oil, water (did you mean oil?)."),
        ({"kind": "gas?"}, "--kind is 'gas?': choose one of oil, water."),
    ],
)
def test_values_that_break_a_rule(values: dict, message: str) -> None:
    check_options(Colours())
    with pytest.raises(UsageError) as error:
        check_options(Colours(**values), lambda name: f"--{name}")
    assert str(error.value) == message


def test_json_round_trip() -> None:
    colours = Colours(3, 1.0, None, "x", "water", True, False, (4, 5), {0: 7, 1: 8}, ("a",))
    assert from_json(Colours, json.loads(json.dumps(asdict(colours)))) == colours
    assert from_json(Colours, {}) == Colours()
    assert type(from_json(Colours, {"share": 1}).share) is float


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"colour": 1}, "there is no setting 'colour'"),
        ({"count": 1.5}, "its count is 1.5"),
        ({"count": True}, "its count is True"),
        ({"count": None}, "its count is None"),
        ({"sizes": 3}, "its sizes is 3"),
        ({"sizes": ["a"]}, "its sizes is"),
        ({"layers": [1]}, "its layers is"),
        ({"layers": {"a": 1}}, "its layers is"),
        ([], "not a JSON object"),
    ],
)
def test_json_of_something_else(saved: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(Colours, saved)
