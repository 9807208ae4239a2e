"""The Q&A job: calibrate thresholds, then run lm-eval tasks, one cell per mode and K, into one table."""

import logging
import random
from pathlib import Path
from typing import Any

from toptheta import report
from toptheta.cli import QASettings, label, resolve_device
from toptheta.models import find_model, load_config, load_tokenizer, unpacked
from toptheta.params import AttentionParams
from toptheta.products import Cell, append_result, say
from toptheta.run import Run, cells, finish_run, interrupted, open_run, prepare, write_config
from toptheta.tasks import check_task, task_configs, task_defaults


def run_qa(settings: QASettings, resume: str | None = None) -> list[dict[str, Any]]:
    """Run the job; returns the cells' results and prints their table. Raises UsageError."""
    source = find_model(settings.llama)
    check_task(settings.task, settings.data_dir)
    settings = resolve_device(settings)
    config = load_config(source)
    for cell in settings.cells():
        if cell.sparse:
            settings.layer_ks(cell, config.num_hidden_layers)

    run = open_run(settings, "test_llama.py", resume)
    say(f"Run folder: {run.folder}")
    results = []
    lm = None
    try:
        for cell, product in cells(run, config.num_hidden_layers):
            if product.finished:
                results.append(product.results())
                continue
            lm = lm or _load_lm(settings, source)
            result = _run_cell(run, cell, product, lm, source.name)
            if result is not None:
                results.append(result)
    except KeyboardInterrupt:
        interrupted(run)
        raise
    if results:
        finish_run(run, results, source.name)
    return results


def _load_lm(settings: QASettings, source: Any) -> Any:
    from lm_eval.api.registry import get_model

    import toptheta.harness  # noqa: F401  (registers the model class)

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
    write_config(run, cell, product, lm.model, model_name, {"task": settings.task, "num_fewshot": shots})

    def calibrate(after_batch, done: set[str]) -> None:
        lm.cell, lm.done, lm.after_batch, lm.description = (
            None,
            done,
            after_batch,
            f"Calibrating {label(cell)}",
        )
        size = settings.calib_samples or task_defaults(settings.task).calib_samples
        _evaluate(lm, settings, shots, calibration=True, size=size)
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
        output = _evaluate(lm, settings, shots, calibration=False, size=settings.num_samples)
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
    lm: Any, settings: QASettings, shots: int | None, calibration: bool, size: float | None
) -> dict[str, Any]:
    """Run lm-eval on the task or its calibration twin, on a seeded subset of `size` documents (below 1: a
    share)."""
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    tasks, chosen = [], {}
    for config in task_configs(settings.task, settings.data_dir, calibration):
        config = {key: value for key, value in config.items() if key not in ("tag", "group")}
        task = ConfigurableTask(config=config | ({} if shots is None else {"num_fewshot": shots}))
        task.set_fewshot_seed(settings.seed)
        tasks.append(task)
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
    text = f"{run.folder.name}\n{report.settings_line(config)}\n{make_table(output)}\n"
    append_result(Path(f"results-{result['model']}"), name, text)
