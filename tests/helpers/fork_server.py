"""Runs of the two scripts by a process that has imported everything already, and kills within them.

    python -m tests.helpers.fork_server

reads a job as a line of JSON and answers it with one: the run's exit code, what it printed, its seconds, and
how often it touched a file. A job: script, arguments, folder (to run in), checkpoint (seconds between two),
and when to stop it: `signal` after `seconds`, or before it touches a file for the time number `event`; or
`file_size`, the most bytes that a file may have, as on a full disk.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def serve() -> None:
    import lm_eval  # noqa: F401
    import torch

    import toptheta.eval.lm_eval_model
    import toptheta.eval.runner
    import toptheta.report.plots.tradeoff  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        job, started = json.loads(line), time.monotonic()
        reading, writing = os.pipe()
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _run(job, writing, write_end)
        os.close(writing)
        os.close(write_end)
        with open(reading, "rb") as output:
            text = output.read().decode(errors="replace")
        with open(read_end, "rb") as output:
            events = len(output.read())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seconds = time.monotonic() - started
        print(json.dumps({"code": code, "output": text, "seconds": seconds, "events": events}), flush=True)


def _run(job: dict[str, Any], output: int, events: int) -> None:
    from toptheta.eval import cell, checkpoint
    from toptheta.eval.cli import run_main

    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without
    cell.CHECKPOINT_SECONDS = checkpoint.CHECKPOINT_SECONDS = job["checkpoint"]
    if "file_size" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], resource.RLIM_INFINITY))
    if "seconds" in job:
        threading.Timer(job["seconds"], os.kill, (os.getpid(), job["signal"])).start()
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in TOUCHES and _writes(event, arguments):
            count += 1
            os.write(events, b".")
            if count == job.get("event"):
                os.kill(os.getpid(), job["signal"])

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
