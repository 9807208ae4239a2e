"""Reading files with lines of numbers, plain or gzipped, as pandas tables.

They are parsed in bulk, because a run of a large model writes millions of lines; only the search for a
damaged line reads line by line.
"""

import csv
import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from toptheta.util.errors import UsageError

INT = r"\d{1,18}"
OF_NUMBERS = b"0123456789+-.eE, \t\r\n"
SIZE = r"\+?(?:\d+\.?\d*|\.\d+)(?:[eE](?:\+?\d{1,2}|-\d{1,3}))?"


@dataclass(frozen=True)
class LineFormat:
    """A line format. columns: name -> dtype; replace: bytes to replace, leaving one separator; words: allowed
    values in columns of type category; strict: match every line with the pattern, even if pandas can read it,
    because pandas accepts 1e5 as a whole number, and what is replaced may stand within a number."""

    columns: dict[str, str]
    pattern: str
    example: str
    separator: str = r"\s+"
    replace: tuple[tuple[bytes, bytes], ...] = ()
    words: tuple[str, ...] = ()
    strict: bool = False


LAYER_HEAD = ((b"_H", b" "), (b"L", b""), (b":", b" "))
THRESHOLDS = LineFormat(
    # K is a float because some published tables hold a mean there.
    {"layer": "int64", "head": "int64", "n": "int64", "theta": "float64", "samples": "int64", "k": "float64"},
    rf"L{INT}_H{INT}:{INT} -?{SIZE} {INT} {SIZE}",
    "L0_H0:65 0.25 8 64",
    replace=LAYER_HEAD,
    strict=True,
)
SDC = LineFormat(
    {"layer": "int64", "head": "int64", "n": "int64", "r": "float64", "samples": "int64"},
    rf"L{INT}_H{INT}:{INT} {SIZE} {INT}",
    "L0_H0:65 0.25 8",
    replace=LAYER_HEAD,
    strict=True,
)


def read_lines(path: Path, form: LineFormat, layer: int | None = None) -> pd.DataFrame | None:
    """The lines of a file, None if it has none. layer: the only layer allowed in it. Raises UsageError with
    the number of a damaged line."""
    content = file_content(path)
    plain = content
    for old, new in form.replace:
        plain = plain.replace(old, new)
    if not plain.strip():
        return None
    try:
        # The extra column takes what a line has too much, so that pandas cannot turn a first field into an
        # index.
        with np.errstate(invalid="ignore"):  # of a whole number that is none: it is refused below
            frame = pd.read_csv(
                io.BytesIO(plain),
                sep=form.separator,
                header=None,
                names=[*form.columns, "extra"],
                dtype={**form.columns, "extra": "object"},
                encoding="latin-1",
                quoting=csv.QUOTE_NONE,
            )
        extra = frame.pop("extra")
        if (
            not isinstance(frame.index, pd.RangeIndex)
            or extra.notna().any()
            or not _sound(frame, layer, form.words)
        ):
            raise ValueError("a value is out of range")
        if not form.words and plain.translate(None, OF_NUMBERS):
            raise ValueError("a value is no number")  # pandas reads true as 1
        if form.strict:
            line = form.pattern.replace(" ", "[ \t]+").encode()
            if re.sub(rb"(?m)^[ \t]*(?:" + line + rb")[ \t\r]*$", b"", content).strip():
                raise ValueError("a line has another format")
    except (ValueError, OverflowError) as error:
        _find_damage(path, content, form)
        raise UsageError(f"{path} cannot be read ({error}): create it again.") from None
    return frame


def _sound(frame: pd.DataFrame, layer: int | None, words: tuple[str, ...]) -> bool:
    for name, column in frame.items():
        if column.dtype == "category":
            if column.isna().any() or not set(column.cat.categories) <= set(words):
                return False
        elif not np.isfinite(column.to_numpy()).all() or (name != "theta" and (column < 0).any()):
            return False
    return layer is None or bool((frame["layer"] == layer).all())


def _find_damage(path: Path, content: bytes, form: LineFormat) -> None:
    pattern = re.compile(form.pattern)
    for number, line in enumerate(content.decode("latin-1").split("\n"), 1):
        if line.strip() and not pattern.fullmatch(re.sub(r"\s+", " ", line.strip())):
            raise damaged(path, number, line, form.example)


def damaged(path: Path, number: int, line: str, example: str) -> UsageError:
    shown = line.strip() if len(line) <= 60 else line.strip()[:57] + "..."
    return UsageError(
        f"{path}, line {number}: {shown!r} is damaged, a line looks like {example!r}: correct or remove it."
    )


def file_content(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(
            f"{path} is not a complete gzip file ({error}): remove it, or create it again."
        ) from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}): allow reading it, or remove it."
        ) from None
