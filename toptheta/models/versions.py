"""The releases of transformers that this package supports and is tested with."""

from importlib.metadata import version

from packaging.version import Version

from toptheta.util.errors import UsageError

OLDEST, BEFORE = "5.17", "5.24"  # as pyproject.toml says; `make matrix` runs the tests with releases between


def check_transformers(found: str) -> None:
    """Raise UsageError for a release that is out of range."""
    if not Version(OLDEST) <= Version(found) < Version(BEFORE):
        raise UsageError(
            f"transformers {found} is installed, but toptheta needs {OLDEST} or later and below {BEFORE}: "
            f'run `pip install "transformers>={OLDEST},<{BEFORE}"`.'
        )


check_transformers(version("transformers"))
