"""Typed results, used by scripts, sweeps, tables, plots and notebooks, and the answers that they come from.

The JSON keys are those of results.json. Files of earlier versions, which lack some keys, can be read. This
module does not import torch, because plots import it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite, isnan
from pathlib import Path
from typing import Any, TypedDict

from toptheta.util.errors import UsageError
from toptheta.util.files import write_text
from toptheta.util.schema import Count, Seconds, Share, parse_json, read_json, typed

PHASES = PREFILL, DECODE = "prefill", "generative_decoding"
ANSWERS = "answers.jsonl"
NUMBER = re.compile(r" \w+=[\d.e-]+$")  # an option at the end of a method's label
OPTIONAL = ("effective_k", "kv_bytes", "computed_dense")  # counts that not every run has


@dataclass(frozen=True)
class Metric:
    """A mean over questions. stderr: its standard error, None for a single question."""

    value: float
    stderr: Share | None = None
    count: Count | None = None


@dataclass(frozen=True)
class Kept:
    """What attention kept, as shares of dense attention: elements, and V rows per group."""

    attn: Share
    vrow: Share


@dataclass(frozen=True)
class ComputedDense:
    """The number of calls of sparse layers that `when_slower` computed dense, and of all their calls."""

    dense: Count
    calls: Count


class ByLength(TypedDict):
    length: Count
    tokens: Count
    ppl: float


class Point(TypedDict):
    length: Count
    depth: float
    found: Count
    count: Count


class KeptByRow(TypedDict):
    phase: str
    k: Count


class Extra(TypedDict, total=False):
    """The known keys of a result's `extra`."""

    by_length: list[ByLength]
    grid: list[Point]
    paired: dict[str, Any]
    failed: int


@dataclass(frozen=True)
class CellResult:
    """The result of one cell: one task, method and K.

    method: the label that tables show; name: the method's in the registry, None in files of earlier versions;
    mode: the published project's number of it. k: None where the method has none. dense: nothing is dropped.
    metrics: by name; kept: by phase, None for a phase that did not occur, or where nothing was counted.
    kv_bytes: by phase, KV bytes read as a share of those of dense attention, see attention/kv_bytes.py; None
    as with kept. seconds: of calibration and evaluation. effective_k: what single rows keep, see
    attention/effective_k.py. computed_dense: None where `when_slower` leaves all calls sparse.
    extra: what a data set or a table adds (by_length, grid, environment); failed: how many
    requests did not fit the memory.
    """

    method: str
    model: str = ""
    task: str = ""
    name: str | None = None
    mode: int | None = None
    k: Count | None = None
    dense: bool = False
    num_fewshot: Count | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    kept: dict[str, Kept | None] | None = None
    kv_bytes: dict[str, Share | None] | None = None
    seconds: dict[str, Seconds] = field(default_factory=dict)
    folder: str | None = None
    effective_k: list[dict[str, Any]] | None = None
    computed_dense: ComputedDense | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The method without its K, or the number of its last option: 'Top-theta' of 'Top-theta K=64',
        'Top-p' of 'Top-p p=0.9'."""
        if self.k is None:
            return NUMBER.sub("", self.method) or self.method
        return self.method.removesuffix(f"K={self.k}").strip() or self.method

    @property
    def by_length(self) -> list[dict[str, Any]]:
        """Perplexity by context length: dicts with length, tokens, nll, ppl, stderr."""
        return self.extra.get("by_length", [])

    @property
    def grid(self) -> list[dict[str, Any]]:
        """Needles by context length and depth: dicts with length, depth, found, count."""
        return self.extra.get("grid", [])

    @property
    def paired(self) -> dict[str, Any]:
        """How the answers differ from those of the dense cell of the same run, as paired.Comparison has it in
        JSON; empty where nothing was compared."""
        return self.extra.get("paired", {})

    def kept_share(self, phase: str, what: str) -> float | None:
        """Share of 'attn' or 'vrow' kept in a phase; None where it was not counted."""
        kept = (self.kept or {}).get(phase)
        return None if kept is None else getattr(kept, what)

    def to_json(self) -> dict[str, Any]:
        """In the form of results.json, without empty optional keys."""
        values = asdict(self)
        extra = values.pop("extra")
        silent = [name for name in ("num_fewshot", "folder", *OPTIONAL) if values[name] is None]
        ordered = {name: values.pop(name) for name in ("model", "task")} | values
        return {name: value for name, value in ordered.items() if name not in silent} | extra

    @classmethod
    def from_json(cls, value: Any) -> "CellResult":
        """Raises UsageError for an invalid result. If `dense` is missing, a result without K is dense."""
        try:
            rest = dict(typed(value, dict[str, Any]))
            known = {f.name: rest.pop(f.name) for f in fields(cls) if f.name in rest and f.name != "extra"}
            typed(rest, Extra)
            typed(known.get("effective_k"), list[KeptByRow] | None)  # type: ignore[arg-type]
            known["metrics"] = typed(known.get("metrics", {}), dict[str, dict[str, Any]])
            for metric in known["metrics"].values():
                if metric.get("stderr") == "N/A":  # the harness's, where there is none
                    metric["stderr"] = None
            return typed({"dense": known.get("k") is None} | known | {"extra": rest}, cls)
        except ValueError as error:
            raise UsageError(f"a result of a cell is damaged ({error}).") from None


def read_result(path: Path) -> CellResult:
    """The result in a results.json. Raises UsageError if it is damaged, and OSError."""
    try:
        return CellResult.from_json(read_json(path, dict, "remove it to finish the cell again"))
    except UsageError as error:
        raise error if str(path) in str(error) else UsageError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Answer:
    """A cell's answer to one question: a line of answers.jsonl.

    key: names the question across runs and methods; hash: of what the model was asked, so that answers to
    other questions are not compared. answer: the chosen index, or the text; None for a text that was only
    read. score: by metric. tokens: of 'prompt' and 'reply', as far as known. Likelihood tasks also have
    loglikelihoods, of each choice (nats), and target, the right one. reply_ids: the tokens of a reply.
    cluster: what a question shares with others, such as a passage, so that their answers go together.
    question: its words, for people to read: the end of the prompt where that is long; choices: their texts.
    """

    key: str
    hash: str
    answer: int | str | None
    score: dict[str, float]
    tokens: dict[str, Count] = field(default_factory=dict)
    loglikelihoods: list[float] | None = None
    target: Any = None
    reply_ids: list[Count] | None = None
    cluster: str | None = None
    question: str | None = None
    choices: list[str] | None = None

    def to_json(self) -> dict[str, Any]:
        optional = ("loglikelihoods", "target", "reply_ids", "cluster", "question", "choices")
        silent = [name for name in optional if getattr(self, name) is None]
        return {name: value for name, value in asdict(self).items() if name not in silent}


def write_answers(folder: Path | str, answers: Sequence[Answer]) -> None:
    """Write answers.jsonl atomically."""
    lines = (json.dumps(answer.to_json()) + "\n" for answer in answers)
    write_text(Path(folder) / ANSWERS, "".join(lines))


def read_answers(folder: Path | str) -> list[Answer]:
    """The answers of the cell in `folder`, in order. Raises UsageError if the file is missing, a line is
    damaged, or a question occurs twice."""
    path, answers = Path(folder) / ANSWERS, dict[str, Answer]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UsageError(
            f"{path} is missing: name the folder of a finished cell. Earlier versions saved no answers; run "
            "such a cell again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): run the cell again.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            # A choice may well have no probability at all, and a likelihood of -Infinity.
            answer = typed(parse_json(line, finite=False), Answer)
            if answer.key in answers:
                raise ValueError(f"{answer.key} occurs twice")
            if not all(map(isfinite, answer.score.values())) or any(map(isnan, answer.loglikelihoods or ())):
                raise ValueError("a score is not finite")
        except ValueError as error:
            raise UsageError(
                f"{path}, line {number} is damaged ({error}): a line is JSON with key, hash, answer and "
                "score; run the cell again."
            ) from None
        answers[answer.key] = answer
    return list(answers.values())
