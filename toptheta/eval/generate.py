"""The generation job, one cell per mode and K: calibrate thresholds, let the model write (or read) what the
data set asks for, score it. What each data set does is in its own job (`genjob.gen_job`)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from toptheta.eval.run import cells, interrupted, open_run
from toptheta.eval.sandbox.run import isolation_notice
from toptheta.eval.settings import GenSettings, resolve_device
from toptheta.eval.tasks.base import gen_job, run_cell
from toptheta.eval.tasks.humaneval_job import score
from toptheta.eval.tasks.qa import check_calib_task
from toptheta.models.loading import find_model, load_config, load_model, load_tokenizer
from toptheta.models.patch import update_model
from toptheta.report import tables as report
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import write_json


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
    job = gen_job(own, tokenizer, config)
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
            result = run_cell(run, cell, product, model, job, source.name)
            if result is not None:
                results.append(result)
    except KeyboardInterrupt:
        interrupted(run)
        raise
    if results:
        job.finish(run, results, source.name)
    return results


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
        metrics = score(path, samples, per_task)
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
