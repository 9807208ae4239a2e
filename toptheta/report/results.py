"""Typed results and answers, used by scripts, tables, plots and notebooks.

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
NUMBER = re.compile(r" \w+=[\d.e-]+(?= |$)")  # an option in a method's label
OPTIONAL = ("effective_k", "kv_bytes", "missed_keys", "computed_dense")  # counts that not every run has


@dataclass(frozen=True)
class Metric:
    """A mean over questions. stderr: its standard error, None for a single question."""

    value: float
    stderr: Share | None = None
    count: Count | None = None


@dataclass(frozen=True)
class Kept:
    """Kept elements and kept V rows (per group), as shares of dense attention."""

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
    cut_prompts: int


@dataclass(frozen=True)
class CellResult:
    """The result of one cell: one task, method and K.

    method: the label that tables show; name: the method's in the registry, None in files of earlier versions;
    mode: its number in the published project. k: None if the method has none. dense: nothing is dropped.
    metrics: by name; kept: by phase, None for a phase that did not occur, or if nothing was counted.
    kv_bytes: by phase, KV bytes read as a share of those of dense attention, see attention/kv_bytes.py; None
    as with kept. missed_keys: of the keys that decode steps should keep, the share that a quantized copy of K
    misses, see attention/missed.py; None without a copy. seconds: of calibration and evaluation.
    effective_k: kept elements of individual rows, see attention/effective_k.py. computed_dense: None if
    `when_slower` leaves all calls sparse.
    extra: further keys of a data set or a table (by_length, grid, environment); failed: the number of
    requests that did not fit in memory; cut_prompts: the number of prompts longer than the model's context,
    without their beginning.
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
    missed_keys: Share | None = None
    seconds: dict[str, Seconds] = field(default_factory=dict)
    folder: str | None = None
    effective_k: list[dict[str, Any]] | None = None
    computed_dense: ComputedDense | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The method without its K, or its first option that is a number: 'Top-theta' of 'Top-theta K=64',
        'Top-p' of 'Top-p p=0.9'."""
        if self.k is None:
            return NUMBER.sub("", self.method, count=1) or self.method
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
        """The comparison of the answers with those of the dense cell of the same run, as the JSON of
        paired.Comparison; empty if nothing was compared."""
        return self.extra.get("paired", {})

    def kept_share(self, phase: str, what: str) -> float | None:
        """The kept share of 'attn' or 'vrow' in a phase; None if it was not counted."""
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
                if metric.get("stderr") == "N/A":  # written by lm-eval if there is none
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

    key: id of the question in all runs and methods; hash: of the prompt, so that answers to different
    questions are not compared. answer: the index of the chosen answer, or the generated text; None for a
    text whose perplexity was measured. score: by metric. tokens: the numbers of tokens of 'prompt' and
    'reply', as far as known. Likelihood tasks also have loglikelihoods, of each choice (nats), and target,
    the index of the correct one. reply_ids: the tokens of a reply. cluster: id of the text, such as a
    passage, that questions share, so that their answers are not independent. question: its readable text,
    the end of the prompt if that is long; choices: their texts.
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
            # A choice may have probability 0, and thus a log-likelihood of -Infinity.
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
