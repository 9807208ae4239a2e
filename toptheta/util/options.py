"""Settings that are declared once, as a dataclass field with help, choices and rule; the flag, reading from a
command line or JSON, and the check are derived from it.

The field's type says how text is read: int, float, str; bool is a switch; tuple[int, ...] a comma-separated
list; dict[int, int] pairs such as 0:512,1:512. Rules that involve several fields are their owner's.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from toptheta.util.errors import UsageError

AnyOptions = TypeVar("AnyOptions")
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}  # for errors
LIMIT = 1 << 32  # of every number, below the limits of 64-bit types and random generators


@dataclass(frozen=True)
class Option:
    """What a field declares in addition to its type and default.

    help, metavar, group: of its flag. choices: the allowed values. hint: whether the error for a wrong value
    suggests the closest ones. rule: a test of a value, and what to do if it fails ("give at least 1"); a
    default of None passes. parse: reads the flag's text, if the type does not determine it. answers: whether
    it can change an answer. serves: the data sets that it affects; empty: all. earlier: the behaviour of runs
    saved before the option existed, if that is not its default.
    """

    help: str
    metavar: str | None = None
    group: str = ""
    choices: tuple[str, ...] = ()
    hint: bool = False
    rule: tuple[Callable[[Any], bool], str] | None = None
    parse: Callable[[str], Any] | None = None
    answers: bool = True
    serves: tuple[str, ...] = ()
    earlier: Any = ...


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with these properties, see `Option`."""
    metadata = {"option": Option(help, **more)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    """The rule for a number with a minimum."""
    return lambda value: value >= least, f"give at least {least}"


def options_of(kind: Any) -> Iterator[tuple[str, Option, Any]]:
    """Name, `Option` and default of every option of a dataclass or an instance of one."""
    for f in fields(kind):
        if "option" in f.metadata:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            yield f.name, f.metadata["option"], default


def add_flags(parser: argparse.ArgumentParser, kind: type) -> dict[str, Any]:
    """Add a flag for every option of a dataclass; returns the groups by title. A bool that is True by default
    gets a flag --no_NAME. A flag that is not given has the value None, so that given flags are known."""
    groups: dict[str, Any] = {"": parser}
    for name, facts, default in options_of(kind):
        if facts.group not in groups:
            groups[facts.group] = parser.add_argument_group(facts.group)
        add = groups[facts.group].add_argument
        if default is True:
            add(f"--no_{name}", dest=name, action="store_false", default=None, help=facts.help)
        elif default is False:
            add(f"--{name}", action="store_true", default=None, help=facts.help)
        else:
            add(f"--{name}", metavar=facts.metavar, help=facts.help)
    return groups


def from_flags(kind: type[AnyOptions], namespace: argparse.Namespace) -> AnyOptions:
    """The dataclass with the given flags, not checked. Raises UsageError for text that cannot be read."""
    hints, values = get_type_hints(kind), {}
    for name, facts, _ in options_of(kind):
        text = getattr(namespace, name, None)
        if isinstance(text, str):
            values[name] = facts.parse(text) if facts.parse else _read(f"--{name}", text, hints[name])
        elif text is not None:
            values[name] = text
    return kind(**values)


def to_flags(values: Any) -> list[str]:
    """The flags that produce an instance of a dataclass of options, without defaults. Lists are joined by
    commas, which `parse` must accept as separators."""
    flags = []
    for name, _, default in options_of(values):
        value = getattr(values, name)
        if value == default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, dict):
            flags += [f"--{name}", ",".join(f"{key}:{one}" for key, one in value.items())]
        elif isinstance(value, tuple):
            flags += [f"--{name}", ",".join(map(str, value))]
        elif isinstance(value, str) and value.startswith("-"):  # else it would be read as a flag
            flags.append(f"--{name}={value}")
        elif value is not None:
            whole = isinstance(value, float) and value.is_integer()
            flags += [f"--{name}", str(int(value) if whole else value)]
    return flags


def from_json(kind: type[AnyOptions], saved: Any) -> AnyOptions:
    """The dataclass from the output of `dataclasses.asdict`, not checked; missing fields have their default,
    or `earlier`. Raises ValueError, naming the field, for an unknown field or a value of another type."""
    if not isinstance(saved, Mapping):
        raise ValueError("its settings are not a JSON object")
    hints = get_type_hints(kind)
    known = {name: facts for name, facts, _ in options_of(kind)}
    for name in saved:
        if name not in known:
            raise ValueError(f"there is no setting {name!r}")
    try:
        values = {
            name: facts.earlier
            for name, facts in known.items()
            if name not in saved and facts.earlier is not ...
        }
        for name, value in saved.items():
            values[name] = _typed(value, hints[name])
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"its {name} is {value!r}") from None
    return kind(**values)


def check_options(values: Any, flag: Callable[[str], str] = str) -> None:
    """Raise UsageError for a value that is not one of the choices, is of another type or violates its rule.
    flag: turns a field's name into what the user typed."""
    hints = get_type_hints(type(values))
    for name, facts, default in options_of(values):
        value = getattr(values, name)
        if facts.choices and value not in facts.choices:
            near = get_close_matches(str(value), facts.choices, n=2, cutoff=0.4) if facts.hint else []
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise UsageError(f"{flag(name)} is {value!r}: choose one of {', '.join(facts.choices)}{hint}.")
        check_type(flag(name), value, hints[name], facts.rule[1] if facts.rule else "")
        optional = default is None and value is None
        if facts.rule and not optional and not facts.rule[0](value):
            raise UsageError(f"{flag(name)} is {value!r}: {facts.rule[1]}.")


def check_type(name: str, value: Any, hint: Any, advice: str = "") -> None:
    """Raise UsageError, naming `name`, unless a value is of a field's type and its numbers are below LIMIT: a
    whole number also passes for float, but no bool passes for a number. advice: what to give instead."""
    try:
        _typed(value, hint)
    except (TypeError, ValueError, OverflowError):
        advice = advice or f"give {WORDS.get(_without_none(hint), f'a value of type {hint}')}"
        raise UsageError(f"{name} is {value!r}: {advice}.") from None
    for number in _numbers(value):
        if not abs(number) < LIMIT:
            raise UsageError(f"{name} is {number}: give a finite number below 2^32.")


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy or torch as Python's own, also in a list or mapping; others as they are."""
    if isinstance(value, Mapping):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(one) for one in value)
    return value.tolist() if hasattr(value, "tolist") else value


def _numbers(value: Any) -> list[int | float]:
    """The numbers of a value."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return [
        one
        for one in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(one, (int, float))
    ]


def _read(flag: str, text: str, hint: Any) -> Any:
    """A flag's text as a value of a type. Raises UsageError."""
    hint = _without_none(hint)
    if get_origin(hint) is tuple:
        return tuple(_read(flag, part.strip(), get_args(hint)[0]) for part in text.split(","))
    if get_origin(hint) is dict:
        pairs = {}
        for part in filter(None, (p.strip() for p in text.strip("{} ").split(","))):
            key, colon, value = part.partition(":")
            if not colon:
                raise UsageError(f"{flag} is {text!r}: give layer:K pairs, e.g. 0:512,1:512.")
            read = _read(flag, key, get_args(hint)[0])
            if read in pairs:
                raise UsageError(f"{flag} is {text!r}, which names {read} twice: give it once.")
            pairs[read] = _read(flag, value, get_args(hint)[1])
        return pairs
    try:
        return hint(text)
    except ValueError:
        raise UsageError(f"{flag} is {text!r}: give {WORDS[hint]}.") from None


def _typed(value: Any, hint: Any) -> Any:
    """A value, as JSON has it, as one of a type. Raises TypeError, ValueError or OverflowError."""
    if value is None and NoneType in get_args(hint):
        return None
    hint = _without_none(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return tuple(_typed(one, get_args(hint)[0]) for one in value)
    if get_origin(hint) is dict:  # JSON has text for its keys
        key_type, value_type = get_args(hint)
        return {key_type(key): _typed(one, value_type) for key, one in dict(value).items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _without_none(hint: Any) -> Any:
    """X of X | None; another type as it is."""
    if get_origin(hint) in (Union, UnionType):
        return next(one for one in get_args(hint) if one is not NoneType)
    return hint
