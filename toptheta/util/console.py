"""Lines for the person at the terminal."""

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """A line for the person at the terminal, apart from results on standard output, and above a progress
    bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
