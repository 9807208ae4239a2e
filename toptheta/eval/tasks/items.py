"""Jobs whose items (prompts or windows of text) are computed in batches: all jobs of gen_llama.py."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from toptheta.eval import processes
from toptheta.eval.batches import Batches, unfinished
from toptheta.eval.cell import Cell
from toptheta.eval.checkpoint import Checkpoint
from toptheta.eval.settings import GenSettings
from toptheta.eval.tasks import harness
from toptheta.eval.tasks.base import Engine, Job, Outcome
from toptheta.eval.tasks.lm_eval_tasks import task_defaults
from toptheta.models import generation as chunked
from toptheta.models.finite import checked
from toptheta.models.patch import model_device
from toptheta.models.planning import announce_prompts, begin_prompts
from toptheta.models.recorder import Recorder
from toptheta.report.results import Answer, Metric
from toptheta.report.tables import table
from toptheta.util.console import say
from toptheta.util.errors import UsageError

CALIBRATION_ITEMS = 20  # as in the published project


@dataclass
class Item:
    """One prompt or window. key: its id within a cell, without spaces; ids: its tokens; facts: what else the
    job needs; cluster: the id of what it shares with other items, question: its readable text, see Answer."""

    key: str
    ids: list[int]
    facts: dict[str, Any] = field(default_factory=dict)
    cluster: str | None = None
    question: str | None = None

    @property
    def hash(self) -> str:
        """The hash of the tokens, for answers.jsonl."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()[:16]


class ItemJob(Job):
    """items: those to evaluate; calibration: other items (except for HumanEval), for the thresholds. unit: of
    the progress bar; options: settings in its line in results-<Model>/."""

    unit = "text"
    options: tuple[str, ...] = ("num_tasks", "max_seq_len", "text")
    settings: GenSettings

    def __init__(self, settings: GenSettings, tokenizer: Any):
        super().__init__(settings, settings.dataset)
        self.tokenizer = tokenizer
        self.items: list[Item] = []
        self.calibration: list[Item] = []

    @abstractmethod
    def run(self, model: Any, batch: list[Item]) -> list[dict[str, Any]]:
        """Answers to a batch, in a form that JSON can save."""

    def calibrate_on(self, model: Any, batch: list[Item]) -> None:
        """Run a batch during calibration."""
        self.run(model, batch)

    @abstractmethod
    def outcome(self, answers: list[dict[str, Any]]) -> Outcome:
        """The results from the answers to all items."""

    def no_answer(self, item: Item) -> dict[str, Any]:
        """The answer recorded for an item that does not fit in memory. Raises UsageError if there can be
        none."""
        raise UsageError(
            f"--max_seq_len {self.settings.max_seq_len}: {item.key} does not fit in memory, even alone; "
            "lower it, or set --prefill_chunk."
        )

    def decode_steps(self, answers: list[dict[str, Any]]) -> np.ndarray | None:
        """`[B]`, the number of decode steps of each sequence to count; None: all."""
        return None

    def lines(self, answer: dict[str, Any]) -> dict[str, str]:
        """Lines that an answer adds to product files, by file name."""
        return {}

    def question_counts(self) -> tuple[float, float]:
        task, size = self.settings.calib_task, self.settings.calib_samples
        return max(1.0, size or task_defaults(task).calib_samples) if task else len(self.calibration), len(
            self.items
        )

    def data_hash(self) -> str:
        digest = hashlib.sha256()
        for item in (*self.calibration, *self.items):
            digest.update(f"{item.key} {item.hash}\n".encode())
        return digest.hexdigest()[:16]

    def calibrate(self, engine: Engine, description: str, progress: Checkpoint) -> None:
        settings, task = self.settings, self.settings.calib_task
        if task is not None:
            lm = harness.around(engine.model, self.tokenizer, settings.batch_size)
            plain = replace(settings, apply_chat_template=False)  # the task has its own format
            shots = task_defaults(task).num_fewshot
            harness.calibrate_on_task(lm, plain, task, shots, description, progress)
            return
        announce_prompts(engine.model, {item.key: (0, len(item.ids)) for item in self.calibration})
        batches = Batches(settings.batch_size)
        todo = _batches(self.calibration, batches.size, progress.done)
        total = len(self.calibration)

        def show(batch: list[Item]) -> None:
            begin_prompts(engine.model, [item.key for item in batch])
            self.calibrate_on(engine.model, batch)

        def run(batch: list[Item]) -> None:
            keys = [item.key for item in batch]
            with progress.counting(keys):
                checked(engine.model, show, batch, lambda item: item.key)
            advance(len(batch), sum(len(item.ids) for item in batch))

        def failed(item: Item) -> None:
            say(f"Out of memory on {item.key} alone: calibration continues without it.")
            progress.skip(item.key)

        with processes.progress(total, total - sum(map(len, todo)), self.unit, description) as advance:
            share = processes.share(todo)
            while share := unfinished(share, progress.done, _key):  # memory that ran out may have undone some
                batches.run(share, run, progress.restore, failed)

    def evaluate(self, engine: Engine, product: Cell, recorder: Recorder | None, description: str) -> Outcome:
        batches = Batches(self.settings.batch_size)
        todo = _batches(self.items, batches.size, product.answers)
        total = len(self.items)

        def drain() -> Any:
            return recorder.drain() if recorder is not None else ({}, {})

        def run(batch: list[Item]) -> None:
            answers = checked(engine.model, lambda some: self.run(engine.model, some), batch, lambda i: i.key)
            by_key = {item.key: answer for item, answer in zip(batch, answers)}
            prefill, decode = drain()
            product.add(by_key, prefill, decode, self.decode_steps(answers))
            advance(len(batch), sum(len(item.ids) for item in batch) + _reply_tokens(answers))

        def failed(item: Item) -> None:
            product.fail(item.key, self.no_answer(item))

        with processes.progress(total, total - sum(map(len, todo)), self.unit, description) as advance:
            batches.run(processes.share(todo), run, drain, failed)
            product.checkpoint()  # here: neither waiting nor scoring is part of the evaluation's time
        product.join()
        return processes.from_first(lambda: self._scored(product))

    def _scored(self, product: Cell) -> Outcome:
        answers = [product.answers[item.key] for item in self.items]
        outcome = self.outcome(answers)
        lines: dict[str, list[str]] = {}
        for answer in answers:  # in the order of the items, whatever that of the batches was
            for name, line in self.lines(answer).items():
                lines.setdefault(name, []).append(line)
        outcome.files |= {name: "".join(of_file) for name, of_file in lines.items()}
        rows = [[name, f"{metric.value:1.4f}"] for name, metric in outcome.metrics.items()]
        options = " ".join(f"{name}:{getattr(self.settings, name)!r}" for name in self.options)
        outcome.summary = f"dataset:{self.task} {options}\n{table(rows, ['Metric', 'Score'])}\n"
        return outcome


class ReplyJob(ItemJob):
    """A job that generates a reply to each prompt. max_new: maximum tokens of a reply."""

    max_new = 0

    def run(self, model: Any, batch: list[Item]) -> list[dict[str, Any]]:
        replies = reply(model, self.tokenizer, batch, self.max_new, self.settings.prefill_chunk)
        return [self.judged(item, answer) for item, answer in zip(batch, replies)]

    def judged(self, item: Item, answer: dict[str, Any]) -> dict[str, Any]:
        """The reply with further results to save."""
        return answer

    def no_answer(self, item: Item) -> dict[str, Any]:
        counts = {"prompt_tokens": len(item.ids), "reply_tokens": 0}
        return self.judged(item, {"key": item.key, "reply": "", **counts, "reply_ids": []})

    def decode_steps(self, answers: list[dict[str, Any]]) -> np.ndarray:
        return np.array([answer["reply_tokens"] - 1 for answer in answers])  # the first comes out of prefill

    def lines(self, answer: dict[str, Any]) -> dict[str, str]:
        lengths = f"{answer['prompt_tokens']} {answer['reply_tokens']}\n"
        return {
            "predictions.jsonl": json.dumps(_without_ids(answer)) + "\n",
            "prompt_completion_lengths_per_sample.csv": lengths,
        }

    def answers(self, answers: list[dict[str, Any]], scores: list[dict[str, float]]) -> list[Answer]:
        """Lines of answers.jsonl: the replies to all items, and the scores of each."""
        return [
            Answer(
                item.key,
                item.hash,
                answer["reply"],
                score,
                {"prompt": answer["prompt_tokens"], "reply": answer["reply_tokens"]},
                reply_ids=answer.get("reply_ids"),
                cluster=item.cluster,
                question=item.question,
            )
            for item, answer, score in zip(self.items, answers, scores)
        ]

    def prompt_ids(self, text: str) -> list[int]:
        """Tokens of a prompt, in the chat template with --apply_chat_template."""
        if self.settings.apply_chat_template:
            chat = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer(text)["input_ids"]


def reply(
    model: Any, tokenizer: Any, batch: list[Item], max_new: int, prefill_chunk: int | None
) -> list[dict[str, Any]]:
    """Greedy replies of at most `max_new` tokens: key, reply, prompt_tokens, reply_tokens, reply_ids of each
    item."""
    tokens = tokenizer.pad(
        {"input_ids": [item.ids for item in batch]}, padding_side="left", return_tensors="pt"
    ).to(model_device(model))
    ends = end_tokens(model, tokenizer)
    out = chunked.generate(
        model,
        tokens,
        prefill_chunk,
        going_on=lambda going: begin_prompts(model, [batch[i].key for i in going]),
        max_new_tokens=max_new,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    answers = []
    for item, row in zip(batch, out.tolist()):
        length = min([len(row), *(i + 1 for i, token in enumerate(row) if token in ends)])
        text = tokenizer.decode(row[:length], skip_special_tokens=True)
        counts = {"prompt_tokens": len(item.ids), "reply_tokens": length}
        answers.append({"key": item.key, "reply": text, **counts, "reply_ids": row[:length]})
    return answers


def _reply_tokens(answers: list[dict[str, Any]]) -> int:
    return sum(answer.get("reply_tokens", 0) for answer in answers)


def _without_ids(answer: dict[str, Any]) -> dict[str, Any]:
    """The part of an answer in predictions.jsonl; its tokens are in answers.jsonl."""
    return {name: value for name, value in answer.items() if name != "reply_ids"}


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a reply: the tokenizer's, the model's, and Llama 3's end of turn."""
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    end_of_turn = tokenizer.get_vocab().get("<|eot_id|>")
    return sorted(token for token in ends | {end_of_turn} if token is not None)


def split_off(
    entries: Sequence[Any], settings: GenSettings, most: int, what: str
) -> tuple[Sequence[Any], Sequence[Any]]:
    """The first entries, for calibration (`most`, unless --calib_samples is given), and the rest, for
    evaluation. Raises UsageError if nothing would be left."""
    count = calibration_count(settings, most, len(entries))
    if count >= len(entries):
        raise UsageError(
            f"--dataset {settings.dataset}: there are {len(entries)} {what}, and calibrating on {count} of "
            "them leaves none to evaluate: lower --calib_samples, or give more text."
        )
    return entries[:count], entries[count:]


def calibration_count(settings: GenSettings, usual: int, available: int) -> int:
    """The number of `available` entries for calibration: --calib_samples, a count or a share below 1, else
    `usual`.

    With --calib_task that flag counts the task's prompts, and the usual number of entries is never evaluated.
    With --calib_text it counts the windows of that text, and as many of --text are not evaluated, as without
    --calib_text: calibrated methods and others are on the same windows.
    """
    size = usual if settings.calib_task else settings.calib_samples or usual
    return max(1, round(size * available)) if size < 1 else int(size)


def mean_and_stderr(values: Sequence[float]) -> Metric:
    """The mean of independent values, its standard error (None for a single value) and their count."""
    array = np.asarray(values, dtype=float)
    stderr = float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else None
    return Metric(float(array.mean()), stderr, len(array))


def _key(item: Item) -> str:
    return item.key


def _batches(items: list[Item], size: int, done: Container[str]) -> list[list[Item]]:
    """Batches of items of similar length, without finished items; with size 1 the order is kept. Batches do
    not depend on what is finished, so that rounding and random numbers stay the same."""
    if size > 1:
        items = sorted(items, key=lambda item: len(item.ids))
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    return unfinished(batches, done, _key)
