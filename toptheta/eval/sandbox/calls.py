"""Calls of a program's function from another process, with arguments and results passed as literals.

Each is one ASCII line, written like `repr` and read by `ast.literal_eval`, so that reading it executes no
code of the program. In addition to Python's literals there are the names inf and nan, and calls of the types
in BUILDERS.
"""

import ast
import builtins
import os
from collections.abc import Callable
from typing import Any

LINE_BYTES = 1 << 24  # maximum size of a result
NUMBERS = {"inf": float("inf"), "nan": float("nan"), "infj": complex(0, float("inf"))}
NUMBERS["nanj"] = complex(0, float("nan"))


class ProgramEnded(BaseException):
    """The program's process has ended, or sent something other than a literal."""


class CannotJudge(BaseException):
    """A test passes a value that is not a literal, such as a function or an object."""


def _decimal(text: str) -> Any:
    from decimal import Decimal  # here and below, because imports at the top delay every program

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
    """The literal of a value. loosely: accept subclasses, NumPy scalars, exact numbers and iterators, and
    write the literal of an equal value. Raises TypeError for a value without a literal."""
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
        raise TypeError(f"a value of type {kind.__name__} is not a literal")
    return _LITERALS[kind](value, loosely)


def _items(values: Any, loosely: bool) -> str:
    return "".join(f"{encode(one, loosely)}, " for one in values)


def _sorted_items(values: Any, loosely: bool) -> str:
    return "".join(sorted(f"{encode(one, loosely)}, " for one in values))


_LITERALS: dict[type, Callable[[Any, bool], str]] = {
    type(None): lambda value, _: "None",
    type(...): lambda value, _: "...",
    bool: lambda value, _: repr(value),
    int: lambda value, _: hex(value),  # Python limits the number of decimal digits
    float: lambda value, _: float.__repr__(value),
    complex: lambda value, _: complex.__repr__(value),
    str: lambda value, _: ascii(str.__str__(value)),
    bytes: lambda value, _: bytes.__repr__(value),
    tuple: lambda value, loosely: f"({_items(value, loosely)})",
    list: lambda value, loosely: f"[{_items(value, loosely)}]",
    # sorted: two equal sets go over their items in orders of their own
    set: lambda value, loosely: f"set([{_sorted_items(value, loosely)}])",
    frozenset: lambda value, loosely: f"frozenset([{_sorted_items(value, loosely)}])",
    dict: lambda value, loosely: (
        "{" + "".join(f"{encode(k, loosely)}: {encode(v, loosely)}, " for k, v in value.items()) + "}"
    ),
}


class _Beyond(ast.NodeTransformer):
    """Replaces the additional names and calls by their values."""

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.Constant(NUMBERS[node.id])

    def visit_Call(self, node: ast.Call) -> ast.Constant:
        assert isinstance(node.func, ast.Name)
        arguments = [ast.literal_eval(self.visit(one)) for one in node.args]
        return ast.Constant(BUILDERS[node.func.id](*arguments))


def decode(text: str) -> Any:
    """The value of a literal. Raises an Exception of any type if the text is not a literal."""
    return ast.literal_eval(_Beyond().visit(ast.parse(text.strip(), mode="eval").body))


def _send(fd: int, text: str) -> None:
    data = memoryview(text.encode("ascii") + b"\n")
    while data:
        data = data[os.write(fd, data) :]


class Candidate:
    """Calls the function of the program at the other end of `fd`.

    Arguments are copied, so that changes that the function makes to them are not visible here. Its exceptions
    are raised with their name and text, as subclasses of the builtin exception of that name. trouble: the
    reason why no further call is possible, or None."""

    def __init__(self, fd: int):
        self._fd, self._answers = fd, open(fd, "rb", closefd=False)
        self.trouble: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.trouble is not None:
            raise self.trouble
        try:
            call = encode((args, kwargs))
        except (TypeError, RecursionError) as error:
            self.trouble = CannotJudge(f"the test's arguments cannot be passed to the program: {error}")
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
        except BaseException:  # a hostile answer can cause any of them, also MemoryError and RecursionError
            self.trouble = ProgramEnded()
            raise self.trouble from None
        raise raised


def _exception(name: str, reason: str) -> Exception:
    base = getattr(builtins, name, None)
    if not (isinstance(base, type) and issubclass(base, Exception)) or issubclass(base, UnicodeError):
        base = Exception  # UnicodeError needs more than a text
    return type(name, (base,), {"__str__": lambda self: reason})(reason)


def serve(fd: int, function: Callable[..., Any], reason: Callable[[BaseException], str]) -> None:
    """Answer calls until the caller closes the connection. reason: returns the text of an exception."""
    pid = os.getpid()
    for line in open(fd, "rb", closefd=False):
        args, kwargs = decode(line.decode("ascii"))
        try:
            answer = encode((True, function(*args, **kwargs)), loosely=True)
        except Exception as error:
            answer = encode((False, type(error).__name__, reason(error)))
        if os.getpid() != pid:  # a forked copy of the program must not answer
            return
        _send(fd, answer)
