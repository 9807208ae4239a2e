#!/usr/bin/env python3
"""Questions per second of 25-shot Q&A, against lm-eval's own model class on the same model and task.

    .venv/bin/python bench/harness.py [--questions N] [--task TASK --data_dir DIR] [--output FILE]

Stock means lm-eval's HFLM over transformers with 'sdpa'. It and all methods take the same questions, one
question after the other in turn; the numbers are sums over all questions. Where ours is dense, its accuracy
must be the stock one's. Leaves out loading, calibration and building prompts; statistics are on.
"""

import argparse
import json
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from bench.attention import device_name
from bench.end_to_end import CALIBRATE, METHODS, PRE
from toptheta.eval.lm_eval_model import TopThetaLM
from toptheta.eval.settings import BUNDLED_TASK
from toptheta.eval.tasks.lm_eval_tasks import task_configs
from toptheta.models.control import record_statistics, set_params
from toptheta.models.loading import find_model, load_tokenizer, unpacked
from toptheta.models.recorder import Recorder

SHOTS = 25
RUNS = ["dense through us", "Top-k", "Top-theta pre"]


def requests_of(task: ConfigurableTask, count: int, lm: Any) -> list[list[Any]]:
    """The harness's loglikelihood requests of `count` questions, a list for each."""
    chosen = sorted(random.Random(0).sample(range(len(task.eval_docs)), count))
    task.build_all_requests(samples=chosen, rank=0, world_size=1, chat_template=None)
    by_doc: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_doc.setdefault(instance.doc_id, []).append(instance)
    return list(by_doc.values())


def load(task_name: str, data_dir: str | None, calibration: bool) -> ConfigurableTask:
    config = next(iter(task_configs(task_name, data_dir, calibration)))
    config = {key: value for key, value in config.items() if key not in ("tag", "group")}
    task = ConfigurableTask(config=config | {"num_fewshot": SHOTS})
    task.set_fewshot_seed(42)
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description="Time Q&A evaluation against the stock harness.")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--task", default=BUNDLED_TASK)
    parser.add_argument("--data_dir")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "harness-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    source = find_model("smollm2")
    local = unpacked(source)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "batch_size": 1}
    if local.gguf_file:
        options |= {"gguf_file": local.gguf_file, "tokenizer": load_tokenizer(source)}
    stock, ours = HFLM(pretrained=local.location, **options), TopThetaLM(pretrained=local.location, **options)

    set_params(ours.model, **(PRE | {"mode": 0}), **CALIBRATE, calibrate=True)
    ours.done = set()
    for question in requests_of(load(args.task, args.data_dir, calibration=True), 4, ours):
        ours.loglikelihood(question, disable_tqdm=True)
    ours.done = None
    set_params(ours.model, calibrate=False)

    questions = requests_of(load(args.task, args.data_dir, calibration=False), args.questions, ours)
    seconds = dict.fromkeys(["stock harness", *RUNS], 0.0)
    best: dict[str, list[int]] = {name: [] for name in seconds}
    for i, question in enumerate(questions):
        for name in seconds:
            lm: Any = stock
            if name != "stock harness":
                lm = ours
                set_params(ours.model, **METHODS[name])
                ours.recorder = Recorder(ours.config.num_attention_heads)
                record_statistics(ours.model, ours.recorder)
            start = time.perf_counter()
            scores = lm.loglikelihood(question, disable_tqdm=True)
            if lm is ours:
                assert ours.recorder is not None
                ours.recorder.drain()
            if i > 0 or len(questions) == 1:  # the first question warms up
                seconds[name] += time.perf_counter() - start
            best[name].append(max(range(len(scores)), key=lambda j: scores[j][0]))
    if best["dense through us"] != best["stock harness"]:
        raise SystemExit("dense through us chose other answers than the stock harness")
    timed = max(1, len(questions) - 1)
    about = {
        "device": device_name(torch.device("cpu")),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "task": f"{args.task}, {SHOTS} shots, {timed} questions",
        "prompt tokens": len(ours.tok_encode(questions[0][0].args[0])),
    }
    print("  ".join(f"{key}: {value}" for key, value in about.items()) + "\n")
    rows = {
        name: {
            "questions/s": round(timed / t, 4),
            "requests/s": round(timed * len(questions[0]) / t, 4),
            "times stock": round(seconds["stock harness"] / t, 2),
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
