#!/usr/bin/env python3
"""Questions per second of evaluation, against lm-eval's own model class on the same model, task and batches.

    .venv/bin/python bench/harness.py [--task TASK --data_dir DIR] [--num_fewshot N] [--questions N]
                              [--batch_size B] [--anew]

Stock means lm-eval's HFLM over transformers with 'sdpa'. It and all methods answer the same questions, each
in one call, after one question that warms up; shots are the task's usual ones. Where ours is dense, it must
choose the stock one's answers; of generated texts it is said how many are the same. --anew: beginnings that
prompts share are computed anew for each. Leaves out loading, calibration and building prompts; statistics are
on. A real run has more questions for each beginning, which this counts as computed once.
"""

import argparse
import json
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from bench.attention import device_name
from bench.end_to_end import CALIBRATE, METHODS, PRE
from toptheta.eval import lm_eval_model
from toptheta.eval.lm_eval_model import TopThetaLM
from toptheta.eval.prefixes import shared_lengths
from toptheta.eval.settings import BUNDLED_TASK
from toptheta.eval.tasks.harness import chosen_docs
from toptheta.eval.tasks.lm_eval_tasks import task_configs, task_defaults
from toptheta.models.control import record_statistics, set_params
from toptheta.models.loading import find_model, load_tokenizer, unpacked
from toptheta.models.recorder import Recorder

STOCK = "stock harness"
RUNS = ["dense through us", "Top-k", "Top-theta pre"]
CALIBRATION_QUESTIONS = 4


def load(
    task_name: str, data_dir: str | None, calibration: bool, shots: int | None
) -> list[ConfigurableTask]:
    """A task, or its sub-tasks, with its usual shots if their number is not given."""
    shots, tasks = task_defaults(task_name).num_fewshot if shots is None else shots, []
    for config in task_configs(task_name, data_dir, calibration):
        config = {key: value for key, value in config.items() if key not in ("tag", "group")}
        task = ConfigurableTask(config=config | ({} if shots is None else {"num_fewshot": shots}))
        task.set_fewshot_seed(42)
        tasks.append(task)
    return tasks


def requests_of(tasks: list[ConfigurableTask], count: int) -> list[list[Any]]:
    """The harness's requests of `count` questions, spread over the sub-tasks, a list for each question."""
    by_doc: dict[tuple[str, int], list[Any]] = {}
    shares = chosen_docs(tasks, count)
    for task in tasks:
        name = task.config.task
        chosen = sorted(random.Random(0).sample(range(len(task.eval_docs)), shares[name]))
        task.build_all_requests(samples=chosen, rank=0, world_size=1, chat_template=None)
        for instance in task.instances:
            by_doc.setdefault((name, instance.doc_id), []).append(instance)
    return list(by_doc.values())


def answer(lm: Any, questions: list[list[Any]]) -> tuple[list[Any], float]:
    """What is chosen or generated for each question, and seconds."""
    requests = [request for question in questions for request in question]
    start = time.perf_counter()
    found = getattr(lm, requests[0].request_type)(requests, disable_tqdm=True)
    seconds = time.perf_counter() - start
    answers, at = [], 0
    for question in questions:
        own, at = found[at : at + len(question)], at + len(question)
        is_text = isinstance(own[0], str)
        answers.append(own[0] if is_text else max(range(len(own)), key=lambda j: own[j][0]))  # noqa: B023
    return answers, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Time evaluation against the stock harness.")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--task", default=BUNDLED_TASK)
    parser.add_argument("--calib_task", help="for a task with nothing to calibrate on")
    parser.add_argument("--data_dir")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "harness-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    source = find_model("smollm2")
    local = unpacked(source)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "batch_size": args.batch_size}
    if local.gguf_file:
        options |= {"gguf_file": local.gguf_file, "tokenizer": load_tokenizer(source)}
    stock, ours = HFLM(pretrained=local.location, **options), TopThetaLM(pretrained=local.location, **options)
    if args.anew:
        patch.object(lm_eval_model, "can_share", lambda model: False).start()

    set_params(ours.model, **(PRE | {"mode": 0}), **CALIBRATE, calibrate=True)
    for question in requests_of(
        load(args.calib_task or args.task, args.data_dir, True, args.num_fewshot), CALIBRATION_QUESTIONS
    ):
        prompt = torch.tensor([ours.tok_encode(question[0].args[0])])
        with torch.no_grad():
            ours.model(prompt, use_cache=False, logits_to_keep=1)
    set_params(ours.model, calibrate=False)

    questions = requests_of(load(args.task, args.data_dir, False, args.num_fewshot), args.questions)
    seconds: dict[str, float] = {}
    answers: dict[str, list[Any]] = {}
    for name in [STOCK, *RUNS]:
        lm: Any = stock
        if name != STOCK:
            lm = ours
            set_params(ours.model, **METHODS[name])
            ours.recorder = Recorder()
            record_statistics(ours.model, ours.recorder)
        answer(lm, questions[:1])
        answers[name], seconds[name] = answer(lm, questions)
    same = sum(a == b for a, b in zip(answers[STOCK], answers[RUNS[0]]))
    generates = isinstance(answers[STOCK][0], str)
    if same < len(questions) and not generates:
        raise SystemExit("dense through us chose other answers than the stock harness")
    prompts = [tuple(ours.tok_encode(question[0].args[0])) for question in questions]
    shared = {} if args.anew else shared_lengths(prompts)
    beginnings = {prompt[:length] for prompt, length in shared.items()}
    about = {
        "device": device_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "task": f"{args.task}, {len(questions)} questions, batches of {args.batch_size}",
        "tokens of the prompts": sum(map(len, prompts)),
        "of them computed": sum(map(len, beginnings)) + sum(len(p) - shared.get(p, 0) for p in prompts),
        "dense answers as stock": f"{same} of {len(questions)}",
    }
    if generates:
        replies = [len(ours.tok_encode(text)) for text in answers[STOCK]]
        about["tokens of a reply"] = round(sum(replies) / len(replies), 1)
    print("  ".join(f"{key}: {value}" for key, value in about.items()) + "\n")
    rows = {
        name: {
            "questions/s": round(len(questions) / t, 4),
            "seconds a question": round(t / len(questions), 3),
            "times stock": round(seconds[STOCK] / t, 2),
        }
        for name, t in seconds.items()
    }
    for name, row in rows.items():
        print(f"  {name:20}" + "".join(f"{value:10.2f} {key}" for key, value in row.items()))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
