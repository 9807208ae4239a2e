"""Calls between processes: what comes through, and that reading an answer runs nothing of the program's."""

import collections
import math
import os
import socket
import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from toptheta.eval.sandbox.calls import Candidate, CannotJudge, ProgramEnded, decode, encode, serve
from toptheta.eval.sandbox.run import Limits, ProgramWithTest, run_program

LIMITS = Limits(wall_s=30.0)


def ascii_id(value) -> str:
    return encode(value)[:30]


@pytest.mark.parametrize(
    "value",
    [
        None,
        ...,
        True,
        0,
        -(10**5000),  # more digits than Python writes in decimal
        0.1,
        -0.0,
        math.inf,
        -math.inf,
        1e-320,
        complex(math.inf, -2.5),
        "",
        "line\nquote'\"\\ \0 \ud800 \U0001f600 \x85\u2028",
        b"\0\xff\n",
        (),
        (1,),
        [],
        [[], [(), {}], {1: {2: [3]}}],
        set(),
        {1, "a", (2.5, None)},
        frozenset([frozenset([1])]),
        {None: {True: [math.inf]}, (1, 2): b""},
    ],
    ids=ascii_id,
)
def test_a_literal_comes_through_as_it_is(value):
    text = encode(value)
    assert text.isascii() and "\n" not in text
    back = decode(text)
    assert back == value and type(back) is type(value) and encode(back) == text


def test_nan_comes_through_too():
    assert math.isnan(decode(encode(math.nan))) and math.isnan(decode(encode([complex(1, math.nan)]))[0].imag)


class Text(str):
    def __repr__(self):
        return "5"


@pytest.mark.parametrize(
    "value, plain",
    [
        (Text("a"), "a"),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.namedtuple("Pair", "x y")(1, 2), (1, 2)),
        (np.float64(0.5), 0.5),
        (np.int32(7), 7),
        (np.bool_(True), True),
        (Decimal("0.10"), Decimal("0.10")),
        (Fraction(1, 3), Fraction(1, 3)),
        ([{np.int64(1): Text("b")}], [{1: "b"}]),
    ],
)
def test_what_equals_a_literal_goes_as_that_literal_where_asked(value, plain):
    assert decode(encode(value, loosely=True)) == plain == value
    with pytest.raises(TypeError, match="is not a literal"):
        encode(value)


@pytest.mark.parametrize("value", [range(3), map(abs, [0, -1, -2]), {0: 1, 1: 1, 2: 1}.keys(), np.arange(3)])
def test_an_iterator_is_not_the_list_that_it_gives(value):
    back = decode(encode(value, loosely=True))
    assert back != [0, 1, 2] and list(back) == [0, 1, 2]


@pytest.mark.parametrize("value", [len, object(), object, lambda: 0, os, NotImplemented, [print]])
def test_the_rest_has_no_literal(value):
    for loosely in (False, True):
        with pytest.raises(TypeError, match="is not a literal"):
            encode(value, loosely)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "open('x')",
        "(lambda: 5)()",
        "iter.__class__",
        "iter([1]).__class__",
        "set(*[[1]])",
        "set([x for x in (1,)])",
        "f'{5}'",
        "5 if True else 6",
        "(x := 5)",
        "1 + 1",
        "'a' * 5",
        "true",
        "iter",
        "Fraction(1, 0)",
        "Decimal('x')",
        "",
        "5; 6",
        "[" * 5000 + "]" * 5000,
        "-" * 100_000 + "5",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(
        (
            ValueError,
            TypeError,
            SyntaxError,
            KeyError,
            ArithmeticError,
            RecursionError,
            MemoryError,
            AssertionError,
        )
    ):
        decode(text)


@pytest.fixture
def served():
    """Makes a Candidate of a function, which is called at the other end of a socket."""
    ends = []

    def make(function):
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=serve, args=(theirs.fileno(), function, str))
        thread.start()
        ends.append((ours, theirs, thread))
        return Candidate(ours.fileno())

    yield make
    for ours, theirs, thread in ends:
        ours.close()
        thread.join()
        theirs.close()


def test_a_function_is_called_from_afar(served):
    candidate = served(lambda *args, **kwargs: (args, kwargs))
    assert candidate(1, [2], x="y") == ((1, [2]), {"x": "y"})
    assert candidate("x" * 3_000_000)[0] == ("x" * 3_000_000,)
    assert candidate.trouble is None


def test_exceptions_come_back(served):
    def fail(error):
        raise {"key": KeyError("k"), "utf": UnicodeDecodeError("a", b"", 0, 1, "b"), "own": Own()}[error]

    class Own(Exception):
        def __str__(self):
            return "its own"

    candidate = served(fail)
    with pytest.raises(KeyError) as caught:
        candidate("key")
    assert str(caught.value) == "'k'"
    with pytest.raises(Exception, match="can't decode"):
        candidate("utf")
    with pytest.raises(Exception, match="its own") as caught:
        candidate("own")
    assert type(caught.value).__name__ == "Own"


@pytest.mark.parametrize("argument", [len, lambda: 0, object(), Text("a"), np.int64(1)])
def test_what_is_no_literal_is_not_passed(served, argument):
    candidate = served(lambda x: x)
    for _ in range(2):  # whatever the test does about it
        with pytest.raises(CannotJudge, match="cannot be passed to the program"):
            candidate(argument)


@pytest.mark.parametrize(
    "answer", [b"", b"(True, 5)", b"(True,)\n", b"(True, 5, 5)\n", b"(False, 'a')\n", b"5\n", b"\xff\n"]
)
def test_a_broken_answer_ends_it(answer):
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(answer)
            theirs.shutdown(socket.SHUT_WR)
            candidate = Candidate(ours.fileno())
            with pytest.raises(ProgramEnded):
                candidate(1)
        with pytest.raises(ProgramEnded):
            candidate(1)


def with_test(source: str, test: str) -> ProgramWithTest:
    return ProgramWithTest(source, "f", test, f"{source}\ncandidate = f\n{test}")


@pytest.mark.parametrize(
    "source, test, result",
    [
        ("def f(x): return x + 1", "assert candidate(1) == 2", "passed"),
        ("def f(x): return x", "assert candidate(1) == 2, 'one is\\nnot two'", "failed: one is not two"),
        ("def f(x): return {}[x]", "candidate(1)", "failed: 1"),
        ("def f(x): return {}[x]", "try: candidate(1)\nexcept KeyError: pass", "passed"),
        ("def f(x): return f(x)", "candidate(1)", "failed: maximum recursion depth exceeded"),
        ("def f(x): return f", "candidate(1)", "failed: a value of type function is not a literal"),
        ("def g(x): return x", "candidate(1)", "failed: name 'f' is not defined"),
        ("f = 5", "candidate(1)", "failed: 'int' object is not callable"),
        ("def f(x", "candidate(1)", "failed: '(' was never closed (<string>, line 1)"),
        ("1 / 0", "candidate(1)", "failed: division by zero"),
        ("def f(x): raise SystemExit", "candidate(1)", "failed: exited before its end"),
        ("import os\ndef f(x): os._exit(0)", "candidate(1)", "failed: exited before its end"),
        (
            "import os\ndef f(x): os._exit(0)",
            "try: candidate(1)\nexcept: pass",
            "failed: exited before its end",
        ),
        ("import ctypes\ndef f(x): ctypes.string_at(0)", "candidate(1)", "failed: killed by SIGSEGV"),
        ("def f(x): return x", "1 / 0", "failed: division by zero"),
    ],
)
def test_a_test_decides_from_its_own_process(source, test, result):
    outcome = run_program(with_test(source, test), LIMITS)
    assert (outcome.result, outcome.passed, outcome.judged_apart) == (result, result == "passed", True)


@pytest.mark.parametrize(
    "source, test, result",
    [
        ("def f(x): return x('abc')", "assert candidate(len) == 3", "passed"),
        ("def f(x): return 1 / 0", "candidate(len)", "failed: division by zero"),
        ("def f(x): return x", "try: candidate(len)\nexcept: pass", "passed"),
    ],
)
def test_a_test_that_passes_a_function_runs_with_the_program_and_says_so(source, test, result):
    outcome = run_program(with_test(source, test), LIMITS)
    assert (outcome.result, outcome.passed, outcome.judged_apart) == (result, result == "passed", False)
