"""The error for mistakes that a user can fix."""


class UsageError(ValueError):
    """A flag, parameter or file is wrong; the message is one sentence that says which, why, and what to
    do."""

    def _render_traceback_(self) -> list[str]:
        """The message only, for notebooks."""
        return [str(self)]
