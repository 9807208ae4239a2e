"""Texts for perplexity and needles: text files, and the contexts of LongBench's rows."""

from typing import TypedDict

from toptheta.util.errors import UsageError
from toptheta.util.files import read_text
from toptheta.util.schema import parse_json, typed


class Row(TypedDict):
    """The fields of a LongBench row that are read."""

    context: str


def text_of(path: str, flag: str) -> str:
    """A text file, or the contexts of LongBench's rows. Raises UsageError for any other file."""
    text = read_text(path, flag)
    if not path.endswith(".jsonl"):
        return text
    contexts = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028
        try:
            if line.strip():
                contexts.append(typed(parse_json(line), Row)["context"])
        except ValueError as error:
            raise UsageError(
                f"{flag} {path} has no LongBench rows (line {number}: {error}): each line must be JSON with "
                "a 'context'."
            ) from None
    return "\n\n".join(contexts)
