"""Atomic writing of files, and reading of text files."""

import errno
import gzip
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from toptheta.util.errors import UsageError

UNFINISHED = ".unfinished-"  # prefix of files that are being written
NAMED = 8  # folders that an error lists
DISK_ERRORS = (  # a full or read-only disk, limits, permissions, a file in the place of a folder, long names
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, unless it exists. Raises an OSError of DISK_ERRORS."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # what /proc says
        raise PermissionError(errno.EACCES, "no folder can be created there", str(folder)) from None


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path in the folder of `path`, to write to. It replaces `path` when the block ends without
    an error, and has reached the disk by then."""
    path = Path(path)
    make_folder(path.parent)
    prefix = f"{UNFINISHED}{path.name}."
    handle, temporary = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(folder: Path | str, named: str, remedy: str) -> None:
    """Raise UsageError unless files can be written to `folder`, or it can be created; leaves nothing there.
    named: what the user calls the folder."""
    folder = Path(folder)
    try:
        nearest = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UsageError(f"{named} {folder} cannot be written to ({error.strerror}): {remedy}.") from None


def flush(path: Path | str) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk: otherwise a renamed file may
    be empty after a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Remove files in `folder` that a killed process left incomplete; no other process may write there."""
    for path in folder.rglob(f"{UNFINISHED}*"):
        path.unlink(missing_ok=True)


def write_bytes(path: Path | str, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, gzipped if its name ends in .gz."""
    write_bytes(path, packed(str(path), text))


def packed(name: str, text: str, level: int = 6) -> bytes:
    """The bytes of a text file, gzipped if its name ends in .gz; the same text gives the same bytes."""
    return gzip.compress(text.encode(), level, mtime=0) if name.endswith(".gz") else text.encode()


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_text(path: Path | str, flag: str) -> str:
    """The content of the UTF-8 text file given by `flag`. Raises UsageError if it is not one, or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{flag} {path} is not UTF-8 text: convert it, or name another file.") from None
    if not text.strip():
        raise UsageError(f"{flag} {path} is empty: name a file with text.")
    return text


def one_of(what: str, folder: Path, patterns: Iterable[str], up: int = 1) -> str:
    """For errors, the folders that the user may name in place of `folder`: 'one of its cells (mode0_k16,
    mode3)', or '' if there is none. patterns: of files in them; up: how far these files are below them."""
    found = (path.parents[up - 1] for pattern in patterns for path in folder.glob(pattern))
    names = sorted({str(path.relative_to(folder)) for path in found} - {"."})
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return f"one of its {what} ({', '.join(names[:NAMED] + more)})" if names else ""


def find_file(folder: Path | str, name: str) -> Path | None:
    """`folder/name` or `folder/name.gz`, whichever exists; else None."""
    for candidate in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def append_result(results_dir: Path, name: str, text: str) -> None:
    """Append a human-readable result to `results_dir/name`, as the published project does, unless it is
    already there, as when a run is killed right afterwards and resumed."""
    make_folder(results_dir)
    path = results_dir / name
    if path.is_file() and text.encode() in path.read_bytes():
        return
    with open(path, "a", encoding="utf-8") as file:  # one write call: runs in parallel do not mix their lines
        file.write(text)


def log_line(path: Path, text: str) -> None:
    """Append one dated line to a run's log."""
    make_folder(path.parent)
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")


def timestamp() -> str:
    """Now, in the published project's form: 2024-04-29_17-29-01_774054."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
