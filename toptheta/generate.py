"""The generation job, one cell per mode and K: calibrate thresholds, complete HumanEval tasks, run the
programs. The other data sets go their own way from `long_job` on."""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, set_seed

from toptheta import chunked, humaneval, report
from toptheta.errors import UsageError
from toptheta.files import write_json, write_text
from toptheta.llama import model_device, update_model
from toptheta.longjob import calibration_facts, end_tokens, long_job, run_long_cell
from toptheta.models import find_model, load_config, load_model, load_tokenizer
from toptheta.params import AttentionParams
from toptheta.products import Cell, append_result, say
from toptheta.qa import calibrate_on_task, check_calib_task
from toptheta.run import Run, cells, finish_run, interrupted, open_run, prepare, write_config
from toptheta.sandbox import isolation_notice
from toptheta.settings import GenSettings, label, resolve_device
from toptheta.statistics import Recorder
from toptheta.steering import record_statistics

CALIBRATION_PROMPTS = 20  # of the published project
SAMPLING = {"temperature": 0.5, "top_p": 0.95, "typical_p": 0.95}  # likewise, with --do_sample


@dataclass
class Request:
    """One completion to make. key: names it within a cell; text: what the model is shown."""

    key: str
    task_id: str
    text: str
    prompt: str
    entry_point: str


class StopWhenDone(StoppingCriteria):
    """Stops each sequence of a batch on its own once its text says all that is needed; lengths: tokens until
    then."""

    def __init__(
        self, tokenizer: Any, prompt_length: int, requests: list[Request], limits: list[int], chat: bool
    ):
        self.tokenizer, self.prompt_length, self.requests, self.chat = (
            tokenizer,
            prompt_length,
            requests,
            chat,
        )
        self.limits = limits  # tokens that each reply may have: prompts of a batch differ in length
        self.lengths: list[int | None] = [None] * len(requests)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        length = input_ids.shape[1] - self.prompt_length
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        for i, (text, request) in enumerate(zip(texts, self.requests)):
            if self.lengths[i] is None and (length >= self.limits[i] or self._done(text, request)):
                self.lengths[i] = length
        return torch.tensor([n is not None for n in self.lengths], device=input_ids.device)

    def _done(self, text: str, request: Request) -> bool:
        if not self.chat:
            return any(stop in text for stop in humaneval.STOP_SEQUENCES)
        start = text.find(f"def {request.entry_point}")
        return start >= 0 and "\n```" in text[start:]  # the block that holds the function is closed


def run_generation(settings: GenSettings, resume: str | None = None) -> list[dict[str, Any]]:
    """Run the job; returns the cells' results and prints their table. Raises UsageError."""
    source = find_model(settings.llama)
    settings = resolve_device(settings)
    config = load_config(source)
    for cell in settings.cells():
        if cell.sparse:
            settings.layer_ks(cell, config.num_hidden_layers)
    tokenizer = load_tokenizer(source)
    if settings.apply_chat_template and tokenizer.chat_template is None:
        raise UsageError(f"--apply_chat_template: {source.name} has no chat template; leave the flag out.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    notice = isolation_notice() if settings.allow_code_execution else None
    if notice:
        say(notice)

    check_calib_task(settings)
    # With --calib_task, --calib_samples counts that task's prompts: what a data set holds back for
    # calibration, and so what it evaluates, stays the same whatever calibrates.
    own = replace(settings, calib_samples=None) if settings.calib_task else settings
    job = long_job(own, tokenizer, config)
    requests = _requests(settings, tokenizer) if job is None else []
    run = open_run(settings, "gen_llama.py", resume)
    say(f"Run folder: {run.folder}")
    results, model = [], None
    try:
        for cell, product in cells(run, config.num_hidden_layers):
            if product.finished:
                results.append(product.results())
                continue
            if model is None:
                device = (
                    "auto" if settings.device == "cuda" and torch.cuda.device_count() > 1 else settings.device
                )
                model = update_model(load_model(source, settings.dtype, device))
            if job is not None:
                result = run_long_cell(run, cell, product, model, job, source.name)
            else:
                result = _run_cell(run, cell, product, model, tokenizer, requests, source.name)
            if result is not None:
                results.append(result)
    except KeyboardInterrupt:
        interrupted(run)
        raise
    if results and job is not None:
        job.finish(run, results, source.name)
    elif results:
        finish_run(run, results, source.name)
        if not settings.allow_code_execution:
            say(
                "The completions are not scored, because that runs generated programs. To run and "
                "score them:\n"
                f"  python gen_llama.py --score {run.folder} --allow_code_execution"
            )
    return results


def _requests(settings: GenSettings, tokenizer: Any) -> list[Request]:
    problems = list(humaneval.load_problems().items())[: settings.num_tasks]
    requests = []
    for (task_id, problem), sample in itertools.product(problems, range(settings.num_samples_per_task)):
        prompt = problem["prompt"]
        if settings.apply_chat_template:
            message = settings.prompt_prefix + humaneval.chat_message(prompt) + settings.prompt_suffix
            chat = [{"role": "user", "content": message}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        else:
            text = settings.prompt_prefix + prompt + settings.prompt_suffix
        requests.append(Request(f"{task_id}#{sample}", task_id, text, prompt, problem["entry_point"]))
    return requests


def _run_cell(
    run: Run,
    cell: AttentionParams,
    product: Cell,
    model: Any,
    tokenizer: Any,
    requests: list[Request],
    name: str,
) -> dict[str, Any] | None:
    settings = run.settings
    assert isinstance(settings, GenSettings)
    say(f"\n{label(cell)}")
    product.path.mkdir(parents=True, exist_ok=True)
    write_config(run, cell, product, model, name, calibration_facts(cell, settings))

    def calibrate(after_batch, done: set[str]) -> None:
        if settings.calib_task:
            calibrate_on_task(model, tokenizer, settings, f"Calibrating {label(cell)}", after_batch, done)
            return
        tasks = requests[:: settings.num_samples_per_task]  # one request of each
        size = settings.calib_samples or CALIBRATION_PROMPTS
        chosen = tasks[: max(1, round(size * len(tasks))) if size < 1 else int(size)]
        say(
            f"Calibrating on {len(chosen)} of the {len(tasks)} tasks that are evaluated, for HumanEval has "
            "no other split; --calib_task names another task to calibrate on."
        )
        todo = [request for request in chosen if request.key not in done]
        for batch in tqdm(
            _batches(todo, settings.batch_size), desc=f"Calibrating {label(cell)}", unit="batch"
        ):
            _generate(model, tokenizer, batch, settings)
            done.update(request.key for request in batch)
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
    todo = [request for request in requests if request.key not in product.answers]
    bar = tqdm(
        total=len(requests), desc=f"Generating {label(cell)}", unit="text", initial=len(requests) - len(todo)
    )
    try:
        for batch in _batches(todo, settings.batch_size):
            replies, prompt_lengths, lengths = _generate(model, tokenizer, batch, settings)
            prefill, decode = recorder.drain() if recorder is not None else ({}, {})
            answers = {}
            for request, reply, prompt_length, length in zip(batch, replies, prompt_lengths, lengths):
                completion = (
                    humaneval.completion_from_reply(reply, request.prompt, request.entry_point)
                    if settings.apply_chat_template
                    else humaneval.truncate_base_completion(reply)
                )
                sample = {"task_id": request.task_id, "completion": completion, "reply": reply}
                answers[request.key] = sample
                product.add_lines("samples.jsonl", [json.dumps(sample) + "\n"])
                product.add_lines("prompt_completion_lengths_per_sample.csv", [f"{prompt_length} {length}\n"])
            product.add(answers, prefill, decode, np.array(lengths) - 1)
            bar.update(len(batch))
    finally:
        bar.close()
        record_statistics(model, None)
        product.checkpoint()
    result: dict[str, Any] = {
        "model": name,
        "task": settings.dataset,
        "method": label(cell),
        "mode": cell.mode,
        "k": cell.K if cell.sparse else None,
        "metrics": {},
        "kept": product.kept_fractions() if settings.statistics else None,
        "seconds": {"calibration": calibration_seconds, "evaluation": product.seconds},
        "folder": str(product.path),
    }
    if settings.allow_code_execution:
        samples = [product.answers[request.key] for request in requests]
        result["metrics"] = _score(product.path, samples, settings.num_samples_per_task)
    product.finish(result)
    _append(run, cell, product, result)
    return result


def _batches(requests: list[Request], size: int) -> list[list[Request]]:
    """Texts of like length together. One by one keeps the order of the tasks."""
    if size > 1:
        requests = sorted(requests, key=lambda request: len(request.text))
    return [requests[i : i + size] for i in range(0, len(requests), size)]


@torch.no_grad()
def _generate(
    model: Any, tokenizer: Any, batch: list[Request], settings: GenSettings
) -> tuple[list[str], list[int], list[int]]:
    """Replies to a batch, with the tokens of each prompt and of each reply."""
    tokens = tokenizer(
        [request.text for request in batch],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not settings.apply_chat_template,  # a chat template writes its own
    ).to(model_device(model))
    prompt_length = tokens["input_ids"].shape[1]
    if prompt_length >= settings.max_seq_len:
        raise UsageError(
            f"--max_seq_len {settings.max_seq_len}: a prompt alone has {prompt_length} tokens; raise it."
        )
    if settings.do_sample:
        # The same text for the same request, whatever was generated before it: a resumed run must not differ.
        first = f"{batch[0].key}{settings.seed}".encode()
        set_seed(int.from_bytes(first, "big") % (1 << 32))
    own_lengths = tokens["attention_mask"].sum(dim=1).tolist()
    limits = [settings.max_seq_len - length for length in own_lengths]
    stop = StopWhenDone(tokenizer, prompt_length, batch, limits, settings.apply_chat_template)
    eos = end_tokens(model, tokenizer)
    out = chunked.generate(
        model,
        tokens,
        settings.prefill_chunk,
        stop,
        max_new_tokens=max(limits),
        do_sample=settings.do_sample,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.0,
        **(SAMPLING if settings.do_sample else {"temperature": None, "top_p": None, "top_k": None}),
    )
    lengths = []
    for row, stopped in zip(out.tolist(), stop.lengths):
        ends = [i + 1 for i, token in enumerate(row) if token in eos]
        lengths.append(min([len(row), *ends[:1], *([stopped] if stopped is not None else [])]))
    replies = [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(out, lengths)]
    return replies, own_lengths, lengths


def _score(
    folder: Path, samples: list[dict[str, Any]], num_samples_per_task: int
) -> dict[str, dict[str, Any]]:
    """Run the samples' programs, write their results beside them, and return pass@k."""
    metrics, rows = humaneval.score_samples(
        samples, humaneval.load_problems(), range(1, num_samples_per_task + 1)
    )
    write_text(folder / "samples.jsonl_results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {
        name: {"value": metric.value, "stderr": metric.stderr, "count": metric.count}
        for name, metric in metrics.items()
    }


def score_folder(folder: str) -> None:
    """Score the saved completions of a run or of one cell, and print the table. Raises UsageError."""
    root = Path(folder)
    found = sorted(
        path.parent for path in [root / "samples.jsonl", *root.glob("*/samples.jsonl")] if path.is_file()
    )
    if not found:
        raise UsageError(
            f"--score {folder}: no samples.jsonl there or one folder down; name a folder of gen_llama.py."
        )
    notice = isolation_notice()
    if notice:
        say(notice)
    results = []
    for path in found:
        try:
            samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines() if line]
            per_task = len(samples) // max(1, len({sample["task_id"] for sample in samples}))
        except (ValueError, KeyError):
            raise UsageError(
                f"{path / 'samples.jsonl'} is damaged: lines of JSON with a task_id are needed."
            ) from None
        say(f"\n{path}")
        metrics = _score(path, samples, per_task)
        results_file = path / "results.json"
        empty: dict[str, Any] = {
            "method": path.name,
            "kept": None,
            "seconds": {"calibration": 0.0, "evaluation": 0.0},
        }
        result = json.loads(results_file.read_text()) if results_file.is_file() else empty
        result["metrics"] = metrics
        write_json(results_file, result)
        results.append(result)
    print("\n" + report.results_table(results))


def _append(run: Run, cell: AttentionParams, product: Cell, result: dict[str, Any]) -> None:
    """Append to results-<Model>/..., as the published project does."""
    settings = run.settings
    assert isinstance(settings, GenSettings)
    config = json.loads((product.path / "config.json").read_text())
    placement = cell.placement if cell.sparse else "none"
    rows = [[name, f"{metric['value']:1.4f}"] for name, metric in result["metrics"].items()]
    names = ("num_tasks", "num_samples_per_task", "max_seq_len", "prompt_prefix", "prompt_suffix")
    options = " ".join(f"{name}:{getattr(settings, name)!r}" for name in names)
    text = (
        f"{run.folder.name}\n{report.settings_line(config)}\ndataset:{settings.dataset} {options}\n"
        f"{report.table(rows, ['Metric', 'Score'])}\n\n"
    )
    name = f"{result['model']}_{settings.dataset}_mode{cell.mode}_placement{placement}.txt"
    append_result(Path(f"results-{result['model']}"), name, text)
