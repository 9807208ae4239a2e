"""Reading rows of local data files, with checks before anything is computed; errors name file, line, field
and reason.

Rows of the tasks in SCHEMAS must match the hub's schema; rows of other tasks must all have the same fields.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from toptheta.util.errors import UsageError
from toptheta.util.schema import parse_json, typed

Texts = Annotated[list[str], Meta(min_length=1)]
FourTexts = Annotated[list[str], Meta(min_length=4, max_length=4)]
Choice = Annotated[int, Meta(ge=0, le=3)]


class Choices(Struct):
    text: Texts
    label: Texts

    def __post_init__(self) -> None:
        if len(self.text) != len(self.label):
            raise ValueError(f"there are {len(self.text)} choices and {len(self.label)} labels")


class Arc(Struct):
    question: str
    choices: Choices
    answerKey: str

    def __post_init__(self) -> None:
        if self.answerKey not in self.choices.label:
            raise ValueError(
                f"answerKey {self.answerKey!r} is not one of the labels {', '.join(self.choices.label)}"
            )


class HellaSwag(Struct):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: FourTexts
    label: str | int

    def __post_init__(self) -> None:
        if str(self.label) not in ("0", "1", "2", "3"):
            raise ValueError(f"label {self.label!r} is not one of 0, 1, 2, 3")


class MMLU(Struct):
    question: str
    choices: FourTexts
    answer: Choice


class GSM8K(Struct):
    question: str
    answer: str


class MedMCQA(Struct):
    question: str
    opa: str
    opb: str
    opc: str
    opd: str
    cop: Choice


class LongBench(Struct):
    input: str
    context: str
    answers: Texts


SCHEMAS: dict[str, type[Struct]] = {
    "arc_easy": Arc,
    "arc_challenge": Arc,
    "hellaswag": HellaSwag,
    "mmlu": MMLU,
    "gsm8k": GSM8K,
    "medmcqa": MedMCQA,
}


def check_file(path: Path, task: str, used: bool) -> None:
    """Raise UsageError for a damaged row of a task's file. used: whether its questions are used: other splits
    may lack answers."""
    read_file(path, SCHEMAS.get(task) if used else None)


def read_file(path: Path, schema: type[Struct] | None) -> list[dict[str, Any]]:
    """`read_rows` of a file. Raises UsageError."""
    try:
        with open(path, "rb") as lines:
            return read_rows(lines, path, schema)
    except OSError as error:
        raise UsageError(f"--data_dir: {path} cannot be read ({error.strerror}).") from None


def read_rows(lines: Iterable[bytes], path: Path, schema: type[Struct] | None) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines. schema: None: all must have the same fields with the same types as
    the first. Raises UsageError for a row that does not match, and for a file without rows."""
    rows = list[dict[str, Any]]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = typed(parse_json(line.strip()), dict[str, Any])
            if schema is not None:
                typed(row, schema)
            elif rows:
                _check_alike(rows[0], row)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: {error}; correct or remove that row.") from None
        rows.append(row)
    if not rows:
        raise UsageError(f"{path} has no rows: name another folder with --data_dir.")
    return rows


def _check_alike(first: dict[str, Any], row: dict[str, Any]) -> None:
    for name in first.keys() | row.keys():
        if name not in row or name not in first:
            raise ValueError(f"{name} is missing here or in the first row")
        kinds = {type(first[name]), type(row[name])} - {type(None)}
        if len(kinds) > 1 and kinds != {int, float}:
            raise ValueError(f"{name} has another type than in the first row")
