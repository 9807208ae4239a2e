"""Running a program, and ending it with a message and an exit code."""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from toptheta.util import interrupts
from toptheta.util.console import say, say_error
from toptheta.util.errors import UsageError
from toptheta.util.files import DISK_ERRORS


def run_main(main: Callable[[], int | None]) -> None:
    """Run a program's main: exit code 2 with the message for UsageError and for files that cannot be written,
    130 for Ctrl-C or SIGTERM.

    Large packages are imported within `main`, so that Ctrl-C during their import ends like any other."""
    interrupts.install()
    warnings.showwarning = _show_warning
    try:
        code = main() or 0
    except UsageError as error:
        say_error(error)
        code = 2
    except KeyboardInterrupt as interrupt:
        if not isinstance(interrupt, interrupts.Announced):
            say("\nInterrupted.")
        code = 130
    except BrokenPipeError:  # the reader of the output, such as head, has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        name = str(error.filename or "")
        where = f"{name if len(name) < 300 else name[:80] + '...'}: " if name else ""
        print(f"error: {where}{error.strerror}: change that, or name another folder.", file=sys.stderr)
        code = 2
    sys.exit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    """Above a progress bar, and without the line of code that it came from."""
    say(f"warning: {message}")
