"""Tasks of the harness on local rows: folders, splits, and the tasks' twins for calibration."""

import json
from pathlib import Path

import pytest

from toptheta.eval.settings import QASettings
from toptheta.eval.tasks.harness import load_tasks
from toptheta.eval.tasks.lm_eval_tasks import TASKS, check_task, task_configs
from toptheta.util.errors import UsageError


def test_tasks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        check_task("arc_easy", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="has no folder 'arc_easy'"):
        check_task("arc_easy", str(tmp_path))
    (tmp_path / "arc_easy").mkdir()
    with pytest.raises(UsageError, match="has no test.jsonl"):
        task_configs("arc_easy", str(tmp_path), False)
    # Rows that tasks share lie under the name of their data set.
    (tmp_path / "gsm8k").mkdir()
    row = '{"question": "What is 1 and 1?", "answer": "#### 2"}\n'
    (tmp_path / "gsm8k" / "test.jsonl").write_text(row)
    check_task("gsm8k_cot", str(tmp_path))
    (config,) = task_configs("gsm8k_cot", str(tmp_path), False)
    assert config["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "gsm8k" / "test.jsonl")}
    rows = '{"question": "How many legs has a spider?", "choices": ["2", "4", "6", "8"], "answer": 3}\n'
    (tmp_path / "mmlu" / "anatomy").mkdir(parents=True)
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / "anatomy" / f"{split}.jsonl").write_text(rows)
    check_task("mmlu_anatomy", str(tmp_path))
    (alone,) = task_configs("mmlu_anatomy", str(tmp_path), False)
    assert [alone["dataset_kwargs"]] == [
        one["dataset_kwargs"] for one in task_configs("mmlu", str(tmp_path), False)
    ]
    for name in TASKS:
        for config, twin in zip(task_configs(name, None, False), task_configs(name, None, True)):
            assert twin["task"] == config["task"] + "_calibration"
            assert twin["test_split"] != (config.get("test_split") or config.get("validation_split"))


@pytest.mark.parametrize("task", ["arc_easy", "gsm8k"])
def test_rows_without_those_of_examples(task: str, tmp_path: Path) -> None:
    """Prompts with examples need their file, which the message names; prompts without do not."""
    rows = {
        "arc_easy": {
            "question": "Which?",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "gsm8k": {"question": "What is 1 and 1?", "answer": "#### 2"},
    }
    (tmp_path / task).mkdir()
    (tmp_path / task / "test.jsonl").write_text(f"{json.dumps(rows[task])}\n" * 2)
    settings = QASettings(task=task, data_dir=str(tmp_path))
    (config,) = task_configs(task, str(tmp_path), False)
    with pytest.raises(UsageError, match=rf"no {tmp_path}/{task}/train.jsonl, .* or give --num_fewshot 0"):
        load_tasks([config], settings, 2)
    (loaded,) = load_tasks([config], settings, 0)
    assert len(loaded.eval_docs) == 2
