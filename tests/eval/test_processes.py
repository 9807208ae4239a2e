"""What the processes of a run hand each other, and that none waits for one that is gone."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.helpers.processes import run, start
from toptheta.eval import processes
from toptheta.util import progress
from toptheta.util.console import say
from toptheta.util.errors import UsageError


def report(value: object) -> None:
    print(json.dumps(value), flush=True)


class SayingBar(progress.Bar):
    def close(self) -> None:
        print(f"{self.done} of {self.total} {self.unit}s, {self.tokens} tokens")


def hand_over() -> None:
    processes.Bar = SayingBar  # type: ignore[misc]
    with processes.together():
        rank = processes.rank()
        say("said once")
        alone = processes.from_first(lambda: (processes.world_size(), processes.share(range(5))))
        with processes.progress(9, 2, "thing", "All") as advance:
            for _ in processes.share(range(7)):
                advance(1, 5)
        report([processes.world_size(), processes.share(range(7)), processes.gather(rank * 10), alone])


def test_sharing(tmp_path: Path) -> None:
    started = run(3, tmp_path, hand_over)
    for rank in range(3):
        printed = started.printed(rank)
        found = json.loads(printed[printed.index("[3,") :])
        assert found == [3, list(range(7))[rank::3], [] if rank else [0, 10, 20], [1, [0, 1, 2, 3, 4]]]
        # One process speaks for all, and its bar counts what all do.
        assert ("said once" in printed) == (rank == 0)
        assert rank or "9 of 9 things, 35 tokens" in printed


def test_alone() -> None:
    with processes.together():
        assert (processes.rank(), processes.world_size()) == (0, 1)
        assert processes.share([1, 2]) == [1, 2] and processes.gather("x") == ["x"]
        assert processes.from_first(lambda: 3) == 3
        processes.barrier()


def refuse() -> None:
    def work() -> None:
        raise UsageError("--k is wrong.")

    with processes.together():
        processes.from_first(work)


def test_an_error_of_the_first_is_said_once_and_ends_all(tmp_path: Path) -> None:
    with start(3, tmp_path, refuse) as started:
        assert started.join(60.0) == [2, 2, 2]
    assert [started.printed(rank).count("--k is wrong.") for rank in range(3)] == [1, 0, 0]


def end(rank: int, how: str, busy: bool) -> None:
    """Process `rank` ends in some way; the others wait for it, or compute meanwhile."""
    processes.BEAT_SECONDS, processes.LOST_SECONDS = 0.5, 3.0  # not to make the test slow
    with processes.together():
        processes.barrier()
        if processes.rank() == rank:
            if how == "raise":
                raise ZeroDivisionError("of nothing")
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        while busy:
            sum(range(1000))
        processes.gather(1)


@pytest.mark.parametrize(
    ("rank", "how", "busy", "why"),
    [
        (1, "kill", True, "process 1 does not respond"),
        (0, "kill", True, "process 0 cannot be reached"),
        (1, "stop", True, "process 1 does not respond"),
        (0, "raise", False, "process 0 failed (of nothing)"),
    ],
)
def test_a_lost_process_stops_the_others(tmp_path: Path, rank: int, how: str, busy: bool, why: str) -> None:
    survivors = [i for i in range(3) if i != rank]
    with start(3, tmp_path, end, rank, how, busy) as started:
        for i in survivors:
            started.processes[i].join(60.0)
            printed = started.printed(i)
            assert started.processes[i].exitcode == 1, printed
            assert why in printed and "Traceback" not in printed
