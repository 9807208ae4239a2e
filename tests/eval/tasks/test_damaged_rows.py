"""Rows in --data_dir with one damage each: one sentence with file, line, field and reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.eval.helpers import gen_settings, qa_settings
from toptheta.eval.tasks.qa import qa_jobs
from toptheta.eval.tasks.rows import SCHEMAS, check_file
from toptheta.util.errors import UsageError

ROWS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "question": "Which is the largest?", "answerKey": "B",
        "choices": {"text": ["a mouse", "a whale"], "label": ["A", "B"]},
    },
    "hellaswag": {
        "activity_label": "Rowing", "ctx_a": "A man sits in a boat.", "ctx_b": "he",
        "endings": ["rows.", "flies.", "sings.", "melts."], "label": "0",
    },
    "mmlu": {"question": "How many legs has a spider?", "choices": ["2", "4", "6", "8"], "answer": 3},
    "gsm8k": {"question": "What is 2 + 2?", "answer": "2 + 2 = 4\n#### 4"},
    "medmcqa": {
        "question": "Where is the femur?", "opa": "leg", "opb": "arm", "opc": "head", "opd": "hand", "cop": 0,
    },
}  # fmt: skip
DAMAGES: list[tuple[str, Any, str]] = [
    ("arc_easy", {"answerKey": "Z"}, "answerKey 'Z' is not one of the labels A, B"),
    ("arc_easy", {"answerKey": None}, "Expected str, got null - at $.answerKey"),
    ("arc_easy", {"choices": None}, "Expected object, got null - at $.choices"),
    ("arc_easy", {"choices": {"text": [], "label": []}}, "length >= 1 - at $.choices.text"),
    ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "1 choices and 2 labels"),
    ("arc_easy", {"question": 7}, "Expected str, got int - at $.question"),
    ("hellaswag", {"endings": ["one", "two"]}, "length >= 4 - at $.endings"),
    ("hellaswag", {"label": "9"}, "label '9' is not one of 0, 1, 2, 3"),
    ("mmlu", {"answer": 4}, "<= 3 - at $.answer"),
    ("mmlu", {"choices": "2, 4, 6, 8"}, "Expected array, got str - at $.choices"),
    ("gsm8k", {"answer": ["4"]}, "Expected str, got array - at $.answer"),
    ("medmcqa", {"cop": -1}, ">= 0 - at $.cop"),
    ("medmcqa", {"opb": {}}, "Expected str, got object - at $.opb"),
]


def line(task: str, changes: dict[str, Any] | None = None) -> bytes:
    return json.dumps(ROWS[task] | (changes or {})).encode() + b"\n"


@pytest.mark.parametrize(("task", "changes", "reason"), DAMAGES)
def test_a_damaged_field(task: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_bytes(line(task) + b"\n" + line(task, changes))
    with pytest.raises(UsageError) as found:
        check_file(file, task, used=True)
    assert f"{file}, line 3: " in str(found.value) and reason in str(found.value)


@pytest.mark.parametrize("task", [*SCHEMAS, "sciq"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b'{"question": "half', "Unterminated string"),
        (b"[]", "Expected object, got array"),
        (b"null", "Expected object, got null"),
        (b"3", "Expected object, got int"),
        (b'{"question": "M\xfcller"}', "not UTF-8"),
        (b'{"question": 1e999}', "not a finite number"),
        (b'{"question": "a", "question": "b"}', "'question' occurs twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{}", "missing"),
    ],
)
def test_a_damaged_line(task: str, damage: bytes, reason: str, tmp_path: Path) -> None:
    good = line("arc_easy" if task in ("arc_challenge", "sciq") else task)
    file = tmp_path / "test.jsonl"
    file.write_bytes(good * 2 + damage + b"\n" + good)
    with pytest.raises(UsageError, match=reason) as found:
        check_file(file, task, used=True)
    assert f"{file}, line 3: " in str(found.value)


def test_a_split_that_is_not_used_may_lack_answers(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(line("hellaswag", {"label": ""}))
    check_file(tmp_path / "test.jsonl", "hellaswag", used=False)


def test_runs_say_it_before_they_start(folder_model: str, here: Path) -> None:
    from toptheta.eval.runner import evaluate

    for task, splits in (("arc_easy", ("train", "validation", "test")), ("longbench_qmsum", ("test",))):
        (here / "data" / task).mkdir(parents=True)
        good = (
            line("arc_easy") if task == "arc_easy" else b'{"input": "", "context": "a", "answers": ["b"]}\n'
        )
        for split in splits:
            (here / "data" / task / f"{split}.jsonl").write_bytes(good * 3)
        (here / "data" / task / "test.jsonl").write_bytes(good + b'{"context": "a"}\n')
    with pytest.raises(UsageError, match=r"arc_easy/test.jsonl, line 2: .*missing required field"):
        evaluate(qa_settings(folder_model, task="arc_easy", data_dir="data"))
    with pytest.raises(UsageError, match=r"qmsum/test.jsonl, line 2: .*missing required field"):
        evaluate(gen_settings(folder_model, dataset="longbench_qmsum", data_dir="data", max_seq_len=900))
    with pytest.raises(UsageError, match="--num_fewshot 1000: task everyday_science has only 100 examples"):
        evaluate(qa_settings(folder_model, num_fewshot=1000))
    with pytest.raises(
        UsageError, match="--max_seq_len 4096 is more than the model's context of 2048 tokens"
    ):
        evaluate(gen_settings(folder_model, max_seq_len=4096))
    (bundled,) = qa_jobs(qa_settings(folder_model, data_dir="data"))
    assert "--data_dir has no effect on everyday_science" in bundled.notices[0]
    assert not (here / "products").exists()
