"""Ctrl-C and SIGTERM, which a cluster sends before it kills: the one place that says when they take effect.

They end a computation at once, but never the keeping of what it found: `uninterrupted` puts them off to the
end of a block. What must be whole or not at all belongs into such a block; nothing else needs to know of
signals.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOTICE = b"\nStopping after this prompt. A second signal stops at once.\n"

_blocks: list[bool] = []  # blocks that are open, the innermost last: whether a second signal ends it
_pending: list[int] = []  # signals put off. Both are of the process, as signals are


def install() -> None:
    """Handle Ctrl-C and SIGTERM from now on: a KeyboardInterrupt, at once or when `uninterrupted` allows it.
    Ctrl-C stays ignored where the process was started so, as a shell does in the background."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)


def on_signal(number: int, frame: Any) -> None:
    """What Python calls when a signal has come, between two instructions of the main thread."""
    if not _blocks or _blocks[-1] and _pending:
        _pending.clear()
        raise KeyboardInterrupt
    if _blocks[-1]:
        os.write(2, NOTICE)  # print may be what was interrupted, and cannot be entered twice
    _pending.append(number)


def stop_requested() -> bool:
    """Whether a signal waits for the end of the block that this is called in."""
    return bool(_pending)


@contextmanager
def uninterrupted(until_second: bool = False) -> Iterator[None]:
    """Signals that come within the block take effect when it ends, or the outermost of several. until_second:
    a second signal ends the block at once, for blocks that may take long."""
    _blocks.append(until_second)
    try:
        yield
    finally:
        _blocks.pop()
    if _pending and not _blocks:
        _pending.clear()
        raise KeyboardInterrupt
