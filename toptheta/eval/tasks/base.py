"""What the data sets of gen_llama.py share: calibrate on some items, evaluate others, save, score, resume."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from toptheta.eval.cell import Cell
from toptheta.eval.run import Run, finish_run, prepare, write_config
from toptheta.eval.settings import HUMANEVAL, LONGBENCH, PERPLEXITY, GenSettings, label
from toptheta.eval.tasks.qa import calibrate_on_task
from toptheta.methods.params import AttentionParams
from toptheta.models import generation as chunked
from toptheta.models.control import record_statistics
from toptheta.models.patch import model_device
from toptheta.models.recorder import Recorder
from toptheta.report import tables as report
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import append_result

CALIBRATION_ITEMS = 20  # as many as the published project's calibration prompts


@dataclass
class Item:
    """One thing to compute. key: names it within a cell, without spaces; ids: tokens of the prompt or
    window; facts: what the job needs beside them."""

    key: str
    ids: list[int]
    facts: dict[str, Any] = field(default_factory=dict)


class GenJob(ABC):
    """One data set. items: what is evaluated; calibration: other items (HumanEval has none), for the
    thresholds. Both are the same in every cell, dense ones included, so that cells compare. options: settings
    that its line in results-<Model>/ names."""

    unit = "text"
    options: tuple[str, ...] = ("num_tasks", "max_seq_len", "text")
    calibration_note = ""  # said when `calibration` is about to be read

    def __init__(self, settings: GenSettings, tokenizer: Any):
        self.settings, self.tokenizer = settings, tokenizer
        self.items: list[Item] = []
        self.calibration: list[Item] = []

    @abstractmethod
    def run(self, model: Any, batch: list[Item]) -> list[dict[str, Any]]:
        """Answers to a batch, as JSON saves them."""

    @abstractmethod
    def metrics(self, answers: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
        """{name: {value, stderr, count}} of all answers; folder: the cell's, for what is found on the way."""

    def decode_steps(self, answers: list[dict[str, Any]]) -> np.ndarray | None:
        """`[B]` how many decode steps of each sequence count; None: all."""
        return None

    def lines(self, answer: dict[str, Any]) -> dict[str, str]:
        """Lines that an answer adds to product files, by file name."""
        return {}

    def write(self, folder: Path, answers: list[dict[str, Any]], title: str) -> dict[str, Any]:
        """Write further files of a finished cell; returns what to add to its results.json."""
        return {}

    def finish(self, run: Run, results: list[dict[str, Any]], model_name: str) -> None:
        """Print and save the table of all cells."""
        finish_run(run, results, model_name)


class ReplyJob(GenJob):
    """A job that reads the reply to a prompt. max_new: most tokens of a reply."""

    max_new = 0

    def run(self, model: Any, batch: list[Item]) -> list[dict[str, Any]]:
        return reply(model, self.tokenizer, batch, self.max_new, self.settings.prefill_chunk)

    def decode_steps(self, answers: list[dict[str, Any]]) -> np.ndarray:
        return np.array([answer["reply_tokens"] - 1 for answer in answers])  # the first comes out of prefill

    def lines(self, answer: dict[str, Any]) -> dict[str, str]:
        lengths = f"{answer['prompt_tokens']} {answer['reply_tokens']}\n"
        return {
            "predictions.jsonl": json.dumps(answer) + "\n",
            "prompt_completion_lengths_per_sample.csv": lengths,
        }

    def prompt_ids(self, text: str) -> list[int]:
        """Tokens of a prompt, within the chat template if that is asked for."""
        if self.settings.apply_chat_template:
            chat = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer(text)["input_ids"]


def reply(
    model: Any, tokenizer: Any, batch: list[Item], max_new: int, prefill_chunk: int | None
) -> list[dict[str, Any]]:
    """Greedy replies of at most `max_new` tokens: key, reply, prompt_tokens, reply_tokens of each item."""
    tokens = tokenizer.pad(
        {"input_ids": [item.ids for item in batch]}, padding_side="left", return_tensors="pt"
    ).to(model_device(model))
    ends = end_tokens(model, tokenizer)
    out = chunked.generate(
        model,
        tokens,
        prefill_chunk,
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
        answers.append(
            {"key": item.key, "reply": text, "prompt_tokens": len(item.ids), "reply_tokens": length}
        )
    return answers


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a reply: the tokenizer's, the model's, and Llama 3's end of turn."""
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    end_of_turn = tokenizer.get_vocab().get("<|eot_id|>")
    return sorted(token for token in ends | {end_of_turn} if token is not None)


def split_off(
    entries: Sequence[Any], settings: GenSettings, most: int, what: str
) -> tuple[Sequence[Any], Sequence[Any]]:
    """The first entries, to calibrate on, and the rest, to evaluate: `most` of them unless --calib_samples
    says how many. Raises UsageError when nothing would be left."""
    size = settings.calib_samples or most
    count = max(1, round(size * len(entries))) if size < 1 else int(size)
    if count >= len(entries):
        raise UsageError(
            f"--dataset {settings.dataset}: there are {len(entries)} {what}, and {count} of them to "
            "calibrate on leave none to evaluate: set --calib_samples lower, or give more text."
        )
    return entries[:count], entries[count:]


def mean_and_stderr(values: Sequence[float]) -> dict[str, Any]:
    """The mean of independent values, its standard error (None for a single value) and their count."""
    array = np.asarray(values, dtype=float)
    stderr = float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else None
    return {"value": float(array.mean()), "stderr": stderr, "count": len(array)}


def gen_job(settings: GenSettings, tokenizer: Any, config: Any) -> GenJob:
    """The job of settings.dataset. Raises UsageError for what it cannot do."""
    if settings.dataset == HUMANEVAL:
        from toptheta.eval.tasks.humaneval_job import HumanEvalJob

        return HumanEvalJob(settings, tokenizer)
    if settings.max_seq_len > config.max_position_embeddings:
        raise UsageError(
            f"--max_seq_len {settings.max_seq_len} is more than the {config.max_position_embeddings} tokens "
            "that the model reads: lower it."
        )
    if settings.dataset in LONGBENCH:
        from toptheta.eval.tasks.longbench import LongBenchJob

        return LongBenchJob(settings, tokenizer)
    if settings.dataset == PERPLEXITY:
        from toptheta.eval.tasks.perplexity import PerplexityJob

        return PerplexityJob(settings, tokenizer)
    from toptheta.eval.tasks.needle import NeedleJob

    return NeedleJob(settings, tokenizer)


def calibration_facts(cell: AttentionParams, settings: GenSettings) -> dict[str, Any]:
    """What config.json says of the data beside the settings."""
    facts = {"task": settings.dataset}
    if cell.needs_calibration and not settings.calib_load_path:
        facts["calib_task"] = settings.calibration_task
    return facts


def run_cell(
    run: Run, cell: AttentionParams, product: Cell, model: Any, job: GenJob, name: str
) -> dict[str, Any] | None:
    """Calibrate and evaluate one cell; its results.json, or None with --calibrate_only."""
    settings = job.settings
    say(f"\n{label(cell)}")
    product.path.mkdir(parents=True, exist_ok=True)
    write_config(run, cell, product, model, name, calibration_facts(cell, settings))

    def calibrate(after_batch, done: set[str]) -> None:
        description = f"Calibrating {label(cell)}"
        if settings.calib_task:
            assert isinstance(run.settings, GenSettings)
            calibrate_on_task(model, job.tokenizer, run.settings, description, after_batch, done)
            return
        if job.calibration_note:
            say(job.calibration_note)
        todo = [item for item in job.calibration if item.key not in done]
        for batch in tqdm(_batches(todo, settings.batch_size), desc=description, unit="batch"):
            job.run(model, batch)
            done.update(item.key for item in batch)
            after_batch()

    record_statistics(model, None)
    calibration_seconds = prepare(run, cell, product, model, calibrate)
    if settings.calibrate_only:
        say(f"Tables of {label(cell)}: {product.path}")
        return None
    recorder = (
        Recorder(model.config.num_attention_heads, settings.vrow_popularity, product.effective_k)
        if settings.statistics
        else None
    )
    record_statistics(model, recorder)
    product.start_clock()
    todo = [item for item in job.items if item.key not in product.answers]
    bar = tqdm(
        total=len(job.items),
        desc=f"Evaluating {label(cell)}",
        unit=job.unit,
        initial=len(job.items) - len(todo),
    )
    try:
        for batch in _batches(todo, settings.batch_size):
            answers = job.run(model, batch)
            prefill, decode = recorder.drain() if recorder is not None else ({}, {})
            for answer in answers:
                for file, line in job.lines(answer).items():
                    product.add_lines(file, [line])
            by_key = {item.key: answer for item, answer in zip(batch, answers)}
            product.add(by_key, prefill, decode, job.decode_steps(answers))
            bar.update(len(batch))
    finally:
        bar.close()
        record_statistics(model, None)
        product.checkpoint()
    answers = [product.answers[item.key] for item in job.items]
    result: dict[str, Any] = {
        "model": name,
        "task": settings.dataset,
        "method": label(cell),
        "mode": cell.mode,
        "k": cell.K if cell.sparse else None,
        "metrics": job.metrics(answers, product.path),
        "kept": product.kept_fractions() if settings.statistics else None,
        "seconds": {"calibration": calibration_seconds, "evaluation": product.seconds},
        "folder": str(product.path),
    }
    result |= job.write(product.path, answers, f"{name}, {label(cell)}")
    product.finish(result)
    _append(run, cell, product, result, job)
    return result


def _batches(items: list[Item], size: int) -> list[list[Item]]:
    """Items of like length together; one by one keeps their order."""
    if size > 1:
        items = sorted(items, key=lambda item: len(item.ids))
    return [items[i : i + size] for i in range(0, len(items), size)]


def _append(run: Run, cell: AttentionParams, product: Cell, result: dict[str, Any], job: GenJob) -> None:
    """Append to results-<Model>/..., as the published project does."""
    settings = job.settings
    config = json.loads((product.path / "config.json").read_text())
    rows = [[metric, f"{values['value']:1.4f}"] for metric, values in result["metrics"].items()]
    options = " ".join(f"{name}:{getattr(settings, name)!r}" for name in job.options)
    text = (
        f"{run.folder.name}\n{report.settings_line(config)}\ndataset:{settings.dataset} {options}\n"
        f"{report.table(rows, ['Metric', 'Score'])}\n\n"
    )
    placement = cell.placement if cell.sparse else "none"
    file = f"{result['model']}_{settings.dataset}_mode{cell.mode}_placement{placement}.txt"
    append_result(Path(f"results-{result['model']}"), file, text)
