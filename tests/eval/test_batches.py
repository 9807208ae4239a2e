"""Where memory runs out batches shrink, and what does not fit alone is recorded as failed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval.helpers import gen_settings, only_run, qa_settings
from toptheta.calibration.tables import load_tables
from toptheta.eval.batches import Batches
from toptheta.eval.runner import evaluate
from toptheta.eval.settings import AUTO
from toptheta.eval.tasks import base
from toptheta.util.errors import UsageError


def test_halves() -> None:
    ran: list[list[int]] = []
    undone: list[int] = []
    failed: list[int] = []

    def run(batch: list[int]) -> None:
        if sum(batch) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        ran.append(batch)

    batches = Batches(AUTO)
    assert batches.size == 64
    batches.run([[1, 2, 3, 4, 5], [11, 1, 1], [2, 2, 2]], run, lambda: undone.append(1), failed.append)
    assert ran == [[1, 2], [3, 4], [5], [1], [1], [2], [2], [2]]
    assert failed == [11] and len(undone) == 3 and batches.most == 1
    for other in (RuntimeError("a bug"), ValueError("another")):

        def fail(batch: list[int], other: Exception = other) -> None:
            raise other

        with pytest.raises(type(other), match=str(other)):
            batches.run([[1]], fail, lambda: None, failed.append)


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Models whose second layer runs out of memory with more than so many sequences, or so many tokens: what
    the first layer has counted by then must not stay."""
    limits = {"sequences": 2, "tokens": 10_000}
    load = base.load_model

    def check(module: Any, arguments: Any, keywords: Any) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        if hidden.shape[0] > limits["sequences"] or hidden.shape[1] > limits["tokens"]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def load_small(*arguments: Any) -> Any:
        model = load(*arguments)
        model.model.layers[1].register_forward_pre_hook(check, with_kwargs=True)
        return model

    monkeypatch.setattr(base, "load_model", load_small)
    return limits


def thresholds(run: Path) -> list[list[int]]:
    """How often each layer was sampled, by row length."""
    return [table.samples.tolist() for _, table in sorted(load_tables(run, 2, 6).theta.items())]


def test_generation(folder_model: str, here: Path, small_memory: dict[str, int]) -> None:
    """Each prompt is sampled and answered once, whatever was tried; the longest fail and are counted."""
    changes: dict[str, Any] = {
        "dataset": "needle",
        "mode": (0,),
        "needle_depths": (0, 50),
        "prefill_chunk": None,
    }
    changes |= {"needle_lengths": (130, 300), "max_seq_len": 300}
    evaluate(gen_settings(folder_model, **changes, output_dir="one"))
    small_memory["tokens"] = 200
    result = evaluate(gen_settings(folder_model, **changes, batch_size=AUTO, output_dir="auto"))[0]
    one, auto = only_run(here / "one"), only_run(here / "auto")
    assert result.extra["failed"] == 2 and "| failed" in (auto / "summary.md").read_text()
    lines = [[json.loads(line) for line in open(run / "answers.jsonl")] for run in (one, auto)]
    short = [i for i, line in enumerate(lines[0]) if line["tokens"]["prompt"] <= 200]
    assert len(short) == 2 and [line["hash"] for line in lines[1]] == [line["hash"] for line in lines[0]]
    assert all(lines[1][i]["tokens"]["reply"] > 0 for i in short)
    assert all(line["tokens"]["reply"] == 0 for i, line in enumerate(lines[1]) if i not in short)
    kept = [sorted((run / "sequence_lengths_per_example.csv").read_text().split()) for run in (one, auto)]
    assert set(kept[1]) < set(kept[0]) and len(kept[1]) == 2


def test_questions(folder_model: str, here: Path, small_memory: dict[str, int]) -> None:
    settings: dict[str, Any] = {"mode": (0,), "num_samples": 3}
    small_memory["sequences"] = 5  # a prompt's answers are computed at once
    evaluate(qa_settings(folder_model, **settings, output_dir="one"))
    evaluate(qa_settings(folder_model, **settings, batch_size=AUTO, output_dir="auto"))
    one, auto = only_run(here / "one"), only_run(here / "auto")
    assert thresholds(auto) == thresholds(one)
    assert (auto / "answers.jsonl").read_text().count("\n") == 3
    small_memory["tokens"] = 5
    with pytest.raises(UsageError, match="does not fit in memory, even alone: lower --num_fewshot"):
        evaluate(qa_settings(folder_model, mode=(3,), sdc="none", vmc=False, calib_tac=False))
