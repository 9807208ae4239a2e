"""Messages on the terminal."""

import sys

from tqdm import tqdm

from toptheta.util.errors import UsageError

_hushed = False


def say(text: str) -> None:
    """Print a message on stderr, separate from results on stdout, and above a progress bar."""
    if not _hushed:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def say_error(error: UsageError) -> None:
    """Print why a command ends; never silent."""
    print(f"error: {error}", file=sys.stderr, flush=True)


def hush(hushed: bool) -> None:
    """Set whether `say` is silent, as only one of several processes prints."""
    global _hushed
    _hushed = hushed
