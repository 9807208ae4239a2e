"""The error for mistakes that a user can fix."""

from collections.abc import Iterable


class UsageError(ValueError):
    """A flag, parameter or file is wrong; the message is one sentence that says which, why, and what to
    do."""

    def _render_traceback_(self) -> list[str]:
        """The message only, for notebooks."""
        return [str(self)]


def refuse_other_encodings(arguments: Iterable[str]) -> None:
    """Raise UsageError for a command line's argument that is not UTF-8 text."""
    for text in arguments:
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UsageError(f"{text!r} is not UTF-8 text: correct it.")
