"""The processes of one run, started by torchrun, accelerate launch or Slurm: rank, distribution of work, and
communication.

With a single process these functions neither divide work nor wait, so callers need not distinguish the cases.
Communication uses torch.distributed (gloo, as the data is small and on the CPU). One process may take hours
longer than another, so waiting has no deadline; instead each process sends a heartbeat every few seconds, and
when one is missing, the others stop.
"""

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from toptheta.util import console
from toptheta.util.console import say_error
from toptheta.util.errors import UsageError
from toptheta.util.progress import Bar

T = TypeVar("T")
BEAT_SECONDS = 2.0  # between two heartbeats
LOST_SECONDS = 30.0  # without a heartbeat: the process is considered lost
JOIN_SECONDS = 600.0  # for processes to connect
POLL_SECONDS = 0.05
SHOW_SECONDS = 90.0  # for a new file to become visible on other machines
_starts = count()  # names in the store are not used twice


@dataclass
class _Group:
    """store: torch.distributed's key-value store of all processes; alone: above 0 while only the first
    process works; lost: why the others must not be waited for."""

    rank: int
    size: int
    store: Any
    alone: int = 0
    meetings: int = 0
    bars: int = 0
    lost: str = ""
    ended: threading.Event = field(default_factory=threading.Event)


_group: _Group | None = None


def rank() -> int:
    """The index of this process, from 0, over all nodes."""
    return _group.rank if _group else 0


def world_size() -> int:
    """The number of processes that share the work; 1 within `from_first`."""
    return _group.size if _group and not _group.alone else 1


def share(items: Sequence[T]) -> list[T]:
    """This process's part of a list that is the same in all processes."""
    return list(items) if world_size() == 1 else list(items[rank() :: world_size()])


def gather(value: T) -> list[T]:
    """In the first process, the values of all processes in order; in the others an empty list. Waits for
    all."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    assert _group is not None
    _meet(_group)
    values: list[Any] | None = None if _group.rank else [None] * _group.size
    with _connected(_group):
        dist.gather_object(value, values)
    return values or []


def barrier() -> None:
    """Wait until all processes have called this."""
    if world_size() > 1:
        assert _group is not None
        _meet(_group)


def from_first(work: Callable[[], T]) -> T:
    """Run `work` in the first process while the others wait; returns its result in all of them. With several
    processes a UsageError is printed and ends all of them."""
    if world_size() == 1:
        return work()
    import torch.distributed as dist

    assert _group is not None
    result, error = None, None
    if _group.rank == 0:
        _group.alone += 1
        try:
            result = work()
        except UsageError as raised:
            error = raised
            say_error(error)  # before another process ends: its launcher then ends this one
        finally:
            _group.alone -= 1
    found: list[Any] = [result, error]
    _meet(_group)
    with _connected(_group):
        dist.broadcast_object_list(found)
    if found[1] is not None:
        raise SystemExit(2)  # the first has said it
    return found[0]


def wait_for_file(path: Path) -> None:
    """Wait until a file written by another process is visible here, which takes a while on some shared file
    systems. Raises UsageError if it does not become visible."""
    until = time.monotonic() + SHOW_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise UsageError(
                f"{path} was written by another process, but is not visible on {platform.node()}: give "
                "--output_dir a folder that all machines share."
            )
        os.listdir(path.parent)  # has some file systems look again
        time.sleep(POLL_SECONDS)


@contextmanager
def progress(
    total: int, done: int, unit: str, description: str, shown: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """One `Bar` for the work of all processes; yields the function with which a process reports finished
    questions and tokens. At the end each waits for the others, unless an error occurs."""
    group = _group if world_size() > 1 else None
    if group is not None:
        group.bars += 1
        key = f"bar/{group.bars}"
    bar = Bar(total, done, unit, description, shown and rank() == 0)

    def advance(count: int, tokens: int) -> None:
        if group is not None:
            with _connected(group):
                count = done + group.store.add(f"{key}/questions", count) - bar.done
                tokens = group.store.add(f"{key}/tokens", tokens) - bar.tokens
        bar.update(count, tokens)

    try:
        yield advance
        if group is not None:
            _meet(group, lambda: advance(0, 0))
    finally:
        bar.close()


def _meet(group: _Group, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait until all processes have called this as often as this one."""
    group.meetings += 1
    key = f"meeting/{group.meetings}"
    with _connected(group):
        here = group.store.add(key, 1)
        while here < group.size:
            meanwhile()
            time.sleep(POLL_SECONDS)
            here = group.store.add(key, 0)
    meanwhile()


@contextmanager
def _connected(group: _Group) -> Iterator[None]:
    """A connection error means that a process is lost: wait for `_watch` to find out which, and to stop this
    one."""
    try:
        yield
    except RuntimeError:
        time.sleep(2 * LOST_SECONDS)
        raise


def place(device: str) -> str:
    """The device of this process's model, for `load_model`. 'cuda' means as many GPUs of the machine as the
    model needs; several processes on a machine take one GPU each. Raises UsageError if there are too few."""
    if not device.startswith("cuda"):
        return device
    local = int(os.environ.get("LOCAL_WORLD_SIZE", _group.size)) if _group else 1
    if local == 1:
        return "auto" if device == "cuda" else device
    import torch

    if device != "cuda" or local > torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: {local} processes on a machine need a GPU each, and it has "
            f"{torch.cuda.device_count()}: start fewer processes, and leave --device out."
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def launched(command: str) -> str:
    """The command line that starts a command with as many processes as this run, on each node."""
    if _group is None:
        return command
    local = int(os.environ.get("LOCAL_WORLD_SIZE", _group.size))
    nodes = f"--nnodes {_group.size // local} " if local < _group.size else ""
    words = command.removeprefix("python ") if command.startswith("python ") else f"--no-python {command}"
    return f"torchrun {nodes}--nproc_per_node {local} {words}"


@contextmanager
def together() -> Iterator[None]:
    """Within the block, share a run with the processes that were started with this one, if any.

    Raises UsageError if they cannot connect. In a block of several processes, a UsageError is printed and
    exits with code 2; it exits with code 1 if another process is lost.
    """
    global _group
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or _group is not None:
        yield
        return
    import torch.distributed as dist

    own = int(os.environ.get("RANK", "0"))
    limit = timedelta(seconds=JOIN_SECONDS)
    try:
        store, own, size = next(iter(dist.rendezvous("env://", timeout=limit)))
        store = dist.PrefixStore(f"toptheta/{next(_starts)}", store)
        store.set(f"beat/{own}", "0")
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("gloo", store), rank=own, world_size=size, timeout=limit
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"process {own} of {size} could not connect to the others ({reason}): start all of them with the "
            "same MASTER_ADDR and MASTER_PORT, as torchrun does."
        ) from None
    _group = group = _Group(own, size, store)
    console.hush(own != 0)
    clone: Any = store
    watching = threading.Thread(target=_watch, args=(group, clone.clone()), daemon=True)
    watching.start()
    try:
        yield
        _part(group)
    except BaseException as error:
        group.ended.set()
        if isinstance(error, UsageError) and not group.lost:
            say_error(error)  # the launcher ends this process as soon as another has ended
            with suppress(KeyboardInterrupt):
                _leave(group, error)
            raise SystemExit(2) from None
        _leave(group, error)
        if group.lost:
            raise SystemExit(1) from None  # what was raised only follows from that
        raise
    finally:
        group.ended.set()
        watching.join(BEAT_SECONDS)
        console.hush(False)
        _group = None
        dist.destroy_process_group()


def _part(group: _Group) -> None:
    """Leave the group; the first process leaves last, because it may host the store."""
    _meet(group)
    if group.rank:
        group.store.add("parted", 1)
    until = time.monotonic() + LOST_SECONDS
    while not group.rank and group.store.add("parted", 0) < group.size - 1 and time.monotonic() < until:
        time.sleep(POLL_SECONDS)


def _leave(group: _Group, error: BaseException) -> None:
    """Tell the others why this process leaves, unless it is because of another one. The first process stays
    until they have had time to read it, because it may host the store."""
    why = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed ({error or type(error)})"
    try:
        if not group.lost:
            group.store.set("gone", f"{group.rank} {why}")
        time.sleep(0.0 if group.rank else 2 * BEAT_SECONDS)
    except RuntimeError:  # the store is gone too
        pass


def _watch(group: _Group, store: Any) -> None:
    """Send heartbeats, and watch those of the others; runs in a thread with its own connection."""
    others = [other for other in range(group.size) if other != group.rank]
    last = {other: (b"0", time.monotonic()) for other in others}
    beats = count(1)
    while not group.ended.wait(BEAT_SECONDS) and not group.lost:
        try:
            store.set(f"beat/{group.rank}", str(next(beats)))
            for other in others:
                found = store.get(f"beat/{other}")
                if found != last[other][0]:
                    last[other] = (found, time.monotonic())
                elif time.monotonic() - last[other][1] > LOST_SECONDS:
                    store.set("gone", f"{other} does not respond: it was killed, or its machine failed")
            if store.check(["gone"]):
                lost, _, why = store.get("gone").decode().partition(" ")
                _lose(group, int(lost), why)
        except RuntimeError:
            _lose(group, 0, "cannot be reached")  # it, or torchrun with it, holds the store


def _lose(group: _Group, other: int, why: str) -> None:
    """Stop this process like Ctrl-C does, so that finished work is kept."""
    if group.ended.is_set():
        return
    group.lost = f"process {other} {why}"
    print(f"\nProcess {group.rank} of {group.size} stops: {group.lost}.", file=sys.stderr, flush=True)
    if other == 0:  # which speaks for all
        console.hush(group.rank != 1)
    os.kill(os.getpid(), signal.SIGTERM)
