"""Chunks of a cell's output that survive a crash: `partial/NNNNN.zip`, each written atomically by one of the
run's processes.

The format has a checksum for every file. The content of a chunk with a wrong checksum is computed again.
"""

import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from toptheta.eval import processes
from toptheta.util.console import say
from toptheta.util.files import atomic_path

DAMAGES = (  # what zipfile raises for them
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)


def write(partial: Path, files: Mapping[str, bytes]) -> str:
    """Add a chunk with these files to the folder `partial`; returns its name. Chunk numbers of different
    processes differ modulo their number."""
    number = max((int(path.stem) for path in chunks(partial)), default=-1) + 1
    number += (processes.rank() - number) % processes.world_size()
    with atomic_path(partial / f"{number:05d}.zip") as temporary, zipfile.ZipFile(temporary, "w") as chunk:
        for name, data in files.items():
            chunk.writestr(name, data)
    return f"{number:05d}.zip"


def chunks(partial: Path) -> list[Path]:
    """The chunks in `partial`, in their order."""
    return sorted(path for path in partial.glob("*.zip") if path.stem.isdigit())


def names(chunk: Path) -> list[str]:
    """The names of the files in a chunk."""
    with zipfile.ZipFile(chunk) as opened:
        return opened.namelist()


def read(chunk: Path, name: str) -> bytes:
    """One file of a chunk; empty if it has none of this name."""
    with zipfile.ZipFile(chunk) as opened:
        return opened.read(name) if name in opened.NameToInfo else b""


def remove_damaged(partial: Path, needed: str) -> None:
    """Remove incomplete or damaged chunks from `partial`, with a message. needed: the name of a file that
    every chunk has."""
    for path in partial.glob("*"):
        try:
            if path.suffix == ".zip" and needed in names(path) and zipfile.ZipFile(path).testzip() is None:
                continue
        except DAMAGES:
            pass
        say(f"{path} is damaged or from an earlier version: its content is computed again.")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
