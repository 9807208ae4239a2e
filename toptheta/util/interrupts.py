"""Handling of Ctrl-C and SIGTERM, which a cluster sends before it kills a job.

They stop a computation at once, but never interrupt saving its results: `uninterrupted` defers them to the
end of a block. Code that must run completely or not at all belongs into such a block; no other code handles
signals.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOTICE = b"\nStopping after this prompt. A second signal stops at once.\n"

_blocks: list[bool] = []  # open blocks, the innermost last: whether a second signal ends it
_pending: list[int] = []  # deferred signals. Both are global, as signals concern the whole process


class Announced(KeyboardInterrupt):
    """An interrupt that the user was notified of, with how to go on."""


def install() -> None:
    """Handle Ctrl-C and SIGTERM from now on: raise KeyboardInterrupt, at once or at the end of
    `uninterrupted`. Ctrl-C stays ignored if the process was started that way, as for a shell's background
    jobs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)


def on_signal(number: int, frame: Any) -> None:
    """The signal handler, which Python calls between two instructions of the main thread."""
    if not _blocks or _blocks[-1] and _pending:
        _pending.clear()
        raise KeyboardInterrupt
    if _blocks[-1]:
        os.write(2, NOTICE)  # print may be what was interrupted, and cannot be entered twice
    _pending.append(number)


def stop_requested() -> bool:
    """Whether a signal is deferred to the end of the current block."""
    return bool(_pending)


@contextmanager
def uninterrupted(until_second: bool = False) -> Iterator[None]:
    """Defer signals to the end of the block, or of the outermost of nested blocks. until_second: a second
    signal ends the block at once, for blocks that may take long."""
    _blocks.append(until_second)
    try:
        yield
    finally:
        _blocks.pop()
    if _pending and not _blocks:
        _pending.clear()
        raise KeyboardInterrupt
