"""Lines for the person at the terminal."""

import sys

from tqdm import tqdm

_hushed = False


def say(text: str) -> None:
    """A line for the person at the terminal, apart from results on standard output, and above a progress
    bar."""
    if not _hushed:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def hush(hushed: bool) -> None:
    """Whether `say` is silent from now on: of several processes one speaks."""
    global _hushed
    _hushed = hushed
