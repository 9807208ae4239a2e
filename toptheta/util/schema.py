"""Strict reading of JSON files: every value has the expected type and is finite, and no key occurs twice.

Types are msgspec annotations: dataclasses, TypedDicts, `Count` and so on. A TypedDict checks its own keys and
allows others.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, TypeVar

from msgspec import Meta, ValidationError, convert

from toptheta.util.errors import UsageError

Count = Annotated[int, Meta(ge=0, lt=1 << 53)]  # beyond, a float would no longer hold it
Share = Annotated[
    float, Meta(ge=0)
]  # above 1 where a method keeps more than dense attention, for its own sake
Seconds = Annotated[float, Meta(ge=0)]
T = TypeVar("T")


def parse_json(data: bytes | str, finite: bool = True) -> Any:
    """The value of a JSON text. Raises ValueError, with the reason, for invalid JSON, for a key that occurs
    twice in an object, and, if `finite`, for numbers that are not finite."""
    hooks: dict[str, Any] = {"parse_constant": _not_finite, "parse_float": _finite} if finite else {}
    try:
        text = data.decode() if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_object, **hooks)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def typed(value: Any, kind: type[T]) -> T:
    """A parsed value, converted to a type. Raises ValueError with the reason and the location, e.g.
    $.name[0]."""
    try:
        return convert(value, kind, str_keys=True)
    except ValidationError as error:
        raise ValueError(str(error).replace("`", "")) from None


def read_json(path: Path, kind: Any, remedy: str) -> Any:
    """The content of a JSON file, converted to a type. remedy: what the user should do about a damaged file.
    Raises UsageError, and OSError for a file that cannot be read."""
    try:
        return typed(parse_json(path.read_bytes()), kind)
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): {remedy}.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} occurs twice")
    return value


def _not_finite(text: str) -> Any:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _not_finite(text)
