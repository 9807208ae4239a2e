"""The one error that users cause and can fix."""


class UsageError(ValueError):
    """A flag, parameter or file is wrong; the message is one sentence that says which, why, and the way
    out."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the sentence alone, as the scripts do."""
        return [str(self)]
