"""Results as typed objects: what scripts, sweeps, tables, plots and notebooks hand to each other, and the
answers behind them.

The JSON keys are those of results.json. Files of earlier versions, which lack some keys, are read too. There
is no torch here: plots import this module.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toptheta.util.errors import UsageError
from toptheta.util.files import write_text

PHASES = PREFILL, DECODE = "prefill", "generative_decoding"
ANSWERS = "answers.jsonl"
NUMBER = re.compile(r" \w+=[\d.e-]+$")  # an option at the end of a method's label
OPTIONAL = ("effective_k", "kv_bytes")  # counts that not every run has


@dataclass(frozen=True)
class Metric:
    """A mean over questions. stderr: its standard error, None where there is none (a single question)."""

    value: float
    stderr: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Kept:
    """What attention kept, as shares of what dense attention uses: elements, and V rows of a group."""

    attn: float
    vrow: float


@dataclass(frozen=True)
class CellResult:
    """The result of one cell: one task, method and K.

    method: the label that tables show; name: the method's in the registry, None in files of earlier versions;
    mode: the published project's number of it. k: None where the method has none. dense: nothing is dropped.
    metrics: by name; kept: by phase, None for a phase that did not occur, or where nothing was counted.
    kv_bytes: by phase, KV bytes read as a share of those of dense attention, see attention/kv_bytes.py; None
    as with kept. seconds: of calibration and evaluation. effective_k: what single rows keep, see
    attention/effective_k.py.
    extra: what a data set or a table adds (by_length, grid, environment).
    """

    method: str
    model: str = ""
    task: str = ""
    name: str | None = None
    mode: int | None = None
    k: int | None = None
    dense: bool = False
    num_fewshot: int | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    kept: dict[str, Kept | None] | None = None
    kv_bytes: dict[str, float | None] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    folder: str | None = None
    effective_k: list[dict[str, Any]] | None = None
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
        """As results.json holds it; keys that say nothing are left out."""
        values = asdict(self)
        extra = values.pop("extra")
        silent = [name for name in ("num_fewshot", "folder", *OPTIONAL) if values[name] is None]
        ordered = {name: values.pop(name) for name in ("model", "task")} | values
        return {name: value for name, value in ordered.items() if name not in silent} | extra

    @classmethod
    def from_json(cls, value: Any) -> "CellResult":
        """Raises UsageError for what is no result. Without `dense`, what has no K is dense."""
        try:
            rest = dict(value)
            method, k = str(rest.pop("method")), rest.pop("k", None)
            dense = bool(rest.pop("dense", k is None))
            metrics = {name: _metric(metric) for name, metric in rest.pop("metrics", {}).items()}
            kept = rest.pop("kept", None)
            if kept is not None:
                kept = {phase: _kept(shares) for phase, shares in kept.items()}
            plain = ("model", "task", "name", "mode", "num_fewshot", "seconds", "folder", *OPTIONAL)
            known = {name: rest.pop(name) for name in plain if name in rest}
            return cls(method, k=k, dense=dense, metrics=metrics, kept=kept, extra=rest, **known)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"a result of a cell is damaged ({type(error).__name__}: {error}).") from None


def _metric(value: dict[str, Any]) -> Metric:
    stderr = value.get("stderr")  # the harness writes "N/A" where there is none
    return Metric(float(value["value"]), stderr if _is_number(stderr) else None, value.get("count"))


def _kept(value: dict[str, Any] | None) -> Kept | None:
    return None if value is None else Kept(float(value["attn"]), float(value["vrow"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    tokens: dict[str, int] = field(default_factory=dict)
    loglikelihoods: list[float] | None = None
    target: Any = None
    reply_ids: list[int] | None = None
    cluster: str | None = None
    question: str | None = None
    choices: list[str] | None = None

    def to_json(self) -> dict[str, Any]:
        optional = ("loglikelihoods", "target", "reply_ids", "cluster", "question", "choices")
        silent = [name for name in optional if getattr(self, name) is None]
        return {name: value for name, value in asdict(self).items() if name not in silent}


def write_answers(folder: Path | str, answers: Sequence[Answer]) -> None:
    """Write answers.jsonl, whole or not at all."""
    lines = (json.dumps(answer.to_json()) + "\n" for answer in answers)
    write_text(Path(folder) / ANSWERS, "".join(lines))


def read_answers(folder: Path | str) -> list[Answer]:
    """The answers of the cell in `folder`, in its order. Raises UsageError when the file is missing, a line
    is damaged, or a question comes twice."""
    path, answers = Path(folder) / ANSWERS, dict[str, Answer]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UsageError(
            f"{path} is missing: name the folder of a finished cell. Earlier versions kept no answers: run "
            "such a cell again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): run the cell again.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            answer = _answer(json.loads(line))
            if answer.key in answers:
                raise ValueError(f"{answer.key} comes twice")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"{path}, line {number} is damaged ({error}): a line is JSON with key, hash, answer and "
                "score; run the cell again."
            ) from None
        answers[answer.key] = answer
    return list(answers.values())


def _answer(value: dict[str, Any]) -> Answer:
    key, question = value["key"], value["hash"]
    if not isinstance(key, str) or not isinstance(question, str):
        raise TypeError("key and hash are texts")
    score = {name: float(number) for name, number in value["score"].items()}
    likelihoods, reply_ids = value.get("loglikelihoods"), value.get("reply_ids")
    return Answer(
        key,
        question,
        value["answer"],
        score,
        dict(value.get("tokens", {})),
        None if likelihoods is None else [float(number) for number in likelihoods],
        value.get("target"),
        None if reply_ids is None else [int(number) for number in reply_ids],
        value.get("cluster"),
        value.get("question"),
        value.get("choices"),
    )
