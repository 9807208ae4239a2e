"""The loop over cells, for all data sets of both scripts: calibrate, evaluate, save, report, resume."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from toptheta.eval import processes
from toptheta.eval.cell import Cell
from toptheta.eval.cell_params import CellParams
from toptheta.eval.checkpoint import Checkpoint, check_loaded, prepare
from toptheta.eval.run import (
    Run,
    cells,
    open_run,
    product_folder,
    resumable,
    task_parts,
    write_config,
)
from toptheta.eval.settings import (
    HUMANEVAL,
    LONGBENCH,
    NEEDLE,
    PERPLEXITY,
    GenSettings,
    QASettings,
    Settings,
    resolve_device,
)
from toptheta.eval.tasks.base import Engine, Job, Outcome
from toptheta.eval.tasks.harness import check_calib_task, data_hash
from toptheta.eval.tasks.humaneval.job import HumanEvalJob
from toptheta.eval.tasks.items import ItemJob
from toptheta.eval.tasks.longbench import LongBenchJob
from toptheta.eval.tasks.needle import NeedleJob
from toptheta.eval.tasks.perplexity import PerplexityJob
from toptheta.eval.tasks.qa import qa_jobs
from toptheta.models.control import record_statistics, take_dense_calls
from toptheta.models.fingerprint import fingerprint
from toptheta.models.loading import (
    ModelSource,
    check_tokens,
    find_model,
    load_config,
    load_tokenizer,
    set_padding,
)
from toptheta.models.recorder import Recorder
from toptheta.report.results import CellResult, ComputedDense
from toptheta.report.summary import draw_cell, report_run, report_tasks, write_page
from toptheta.report.tables import settings_line
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import append_result, check_writable
from toptheta.util.progress import CALIBRATING, EVALUATING, RunProgress, Stage, begin

SCRIPTS: dict[type[Settings], str] = {QASettings: "test_llama.py", GenSettings: "gen_llama.py"}
DATA_SETS: dict[str, type[ItemJob]] = {
    HUMANEVAL: HumanEvalJob,
    **dict.fromkeys(LONGBENCH, LongBenchJob),
    PERPLEXITY: PerplexityJob,
    NEEDLE: NeedleJob,
}


@processes.together()
def evaluate(settings: Settings, resume: str | None = None, page: bool = True) -> list[CellResult]:
    """Run every cell of the settings that a run to `resume` has not finished; returns the results of all, and
    prints a table for each task. page: write the run's report.html. All processes that were started together
    share the work. Raises UsageError, for a cell that fails after the others have run."""
    source = find_model(settings.llama)
    processes.from_first(lambda: _check_folders(settings, resume, source.name))
    settings = resolve_device(settings)
    config = load_config(source)
    for cell in settings.cells():
        if cell.sparse:
            settings.layer_ks(cell, config.num_hidden_layers)
    check_loaded(settings, config)
    jobs = _jobs(settings, source, config)
    for notice in jobs[0].notices:
        say(notice)
    dense = [cell.label for cell in settings.cells() if cell.sparse and cell.method.decode_only]
    if dense and isinstance(settings, QASettings):
        say(
            f"{', '.join(dense)}: prompts are computed dense, so a task without generation gives the results "
            "of dense attention."
        )
    run = open_run(settings, SCRIPTS[type(settings)], resume, lambda: _inputs(source, config, jobs))
    say(f"Run folder: {run.folder}")
    with resumable(run):
        return _run_parts(run, jobs, source, config.num_hidden_layers, page)


def _inputs(source: ModelSource, config: Any, jobs: list[Job]) -> dict[str, str]:
    """The hashes of the model and of each job's data, by their names in messages."""
    settings = jobs[0].settings
    given = ((name, getattr(settings, name, None)) for name in ("text", "calib_text", "data_dir"))
    files = ", ".join(f"--{name} {value}" for name, value in given if value)
    where = f" ({files})" if files else ""
    model = {f"the model {source.name}": fingerprint(source, config)}
    data = {f"the data of {job.task}{where}": job.data_hash() for job in jobs}
    if settings.calib_task:
        data[f"the data of --calib_task {settings.calib_task}"] = data_hash(check_calib_task(settings))
    return model | data


def _run_parts(
    run: Run, jobs: list[Job], source: ModelSource, num_layers: int, page: bool
) -> list[CellResult]:
    parts, results, failed = task_parts(run), list[CellResult](), dict[str, str]()
    engine: Engine | None = None
    progress = RunProgress(_stages(parts, jobs))
    for part, job in zip(parts, jobs):
        of_task = []
        for cell, product in cells(part, num_layers):
            if product.finished:
                of_task.append(product.result())
                continue
            if part.settings.calibrate_only and not cell.needs_calibration:
                say(f"{cell.label}: nothing to calibrate, and --calibrate_only evaluates nothing.")
                continue
            engine = engine or _load(job, source)
            try:
                with progress.shown():
                    result = _run_cell(part, cell, product, engine, job, source.name)
            except UsageError as error:
                if processes.world_size() > 1:  # the others are not where this one is
                    raise
                failed[cell.label] = str(error)
                say(failed[cell.label])
                continue
            if result is not None:
                of_task.append(result)
        results += processes.from_first(lambda: _report(part, job, of_task, source.name))  # noqa: B023
    if len(parts) > 1 and results:
        processes.from_first(lambda: report_tasks(run.folder, [part.folder for part in parts], results))
    if results and page:
        processes.from_first(lambda: write_page(run.folder))
    if failed:
        raise _joined(failed, whole=not results)
    return results


def _check_folders(settings: Settings, resume: str | None, model_name: str) -> None:
    """Raise UsageError, before anything is computed, for a folder that a cell could not write to in the
    end."""
    if resume is not None:
        check_writable(resume, "--resume", "make it writable, or start a new run with --output_dir")
    else:
        check_writable(settings.output_dir, "--output_dir", "name another folder")
    if not settings.calibrate_only:
        remedy = "start in a folder that can be written to"
        check_writable(_summaries(model_name), "the folder of the summaries,", remedy)


def _summaries(model_name: str) -> Path:
    """The folder to which the published project appends its results, in the current one."""
    return Path(f"results-{model_name}")


def _joined(failed: dict[str, str], whole: bool) -> UsageError:
    """The errors of cells, by label, as one. whole: no cell has a result."""
    reasons = " ".join(dict.fromkeys(failed.values()))
    if whole and len(failed) == 1:
        return UsageError(reasons)
    others = "" if whole else "; the other cells are finished"
    return UsageError(f"{', '.join(failed)} could not be computed{others}. {reasons}")


def _report(part: Run, job: Job, results: list[CellResult], model_name: str) -> list[CellResult]:
    """Print and save a task's table; returns its results, compared with dense."""
    if results:
        results = report_run(part.folder, results, job.title(model_name))
        if hint := job.hint(str(part.folder)):
            say(hint)
    return results


def _load(job: Job, source: ModelSource) -> Engine:
    if not sys.stderr.isatty():  # a bar for each weight has no place in a log
        transformers_logging.disable_progress_bar()
    return job.load(source)


def _stages(parts: list[Run], jobs: list[Job]) -> list[Stage]:
    """The remaining work, in order."""
    stages = []
    for part, job in zip(parts, jobs):
        settings, (calibration, evaluation) = job.settings, job.question_counts()
        for cell in settings.cells():
            folder = product_folder(part, cell)
            if (folder / "results.json").is_file():
                continue
            if cell.needs_calibration and not settings.calib_load_path:
                stages.append(Stage(cell.label, CALIBRATING, calibration))
            if not settings.calibrate_only:
                stages.append(Stage(cell.label, EVALUATING, evaluation))
    return stages


def _jobs(settings: Settings, source: ModelSource, config: Any) -> list[Job]:
    """A job for each part of the run. Raises UsageError for a job that is not possible, before the model is
    loaded."""
    if isinstance(settings, QASettings):
        return list(qa_jobs(settings))
    assert isinstance(settings, GenSettings)
    tokenizer = load_tokenizer(source)
    if settings.apply_chat_template and tokenizer.chat_template is None:
        raise UsageError(f"--apply_chat_template: {source.name} has no chat template; leave the flag out.")
    set_padding(tokenizer, config)
    check_calib_task(settings)
    kind = DATA_SETS[settings.dataset]
    if settings.max_seq_len > config.max_position_embeddings:
        raise UsageError(
            f"--max_seq_len {settings.max_seq_len} is more than the model's context of "
            f"{config.max_position_embeddings} tokens: lower it."
        )
    job = kind(settings, tokenizer)
    check_tokens((item.ids for item in [*job.calibration, *job.items]), config, source.name)
    return [job]


def _run_cell(
    run: Run, cell: CellParams, product: Cell, engine: Engine, job: Job, model_name: str
) -> CellResult | None:
    """Calibrate and evaluate one cell; None with --calibrate_only."""
    settings, model = job.settings, engine.model
    say(f"\n{cell.label}")
    processes.from_first(lambda: write_config(run, cell, product, model, model_name, job.facts(cell)))

    def calibrate(checkpoint: Checkpoint) -> None:
        if job.calibration_note:
            say(job.calibration_note)
        job.calibrate(engine, f"Calibrating {cell.label}", checkpoint)

    record_statistics(model, None)
    begin(cell.label, CALIBRATING)
    calibration_seconds = prepare(run, cell, product, model, calibrate)
    if settings.calibrate_only:
        say(f"Calibrated tables of {cell.label}: {product.path}")
        return None
    recorder = None
    if settings.statistics:
        recorder = Recorder(settings.vrow_popularity, product.effective_k)
    record_statistics(model, recorder)
    if cell.sparse and cell.when_slower == "dense":
        take_dense_calls(model)  # from here on
        product.take_calls = partial(take_dense_calls, model)
    product.start_clock()
    begin(cell.label, EVALUATING)
    try:
        outcome = job.evaluate(engine, product, recorder, f"Evaluating {cell.label}")
    finally:
        record_statistics(model, None)
        product.checkpoint()
    return processes.from_first(
        lambda: _finish(run, cell, product, job, outcome, calibration_seconds, model_name)
    )


def _finish(
    run: Run,
    cell: CellParams,
    product: Cell,
    job: Job,
    outcome: Outcome,
    calibration_seconds: float,
    model_name: str,
) -> CellResult:
    """Write the output of an evaluated cell. Raises UsageError for a metric that is not finite."""
    settings = job.settings
    wrong = {name: one.value for name, one in outcome.metrics.items() if not math.isfinite(one.value)}
    for name, value in wrong.items():
        raise UsageError(
            f"{cell.label}: {name} is {value}, because the score of a question is not a finite number; if "
            "the model overflows, use --dtype float32."
        )
    result = CellResult(
        method=cell.label,
        model=model_name,
        task=job.task,
        name=cell.method.name,
        mode=cell.method.mode,
        k=cell.k,
        dense=not cell.sparse,
        num_fewshot=job.num_fewshot,
        metrics=outcome.metrics,
        kept=product.kept_shares() if settings.statistics else None,
        kv_bytes=product.kv_bytes() if settings.statistics else None,
        missed_keys=product.missed_keys() if settings.statistics else None,
        seconds={"calibration": calibration_seconds, "evaluation": product.seconds},
        folder=str(product.path),
        computed_dense=None if product.take_calls is None else ComputedDense(*product.calls),
        extra=outcome.extra | ({"failed": len(product.failed)} if product.failed else {}),
    )
    draw_cell(result, product.path)
    _append(run, cell, product, result, outcome)  # once it is finished, nothing is done again
    return product.finish(result, outcome.answers, outcome.files)


def _append(run: Run, cell: CellParams, product: Cell, result: CellResult, outcome: Outcome) -> None:
    """Append to results-<Model>/..., as the published project does."""
    config = json.loads((product.path / "config.json").read_text())
    text = f"{run.top.name}\n{settings_line(config)}\n{outcome.summary}\n"
    method = cell.method.folder(None) if cell.method.mode is None else f"mode{cell.method.mode}"
    placement = cell.placement if cell.sparse else "none"
    name = f"{result.model}_{result.task}_{method}_placement{placement}.txt"
    append_result(_summaries(result.model), name, text)
