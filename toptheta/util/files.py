"""Files that are written whole or not at all."""

import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from toptheta.util.errors import UsageError


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path in the folder of `path`, to write to. It replaces `path` when the block ends without
    an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, gzipped if its name ends in .gz."""
    with atomic_path(path) as temporary:
        data = text.encode()
        # mtime 0: the same content gives the same file
        temporary.write_bytes(gzip.compress(data, 6, mtime=0) if str(path).endswith(".gz") else data)


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_text(path: Path | str, flag: str) -> str:
    """A UTF-8 text file that a person named with `flag`. Raises UsageError when it is none, or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{flag} {path} is not UTF-8 text: convert it, or name another file.") from None
    if not text.strip():
        raise UsageError(f"{flag} {path} is empty: name a file with text.")
    return text


def open_text(path: Path | str) -> Any:
    """Open a text file for reading, gzipped or not."""
    return gzip.open(path, "rt") if str(path).endswith(".gz") else open(path)


def find_file(folder: Path | str, name: str) -> Path | None:
    """`folder/name` or `folder/name.gz`, whichever is there."""
    for candidate in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def append_result(results_dir: Path, name: str, text: str) -> Path:
    """Append a human-readable result to `results_dir/name`, as the published project does; returns the
    file."""
    results_dir.mkdir(parents=True, exist_ok=True)
    path = results_dir / name
    with open(path, "a") as file:  # one write call: runs in parallel do not mix their lines
        file.write(text)
    return path


def log_line(path: Path, text: str) -> None:
    """Append one dated line to a run's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")


def timestamp() -> str:
    """Now, in the published project's form: 2024-04-29_17-29-01_774054."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
