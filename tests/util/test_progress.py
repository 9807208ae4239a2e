"""Progress: what the line says, and that there is none without a terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.paths import ROOT
from toptheta.util.progress import CALIBRATING, EVALUATING, Bar, RunProgress, Stage, begin, duration

STAGES = [
    Stage("dense", EVALUATING, 10),
    Stage("Top-theta K=8", CALIBRATING, 4),
    Stage("Top-theta K=8", EVALUATING, 10),
    Stage("Top-k K=8", EVALUATING, 10),
]


@pytest.fixture
def run() -> Iterator[RunProgress]:
    """A run, shown, whose clock the test sets."""
    run = RunProgress(STAGES, clock=lambda: run.now)  # type: ignore[attr-defined]
    run.now = 0.0  # type: ignore[attr-defined]
    with run.shown():
        yield run


def test_the_time_left_is_the_whole_run_s(run: Any) -> None:
    """Answers take 2 s, calibration prompts 5 s."""
    begin("dense", EVALUATING)
    bar = Bar(40, 0, "answer", "unused")
    assert bar.text == "cell 1 of 3: dense, evaluating: 0 of 40 answers"
    run.now = 10.0
    bar.update(20, tokens=500)  # half of 10 questions: 2 s each; 5 + 4 + 10 + 10 are left
    assert bar.text == "cell 1 of 3: dense, evaluating: 20 of 40 answers, 50 tokens/s, 58 s left"
    run.now = 20.0
    bar.update(20, tokens=500)
    bar.close()
    begin("Top-theta K=8", CALIBRATING)
    bar = Bar(4, 0, "text", "unused")
    run.now = 25.0
    bar.update(1)  # 3 prompts at 5 s, 20 questions at 2 s
    assert bar.text == "cell 2 of 3: Top-theta K=8, calibrating: 1 of 4 texts, 55 s left"
    assert run.seconds_left(0.25) == pytest.approx(3 * 5 + 20 * 2)
    begin("Top-k K=8", EVALUATING)  # the stages between were done by an earlier start
    assert run.place == "cell 3 of 3: Top-k K=8, evaluating"
    assert run.seconds_left(0.5) == pytest.approx(5 * 2)


def test_a_resumed_stage_is_judged_by_what_this_start_did(run: Any) -> None:
    begin("Top-k K=8", EVALUATING)
    bar = Bar(10, 6, "answer", "unused")
    run.now = 1.0
    bar.update(2)
    assert bar.text.endswith("8 of 10 answers, 1 s left")


def test_without_a_run_a_bar_shows_its_own_work() -> None:
    begin("dense", EVALUATING)
    bar = Bar(1, 0, "answer", "Evaluating", shown=False)
    bar.update(1)
    assert bar.text == "Evaluating: 1 of 1 answer"


def test_words() -> None:
    assert [duration(x) for x in (4.4, 89, 91, 5390, 5460, 12000)] == [
        "4 s",
        "89 s",
        "2 min",
        "1 h 30 min",
        "1 h 31 min",
        "3 h 20 min",
    ]


PROGRAM = """
from toptheta.util.progress import *
from toptheta.util.console import say
with RunProgress([Stage("dense", EVALUATING, 2)]).shown():
    begin("dense", EVALUATING)
    bar = Bar(2, 0, "answer", "x")
    bar.update(1, 100)
    say("a line between")
    bar.update(1, 100)
    bar.close()
print("the table")
"""


def test_quiet_without_a_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("the table\n", "a line between\n")


def test_one_line_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.stdout == b"the table\n"
    assert "cell 1 of 1: dense, evaluating: 0 of 2 answers" in shown
    assert "a line between\r\n" in shown and shown.count("\n") == 1  # the bar leaves nothing behind
