"""The jobs' interface to lm-eval: tasks with their data, running them on a patched model, and typed results.

lm_eval is imported on use, because that takes seconds.
"""

import hashlib
import json
import logging
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from toptheta.eval.checkpoint import Checkpoint
from toptheta.eval.settings import Settings
from toptheta.eval.tasks.base import passage_id
from toptheta.eval.tasks.lm_eval_tasks import check_task, task_configs, task_defaults, with_examples
from toptheta.report.results import Answer, Metric
from toptheta.util.errors import UsageError

QUESTION_CHARACTERS = 2000  # of a question's words, at most: the end of the prompt
PASSAGES = ("passage", "article", "story", "context")  # columns of what several questions of a task are about


def around(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's object of a patched model. lm-eval sees a single process; `TopThetaLM` distributes the
    requests."""
    from toptheta.eval.lm_eval_model import TopThetaLM

    return TopThetaLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def check_calib_task(settings: Any) -> list[Any]:
    """The harness's task objects of --calib_task, if it is given. Raises UsageError unless it is known and
    its data can be had."""
    if settings.calib_task is None:
        return []
    check_task(settings.calib_task, settings.data_dir, "--calib_task")
    return load_tasks(
        task_configs(settings.calib_task, settings.data_dir, True, "--calib_task"), settings, None
    )


def data_hash(tasks: Iterable[Any]) -> str:
    """The hash of the documents and examples of the harness's task objects."""
    digest = hashlib.sha256()
    for task in tasks:
        for doc in (*task.eval_docs, *(task.fewshot_docs() or () if task.config.num_fewshot else ())):
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def calibrate_on_task(
    lm: Any,
    settings: Any,
    task: str,
    shots: int | None,
    description: str,
    progress: Checkpoint,
) -> None:
    """Run the prompts of a task's calibration twin that `progress` has not done through a model."""
    size = settings.calib_samples or task_defaults(task).calib_samples
    lm.progress, lm.description = progress, description
    lm.cut.clear()
    try:
        run_tasks(lm, settings, task_configs(task, settings.data_dir, True), shots, size)
    finally:
        lm.progress = None


def run_tasks(
    lm: Any,
    settings: Settings,
    configs: list[dict[str, Any]],
    shots: int | None,
    size: float | None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """lm-eval's output for tasks with these configs, on a seeded subset of `size` documents (below 1: a
    share). log_samples: include the result of each document."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks, chosen = load_tasks(configs, settings, shots), {}
    docs = {task.config.task: len(task.eval_docs) for task in tasks}
    for name, share in chosen_docs(tasks, size).items():
        chosen[name] = sorted(random.Random(settings.seed).sample(range(docs[name]), share))
    with _silenced():
        return simple_evaluate(
            model=lm,
            tasks=[task for task in tasks if chosen[task.config.task]],
            samples={name: indices for name, indices in chosen.items() if indices},
            apply_chat_template=settings.apply_chat_template,
            bootstrap_iters=1000,
            log_samples=log_samples,
            task_manager=TaskManager(include_defaults=False),
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )


@contextmanager
def _silenced() -> Iterator[None]:
    """Without lm-eval's own progress bars, of seconds each, which would break the run's one line, and without
    its description of the machine and its commit, which take a second and a half: config.json has ours."""
    from lm_eval import evaluator
    from lm_eval.api import model, task

    def plain(items: Iterable[Any], **options: Any) -> Iterable[Any]:
        return items

    with (
        patch.object(task, "tqdm", plain),
        patch.object(model, "tqdm", plain),
        patch.object(evaluator, "get_git_commit_hash", lambda: None),
        patch.object(evaluator, "add_env_info", lambda results: None),
    ):
        yield


def load_tasks(configs: list[dict[str, Any]], settings: Settings, shots: int | None) -> list[Any]:
    """The harness's task objects, with their data. Raises UsageError for data that cannot be had."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its advice is about flags that are not ours
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    tasks = []
    for config in configs:
        config = {key: value for key, value in config.items() if key not in ("tag", "group")}
        if shots is not None:
            config["num_fewshot"] = shots
        if getattr(settings, "data_dir", None):
            config = with_examples(config, config.get("num_fewshot") or 0)
        if getattr(settings, "fixed_shots", False):
            config["fewshot_config"] = (config.get("fewshot_config") or {}) | {"sampler": "first_n"}
        try:
            task = ConfigurableTask(config=config)
        # No network; a damaged file; a gated or missing data set; rows of another form than the task's.
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            if not isinstance(error, (OSError, ValueError)):
                reason = f"its rows have an unexpected form, {type(error).__name__}: {reason}"
            raise UsageError(
                f"the data of task {config['task']} cannot be loaded ({reason}): "
                + (
                    "correct the files in --data_dir."
                    if getattr(settings, "data_dir", None)
                    else "connect to the network, or name a folder of local rows with --data_dir."
                )
            ) from None
        task.set_fewshot_seed(settings.seed)
        _check_shots(task)
        tasks.append(task)
    return tasks


def _check_shots(task: Any) -> None:
    """Raise UsageError if a task has fewer examples than shots."""
    shots, config = task.config.num_fewshot or 0, task.config
    examples = task.fewshot_docs() if shots else None
    if examples is None:
        return
    there = len(list(examples)) - (task.fewshot_cfg.split == config.test_split)  # but for the question itself
    if shots > there:
        raise UsageError(
            f"--num_fewshot {shots}: task {config.task} has only {there} examples; give at most that."
        )


def chosen_docs(tasks: list[Any], size: float | None) -> dict[str, int]:
    """The number of documents of each sub-task: all, a share of each, or a count distributed over them."""
    docs = {task.config.task: len(task.eval_docs) for task in tasks}
    if size is None:
        return docs
    if size < 1:
        return {name: max(1, round(size * count)) for name, count in docs.items()}
    left, shares = int(size), {}
    for i, (name, count) in enumerate(sorted(docs.items(), key=lambda item: item[1])):
        shares[name] = min(count, -(-left // (len(docs) - i)) if left else 0)
        left -= shares[name]
    return shares


def metrics_of(output: dict[str, Any]) -> dict[str, Metric]:
    """The metrics of a run; several sub-tasks are averaged by their size."""
    counts = {name: int(n["effective"]) for name, n in output["n-samples"].items()}
    sums: dict[str, list[tuple[float, float | None, int]]] = {}
    for task, values in output["results"].items():
        for key, value in values.items():
            metric, comma, suffix = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{suffix}")
            parts = sums.setdefault(_metric_name(metric, suffix), [])
            parts.append((value, stderr if isinstance(stderr, float) else None, counts[task]))
    metrics = {}
    for name, parts in sums.items():
        total = sum(n for _, _, n in parts)
        known = all(stderr is not None for _, stderr, _ in parts)
        variance = sum(((stderr or 0.0) * n) ** 2 for _, stderr, n in parts) / total**2 if known else None
        value = sum(value * n for value, _, n in parts) / total
        metrics[name] = Metric(value, None if variance is None else variance**0.5, total)
    return metrics


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric}({filter_name})"


def answers_of(
    output: dict[str, Any], tokens: dict[str, dict[str, int]], replies: dict[str, list[int]]
) -> list[Answer]:
    """The results of each document in a run with log_samples. By a prompt's text, tokens: the numbers of
    tokens of it and its reply; replies: the tokens of the reply.

    A document's key is `task/doc_id`, with its index in the split. A task with several filters has one answer
    with the scores of all filters.
    """
    answers: dict[str, Answer] = {}
    for task, samples in output["samples"].items():
        for sample in samples:
            key = f"{task}/{sample['doc_id']}"
            scores = {
                _metric_name(name, sample["filter"]): float(sample[name])
                for name in sample["metrics"]
                if isinstance(sample[name], (bool, int, float))
            }
            if key in answers:
                answers[key].score.update(scores)
                continue
            prompt = sample["arguments"][0][0]
            answer = _answer(key, sample, scores)
            passage = next((sample["doc"][name] for name in PASSAGES if name in sample["doc"]), None)
            answers[key] = replace(
                answer,
                tokens=tokens.get(prompt, {}),
                reply_ids=replies.get(prompt) if isinstance(answer.answer, str) else None,
                cluster=passage_id(passage) if isinstance(passage, str) else None,
            )
    return list(answers.values())


def _answer(key: str, sample: dict[str, Any], scores: dict[str, float]) -> Answer:
    arguments, target = sample["arguments"], sample["target"]
    asked = hashlib.sha256(repr([list(map(str, one)) for one in arguments]).encode()).hexdigest()[:16]
    first, words = sample["resps"][0][0], _last_shot(str(arguments[0][0]))
    if isinstance(first, str):
        return Answer(key, asked, first, scores, target=target, question=words)
    if len(arguments[0]) == 1:  # a whole text, whose perplexity was measured
        return Answer(key, asked, None, scores, question=words)
    likelihoods = [
        float(one[0] if isinstance(one, (tuple, list)) else one) for one in sample["filtered_resps"]
    ]
    if len(arguments) > 1 and arguments[-1][0] == "" != arguments[0][0]:
        likelihoods = likelihoods[: len(likelihoods) // 2]  # the second half are the choices without a prompt
    choices = [str(one[1]).strip() for one in arguments[: len(likelihoods)]]
    chosen = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    if len(likelihoods) > 1 and len(set(choices)) == 1:  # several beginnings of one end, as in winogrande
        choices = [_last_shot(str(one[0])) for one in arguments[: len(likelihoods)]]
        target = None  # lm-eval's is the end; only whether the choice was right is known
        if "acc" in scores and (scores["acc"] or len(choices) == 2):
            target = chosen if scores["acc"] else 1 - chosen
    elif isinstance(target, str) and target.strip() in choices:
        target = choices.index(target.strip())
    return Answer(
        key, asked, chosen, scores, loglikelihoods=likelihoods, target=target, question=words, choices=choices
    )


def _last_shot(prompt: str) -> str:
    """The question itself, without the examples before it."""
    return prompt.strip().split("\n\n")[-1][-QUESTION_CHARACTERS:]
