"""Runs of the two scripts by processes that have imported everything already, and kills within them.

    python -m tests.helpers.fork_server

reads a job as a line of JSON and answers it with one: its seconds, whether it hung, and for each process its
exit code, what it printed, and how often it touched a file. A job: script, arguments, folder (to run in),
checkpoint (seconds between two), processes (that share the run), launcher ('torchrun' is one that holds the
store of the processes, and ends all when one fails), and when to stop it: `signal`, `seconds` after the start
of process `rank`, or before that touches a file for the time number `event`; or `file_size`, the most bytes
that a file of that process may have, as on a full disk. all: every process is stopped so, not that one alone.
"""

import json
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
HUNG_SECONDS = 600.0  # as long as it takes on a busy machine


@dataclass
class Child:
    pid: int
    output: int
    events: int
    code: int | None = None
    text: bytes = b""
    touches: int = 0


def serve() -> None:
    import lm_eval  # noqa: F401
    import torch

    import toptheta.eval.lm_eval_model
    import toptheta.eval.runner
    import toptheta.report.plots.tradeoff  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    started, count = time.monotonic(), job["processes"]
    with _launched(count, job["launcher"]) as environment:
        children: list[Child] = []
        for rank in range(count):
            children.append(_start(job, rank, environment, children[0].pid if children else 0))
        hung = _wait(children, ends_all=job["launcher"] == "torchrun")
    return {
        "seconds": time.monotonic() - started,
        "hung": hung,
        "codes": [child.code for child in children],
        "outputs": [child.text.decode(errors="replace") for child in children],
        "events": [child.touches for child in children],
    }


@contextmanager
def _launched(count: int, launcher: str | None) -> Iterator[dict[str, str]]:
    """What the environment of processes that share a run has in common."""
    if count == 1:
        yield {}
        return
    found = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    if launcher != "torchrun":  # then the first process holds the store
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        yield found | {"MASTER_PORT": str(port)}
        return
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _hold_store(writing)
    os.close(writing)
    with open(reading) as answer:
        port = int(answer.read())
    try:
        yield found | {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _hold_store(answer: int) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(answer, str(store.port).encode())
    os.close(answer)
    while True:
        signal.pause()


def _start(job: dict[str, Any], rank: int, environment: dict[str, str], group: int) -> Child:
    reading, writing = os.pipe()
    events, events_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, group)
        of_process = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if environment else {}
        os.environ.update(environment | of_process)
        _run(job, rank, writing, events_end)
    with suppress(PermissionError, ProcessLookupError):  # both sides do it, as either may be the first
        os.setpgid(pid, group or pid)
    os.close(writing)
    os.close(events_end)
    return Child(pid, reading, events)


def _wait(children: list[Child], ends_all: bool) -> bool:
    """Read what the processes say until all have ended. ends_all: when one fails, the others get SIGTERM.
    Returns whether any had to be killed."""
    until, hung, ended_all = time.monotonic() + HUNG_SECONDS, False, False
    with selectors.DefaultSelector() as selector:
        for child in children:
            for fd in (child.output, child.events):
                selector.register(fd, selectors.EVENT_READ, child)
        while left := [child for child in children if child.code is None]:
            for key, _ in selector.select(0.02):
                _read(selector, key)
            for child in left:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid:
                    child.code = os.waitstatus_to_exitcode(status)
            if ends_all and not ended_all and any(child.code for child in children):
                _kill(children, signal.SIGTERM)
                ended_all = True
            if not hung and time.monotonic() > until:
                _kill(children, signal.SIGKILL)
                hung = True
        while selector.get_map():
            for key, _ in selector.select():
                _read(selector, key)
    return hung


def _read(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    data, child = os.read(key.fd, 1 << 16), key.data
    if not data:
        selector.unregister(key.fd)
        os.close(key.fd)
    elif key.fd == child.output:
        child.text += data
    else:
        child.touches += len(data)


def _kill(children: list[Child], number: int) -> None:
    for child in children:
        if child.code is None:
            os.kill(child.pid, number)


def _run(job: dict[str, Any], rank: int, output: int, events: int) -> None:
    from toptheta.eval import cell, checkpoint, processes
    from toptheta.util.program import run_main

    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without
    cell.CHECKPOINT_SECONDS = checkpoint.CHECKPOINT_SECONDS = job["checkpoint"]
    stopped = rank == job.get("rank", 0)
    if "signal" in job or "file_size" in job:  # not to make the others wait as long as a user's would
        processes.BEAT_SECONDS, processes.LOST_SECONDS, processes.JOIN_SECONDS = 0.5, 8.0, 20.0
    if "file_size" in job and (stopped or job.get("all")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], resource.RLIM_INFINITY))
    target = 0 if job.get("all") else os.getpid()  # 0: all of this process's group, as Ctrl-C does
    if "seconds" in job and stopped:
        threading.Timer(job["seconds"], os.kill, (target, job["signal"])).start()
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in TOUCHES and _writes(event, arguments):
            count += 1
            os.write(events, b".")
            if stopped and count == job.get("event"):
                os.kill(target, job["signal"])

    sys.addaudithook(watch)
    script = __import__(job["script"].removesuffix(".py"))
    sys.argv = [job["script"], *job["arguments"]]
    try:
        run_main(script.main)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _writes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a file of the run is meant, and more than read."""
    path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
    ours = "products" in path or path.startswith("results-")
    flags = arguments[2] if event == "open" else os.O_WRONLY
    return ours and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


if __name__ == "__main__":
    serve()
