"""Calls of a program's function from another process: arguments go and results come as literals.

A line each, ASCII, what `repr` writes and `ast.literal_eval` reads, so that reading one runs nothing of the
program's. Beyond Python's literals: the names inf and nan, and calls of the few types in BUILDERS.
"""

import ast
import builtins
import os
from collections.abc import Callable
from typing import Any

LINE_BYTES = 1 << 24  # of a result; more is no answer
NUMBERS = {"inf": float("inf"), "nan": float("nan"), "infj": complex(0, float("inf"))}
NUMBERS["nanj"] = complex(0, float("nan"))


class ProgramEnded(BaseException):
    """The program's process is gone, or does not keep to literals."""


class CannotJudge(BaseException):
    """A test hands over what is no literal: a function, an object."""


def _decimal(text: str) -> Any:
    from decimal import Decimal  # here and below: every program waits for the imports at the top

    return Decimal(text)


def _fraction(numerator: int, denominator: int) -> Any:
    from fractions import Fraction

    return Fraction(numerator, denominator)


BUILDERS: dict[str, Callable[..., Any]] = {
    "set": set,
    "frozenset": frozenset,
    "iter": iter,
    "Decimal": _decimal,
    "Fraction": _fraction,
}


def encode(value: Any, loosely: bool = False) -> str:
    """The literal of a value. loosely: of what equals it, for subclasses, NumPy's scalars, exact numbers and
    iterators. Raises TypeError for what has none."""
    kind = type(value)
    if loosely and kind not in _LITERALS:
        if kind.__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            return encode(value.item(), loosely)
        if kind.__module__ in ("decimal", "fractions") and kind.__name__ in BUILDERS:
            return repr(value)
        kind = next((base for base in _LITERALS if isinstance(value, base)), kind)
        if kind not in _LITERALS and hasattr(kind, "__iter__"):
            return f"iter({encode(list(value), loosely)})"
    if kind not in _LITERALS:
        raise TypeError(f"{kind.__name__} is no literal")
    return _LITERALS[kind](value, loosely)


def _items(values: Any, loosely: bool) -> str:
    return "".join(f"{encode(one, loosely)}, " for one in values)


_LITERALS: dict[type, Callable[[Any, bool], str]] = {
    type(None): lambda value, _: "None",
    type(...): lambda value, _: "...",
    bool: lambda value, _: repr(value),
    int: lambda value, _: hex(value),  # decimal digits have a limit
    float: lambda value, _: float.__repr__(value),
    complex: lambda value, _: complex.__repr__(value),
    str: lambda value, _: ascii(str.__str__(value)),
    bytes: lambda value, _: bytes.__repr__(value),
    tuple: lambda value, loosely: f"({_items(value, loosely)})",
    list: lambda value, loosely: f"[{_items(value, loosely)}]",
    set: lambda value, loosely: f"set([{_items(value, loosely)}])",
    frozenset: lambda value, loosely: f"frozenset([{_items(value, loosely)}])",
    dict: lambda value, loosely: (
        "{" + "".join(f"{encode(k, loosely)}: {encode(v, loosely)}, " for k, v in value.items()) + "}"
    ),
}


class _Beyond(ast.NodeTransformer):
    """Puts values in the place of the names and calls that are no literals to Python."""

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.Constant(NUMBERS[node.id])

    def visit_Call(self, node: ast.Call) -> ast.Constant:
        assert isinstance(node.func, ast.Name)
        arguments = [ast.literal_eval(self.visit(one)) for one in node.args]
        return ast.Constant(BUILDERS[node.func.id](*arguments))


def decode(text: str) -> Any:
    """The value of a literal. Raises any Exception for what is none."""
    return ast.literal_eval(_Beyond().visit(ast.parse(text.strip(), mode="eval").body))


def _send(fd: int, text: str) -> None:
    data = memoryview(text.encode("ascii") + b"\n")
    while data:
        data = data[os.write(fd, data) :]


class Candidate:
    """Stands for the function of the program at the other end of `fd`.

    What is passed is copied: what the function does to its arguments is not seen here. Its exceptions come
    back with their name and text, as subclasses of the builtin one of that name. trouble: why there is
    nothing more to ask."""

    def __init__(self, fd: int):
        self._fd, self._answers = fd, open(fd, "rb", closefd=False)
        self.trouble: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.trouble is not None:
            raise self.trouble
        try:
            call = encode((args, kwargs))
        except (TypeError, RecursionError) as error:
            self.trouble = CannotJudge(f"the test passes what is no literal ({error})")
            raise self.trouble from None
        try:
            _send(self._fd, call)
            line = self._answers.readline(LINE_BYTES)
            if not line.endswith(b"\n"):
                raise EOFError
            succeeded, *found = decode(line.decode("ascii"))
            if succeeded is True:
                (result,) = found
                return result
            raised = _exception(*found)
        except BaseException:  # whatever a hostile answer leads to; MemoryError and RecursionError too
            self.trouble = ProgramEnded()
            raise self.trouble from None
        raise raised


def _exception(name: str, reason: str) -> Exception:
    base = getattr(builtins, name, None)
    if not (isinstance(base, type) and issubclass(base, Exception)) or issubclass(base, UnicodeError):
        base = Exception  # UnicodeError is made of more than a text
    return type(name, (base,), {"__str__": lambda self: reason})(reason)


def serve(fd: int, function: Callable[..., Any], reason: Callable[[BaseException], str]) -> None:
    """Answer calls until the caller hangs up. reason: the text of an exception."""
    pid = os.getpid()
    for line in open(fd, "rb", closefd=False):
        args, kwargs = decode(line.decode("ascii"))
        try:
            answer = encode((True, function(*args, **kwargs)), loosely=True)
        except Exception as error:
            answer = encode((False, type(error).__name__, reason(error)))
        if os.getpid() != pid:  # a forked copy has no say
            return
        _send(fd, answer)
