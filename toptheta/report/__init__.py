"""Results as tables, plots and HTML reports."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from toptheta.report.frames import LoadedRun


def load(*folders: "Path | str") -> "LoadedRun":
    """Load runs as pandas tables, see frames.LoadedRun. folders: of runs (products/<timestamp>), of their
    tasks or cells, or of tables. Raises UsageError if a folder has no finished cell, a file is damaged, or no
    folder is given."""
    from toptheta.report import frames  # here: pandas takes a second to import

    return frames.load(*folders)
