"""The Q&A job: calibrate thresholds, then run lm-eval tasks, one cell per mode and K, into one table."""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from toptheta.eval.cell import Cell
from toptheta.eval.run import Run, cells, finish_run, interrupted, open_run, prepare, task_parts, write_config
from toptheta.eval.settings import GenSettings, QASettings, Settings, label, resolve_device
from toptheta.eval.tasks.lm_eval_tasks import check_task, task_configs, task_defaults, task_names
from toptheta.methods.params import AttentionParams
from toptheta.models.loading import find_model, load_config, load_tokenizer, unpacked
from toptheta.report import tables as report
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import append_result, write_json, write_text


def run_qa(settings: QASettings, resume: str | None = None) -> list[dict[str, Any]]:
    """Run the job; returns the cells' results and prints a table per task. Raises UsageError."""
    source = find_model(settings.llama)
    tasks = task_names(settings.task)
    for task in tasks:
        check_task(task, settings.data_dir)
    check_calib_task(settings)
    settings = resolve_device(settings)
    config = load_config(source)
    for cell in settings.cells():
        if cell.sparse:
            settings.layer_ks(cell, config.num_hidden_layers)
    calibrates = any(cell.needs_calibration for cell in settings.cells()) and not settings.calib_load_path
    for task in tasks:  # before the model: data that cannot be had costs no time
        if not settings.calibrate_only:
            _load_tasks(task_configs(task, settings.data_dir, False), settings, None)
        if calibrates and not settings.calib_task:
            _load_tasks(task_configs(task, settings.data_dir, True), settings, None)

    run = open_run(settings, "test_llama.py", resume)
    say(f"Run folder: {run.folder}")
    parts = task_parts(run)
    results = []
    lm = None
    for part in parts:
        of_task = []
        try:
            for cell, product in cells(part, config.num_hidden_layers):
                if product.finished:
                    of_task.append(product.results())
                    continue
                lm = lm or _load_lm(settings, source)
                result = _run_cell(part, cell, product, lm, source.name)
                if result is not None:
                    of_task.append(result)
        except KeyboardInterrupt:
            interrupted(part)
            raise
        if of_task:
            finish_run(part, of_task, source.name)
        results += of_task
    if len(parts) > 1 and results:
        write_text(run.folder / "summary.md", "\n".join((p.folder / "summary.md").read_text() for p in parts))
        write_json(run.folder / "summary.json", results)
        say(f"All tasks: {run.folder / 'summary.md'}")
    return results


def check_calib_task(settings: QASettings | GenSettings) -> None:
    """Raise UsageError unless --calib_task, if given, is known and its data can be had."""
    if settings.calib_task is not None:
        check_task(settings.calib_task, settings.data_dir, "--calib_task")
        configs = task_configs(settings.calib_task, settings.data_dir, True, "--calib_task")
        _load_tasks(configs, settings, None)


def calibrate_on_task(
    model: Any,
    tokenizer: Any,
    settings: GenSettings,
    description: str,
    after_batch: Callable[[], None],
    done: set[str],
) -> None:
    """Run the prompts of --calib_task, in the task's own format, through a patched model."""
    from lm_eval.api.registry import get_model

    import toptheta.eval.lm_eval_model  # noqa: F401  (registers the model class)

    assert settings.calib_task is not None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = get_model("toptheta")(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size)
    lm.done, lm.after_batch, lm.description = done, after_batch, description
    defaults = task_defaults(settings.calib_task)
    configs = task_configs(settings.calib_task, settings.data_dir, True)
    size = settings.calib_samples or defaults.calib_samples
    _evaluate(lm, replace(settings, apply_chat_template=False), configs, defaults.num_fewshot, size)


def _load_lm(settings: QASettings, source: Any) -> Any:
    from lm_eval.api.registry import get_model

    import toptheta.eval.lm_eval_model  # noqa: F401  (registers the model class)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its advice is about flags that are not ours
    local = unpacked(source)
    arguments: dict[str, Any] = {"dtype": settings.dtype, "batch_size": settings.batch_size}
    arguments["device"] = settings.device
    if settings.device == "cuda":
        import torch

        arguments["parallelize"] = torch.cuda.device_count() > 1
    if local.gguf_file:
        arguments["gguf_file"] = local.gguf_file
        arguments["tokenizer"] = load_tokenizer(source)
    lm = get_model("toptheta")(pretrained=local.location, **arguments)
    lm.model.config._name_or_path = source.name
    return lm


def _run_cell(
    run: Run, cell: AttentionParams, product: Cell, lm: Any, model_name: str
) -> dict[str, Any] | None:
    settings = run.settings
    assert isinstance(settings, QASettings)
    say(f"\n{label(cell)}")
    product.path.mkdir(parents=True, exist_ok=True)
    shots = (
        settings.num_fewshot if settings.num_fewshot is not None else task_defaults(settings.task).num_fewshot
    )
    calib_task = settings.calibration_task
    calib_shots = shots if calib_task == settings.task else task_defaults(calib_task).num_fewshot
    facts = {"task": settings.task, "num_fewshot": shots}
    if cell.needs_calibration and not settings.calib_load_path:
        facts |= {"calib_task": calib_task, "calib_num_fewshot": calib_shots}
    write_config(run, cell, product, lm.model, model_name, facts)

    def calibrate(after_batch, done: set[str]) -> None:
        lm.cell, lm.done, lm.after_batch, lm.description = (
            None,
            done,
            after_batch,
            f"Calibrating {label(cell)}",
        )
        size = settings.calib_samples or task_defaults(calib_task).calib_samples
        _evaluate(lm, settings, task_configs(calib_task, settings.data_dir, True), calib_shots, size)
        lm.done, lm.after_batch = None, lambda: None

    lm.stop_recording()
    calibration_seconds = prepare(run, cell, product, lm.model, calibrate)
    if settings.calibrate_only:
        say(f"Tables of {label(cell)}: {product.path}")
        return None
    if settings.statistics:
        lm.start_recording(settings.vrow_popularity, product.effective_k)
    lm.cell, lm.description = product, f"Evaluating {label(cell)}"
    try:
        configs = task_configs(settings.task, settings.data_dir, False)
        output = _evaluate(lm, settings, configs, shots, settings.num_samples)
        product.checkpoint()
    except KeyboardInterrupt:
        product.checkpoint()
        raise
    finally:
        lm.cell = None
        lm.stop_recording()
    result = {
        "model": model_name,
        "task": settings.task,
        "method": label(cell),
        "mode": cell.mode,
        "k": cell.K if cell.sparse else None,
        "num_fewshot": shots,
        "metrics": _metrics(output),
        "kept": product.kept_fractions() if settings.statistics else None,
        "seconds": {"calibration": calibration_seconds, "evaluation": product.seconds},
        "folder": str(product.path),
    }
    product.finish(result)
    _append(run, cell, product, result, output)
    return result


def _evaluate(
    lm: Any, settings: Settings, configs: list[dict[str, Any]], shots: int | None, size: float | None
) -> dict[str, Any]:
    """Run lm-eval on tasks of these configs, on a seeded subset of `size` documents (below 1: a share)."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks, chosen = _load_tasks(configs, settings, shots), {}
    docs = {task.config.task: len(task.eval_docs) for task in tasks}
    for name, share in _shares(docs, size).items():
        chosen[name] = sorted(random.Random(settings.seed).sample(range(docs[name]), share))
    return simple_evaluate(
        model=lm,
        tasks=[task for task in tasks if chosen[task.config.task]],
        samples={name: indices for name, indices in chosen.items() if indices},
        apply_chat_template=settings.apply_chat_template,
        bootstrap_iters=1000,
        log_samples=False,
        task_manager=TaskManager(include_defaults=False),
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )


def _load_tasks(configs: list[dict[str, Any]], settings: Settings, shots: int | None) -> list[Any]:
    """The harness's task objects, with their data. Raises UsageError for data that cannot be had."""
    from lm_eval.api.task import ConfigurableTask

    tasks = []
    for config in configs:
        config = {key: value for key, value in config.items() if key not in ("tag", "group")}
        try:
            task = ConfigurableTask(config=config | ({} if shots is None else {"num_fewshot": shots}))
        except (OSError, ValueError) as error:  # no network; a damaged file; a gated or missing data set
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UsageError(
                f"the data of task {config['task']} cannot be loaded ({reason}): "
                + (
                    "mend the files in --data_dir."
                    if getattr(settings, "data_dir", None)
                    else "connect to the network, or name a folder of local rows with --data_dir."
                )
            ) from None
        task.set_fewshot_seed(settings.seed)
        tasks.append(task)
    return tasks


def _shares(docs: dict[str, int], size: float | None) -> dict[str, int]:
    """Documents to take of each sub-task: all, a share of each, or a count spread over them."""
    if size is None:
        return docs
    if size < 1:
        return {name: max(1, round(size * count)) for name, count in docs.items()}
    left, shares = int(size), {}
    for i, (name, count) in enumerate(sorted(docs.items(), key=lambda item: item[1])):
        shares[name] = min(count, -(-left // (len(docs) - i)) if left else 0)
        left -= shares[name]
    return shares


def _metrics(output: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{metric: value, stderr, count}; several sub-tasks are averaged by their size."""
    counts = {name: int(n["effective"]) for name, n in output["n-samples"].items()}
    sums: dict[str, list[tuple[float, float | None, int]]] = {}
    for task, values in output["results"].items():
        for key, value in values.items():
            metric, comma, suffix = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{suffix}")
            name = metric if suffix == "none" else f"{metric}({suffix})"
            sums.setdefault(name, []).append(
                (value, stderr if isinstance(stderr, float) else None, counts[task])
            )
    metrics = {}
    for name, parts in sums.items():
        total = sum(n for _, _, n in parts)
        known = all(stderr is not None for _, stderr, _ in parts)
        variance = sum(((stderr or 0.0) * n) ** 2 for _, stderr, n in parts) / total**2 if known else None
        metrics[name] = {
            "value": sum(value * n for value, _, n in parts) / total,
            "stderr": None if variance is None else variance**0.5,
            "count": total,
        }
    return metrics


def _append(
    run: Run, cell: AttentionParams, product: Cell, result: dict[str, Any], output: dict[str, Any]
) -> None:
    """Append to results-<Model>/..., as the published project does."""
    import json

    from lm_eval.utils import make_table

    config = json.loads((product.path / "config.json").read_text())
    placement = cell.placement if cell.sparse else "none"
    name = f"{result['model']}_{result['task']}_mode{cell.mode}_placement{placement}.txt"
    text = f"{run.top.name}\n{report.settings_line(config)}\n{make_table(output)}\n"
    append_result(Path(f"results-{result['model']}"), name, text)
