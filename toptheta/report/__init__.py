"""Results as tables, pictures and pages."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from toptheta.report.frames import LoadedRun


def load(*folders: "Path | str") -> "LoadedRun":
    """Runs as pandas tables: see frames.LoadedRun. folders: of runs, products/<timestamp>, of their tasks or
    cells, or of tables. Raises UsageError where a folder holds no finished cell, or a file is damaged."""
    from toptheta.report import frames  # here: pandas takes a second to import

    return frames.load(*folders)
