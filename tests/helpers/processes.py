"""Several processes of one run, as torchrun starts them, and scripts, but quick: forked from one that has
imported all."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.helpers.paths import ROOT

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["toptheta.eval.runner", "toptheta.eval.lm_eval_model", "lm_eval"])


@dataclass
class Started:
    """Processes under way, by rank, and the files that hold what they print."""

    processes: list[Any]
    logs: list[Path]

    def join(self, seconds: float) -> list[int | None]:
        """Their exit codes; None: not ended within these seconds."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def printed(self, rank: int) -> str:
        return self.logs[rank].read_text()


@contextmanager
def start(count: int, logs: Path, work: Callable[..., Any], *arguments: Any) -> Iterator[Started]:
    """Run `work(*arguments)`, a function of a module, in `count` processes that know of each other, which are
    killed when the block ends. logs: a folder for what they print."""
    os.environ["PYTHONPATH"] = str(ROOT)
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = Started([], [])
    try:
        for rank in range(count):
            _start_one(started, rank, count, port, logs, work, arguments)
        yield started
    finally:
        for process in started.processes:
            process.kill()


def _start_one(
    started: Started,
    rank: int,
    count: int,
    port: int,
    logs: Path,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    of_group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    of_process = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    environment = of_group | of_process | {"OMP_NUM_THREADS": "1"}
    log = logs / f"{rank}.txt"
    process = _context.Process(target=_run, args=(environment, os.getcwd(), log, work, arguments))
    process.start()
    started.processes.append(process)
    started.logs.append(log)


def run(count: int, logs: Path, work: Callable[..., Any], *arguments: Any) -> Started:
    """`start`, and wait: all must end well."""
    with start(count, logs, work, *arguments) as started:
        codes = started.join(100.0)
    assert codes == [0] * count, "\n".join(started.printed(rank) for rank in range(count))
    return started


def _run(
    environment: dict[str, str], folder: str, log: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    with open(log, "wb") as file:
        for standard in (1, 2):
            os.dup2(file.fileno(), standard)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    import torch

    torch.set_num_threads(1)
    from toptheta.util.program import run_main

    def main() -> None:
        work(*arguments)

    run_main(main)


class Script:
    """A script of ours as subprocess.Popen runs it, in a process that need not import anything first: the
    part of Popen's interface that is used."""

    def __init__(
        self,
        command: list[str],
        stdout: IO[Any],
        stderr: int | IO[Any],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        start_new_session: bool = False,
    ):
        python, *arguments = command
        assert python == sys.executable
        os.environ["PYTHONPATH"] = str(ROOT)
        files = [stdout.name, stdout.name if stderr == subprocess.STDOUT else stderr.name]  # type: ignore[union-attr]
        given = (arguments, files, dict(env or os.environ), str(cwd or os.getcwd()))
        self._process = _context.Process(target=_run_script, args=given)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if timeout is not None and self.returncode is None:
            raise subprocess.TimeoutExpired("the script", timeout)
        return self.returncode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def run_script(command: list[str], folder: Path, **more: Any) -> subprocess.CompletedProcess:
    """subprocess.run of a script of ours, as `Script` does it. folder: for what it prints."""
    with open(folder / "stdout", "w+") as out, open(folder / "stderr", "w+") as err:
        code = Script(command, out, err, **more).wait(120.0)
        assert code is not None
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def _run_script(arguments: list[str], files: list[str], env: dict[str, str], cwd: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
    runpy.run_path(arguments[0], run_name="__main__")
