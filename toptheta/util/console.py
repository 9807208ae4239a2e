"""Lines for the person at the terminal."""

import sys


def say(text: str) -> None:
    """A line for the person at the terminal, apart from results on standard output."""
    print(text, file=sys.stderr, flush=True)
