"""Results and answers as typed objects: what is written is read again, files of earlier versions too."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from toptheta.report.results import (
    Answer,
    CellResult,
    ComputedDense,
    Kept,
    Metric,
    read_answers,
    write_answers,
)
from toptheta.util.errors import UsageError

RESULT = CellResult(
    "StreamingLLM sinks=4 K=64",
    model="tiny",
    task="arc_easy",
    name="streaming_llm",
    k=64,
    num_fewshot=25,
    metrics={"acc": Metric(0.5, 0.1, 20), "ppl": Metric(9.0)},
    kept={"prefill": Kept(0.25, 0.5), "generative_decoding": None},
    seconds={"calibration": 0.0, "evaluation": 3.5},
    folder="products/x",
    effective_k=[{"phase": "prefill", "k": 64}],
    extra={"grid": [{"length": 64, "depth": 0, "found": 1, "count": 1}], "environment": {"torch": "2"}},
)


def test_a_result_survives_json() -> None:
    read = {"prefill": 1.0, "generative_decoding": None}
    for result in (
        RESULT,
        CellResult("dense", dense=True),
        replace(RESULT, kept=None, folder=None),
        replace(RESULT, kv_bytes=read),
        replace(RESULT, missed_keys=0.0125),
        replace(RESULT, computed_dense=ComputedDense(3, 120)),
    ):
        again = CellResult.from_json(json.loads(json.dumps(result.to_json())))
        assert again == result
    assert list(RESULT.to_json())[:3] == ["model", "task", "method"]
    assert "folder" not in replace(RESULT, folder=None).to_json()
    assert RESULT.family == "StreamingLLM sinks=4" and CellResult("K=64", k=64).family == "K=64"
    assert RESULT.kept_share("prefill", "vrow") == 0.5
    assert RESULT.kept_share("generative_decoding", "attn") is None


def test_files_of_earlier_versions_load() -> None:
    """They have neither `name` nor `dense`: dense is what has no K."""
    files = [ROOT / "products" / "tables" / "smollm2" / "results.json"]
    files += [ROOT / "products" / "examples" / name / "summary.json" for name in ("needle", "perplexity")]
    for file in files:
        for value in json.loads(file.read_text()):
            result = CellResult.from_json(value)
            assert result.dense == (value["mode"] == 3) and result.name is None
            assert result.metrics and result.kept_share("prefill", "attn") is not None
            written = result.to_json()
            assert {key: written[key] for key in value} == value
    assert result.by_length and not result.grid
    no_stderr = {"method": "x", "metrics": {"f1": {"value": 1, "stderr": "N/A"}}}
    assert CellResult.from_json(no_stderr).metrics == {"f1": Metric(1.0)}


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"method": "a", "metrics": 3}, {"method": "a", "metrics": {"acc": {}}},
     {"method": "a", "kept": {"prefill": {"attn": 1}}}],
)  # fmt: skip
def test_damaged_results_are_refused(value: object) -> None:
    with pytest.raises(UsageError, match="damaged"):
        CellResult.from_json(value)


def test_answers_survive_the_file(tmp_path: Path) -> None:
    answers = [
        Answer("arc_easy/3", "ab", 1, {"acc": 1.0}, {"prompt": 9}, [-2.0, -1.5], 1),
        Answer("HumanEval/5#0", "cd", "return \u2028 x\n", {}, {"prompt": 9, "reply": 3}),
        Answer("window3", "ef", None, {"nll": 2.5}),
    ]
    write_answers(tmp_path, answers)
    assert read_answers(tmp_path) == answers
    first, second, _ = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert first["loglikelihoods"] == [-2.0, -1.5] and "loglikelihoods" not in second


@pytest.mark.parametrize(
    "line",
    [
        "{half",
        "[]",
        '{"key": "b", "hash": "h", "answer": 1}',
        '{"key": "b", "hash": "h", "answer": 1, "score": {"acc": "yes"}}',
        '{"key": 4, "hash": "h", "answer": 1, "score": {}}',
        '{"key": "a", "hash": "h", "answer": 1, "score": {}}',
    ],
)
def test_damaged_answers_are_one_sentence(tmp_path: Path, line: str) -> None:
    good = '{"key": "a", "hash": "h", "answer": 1, "score": {"acc": 1}}'
    (tmp_path / "answers.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UsageError, match=r"answers\.jsonl, line 3 is damaged"):
        read_answers(tmp_path)


def test_missing_answers_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"answers\.jsonl is missing"):
        read_answers(tmp_path)


def test_results_and_plots_need_no_torch() -> None:
    check = "import sys, toptheta.report.summary, toptheta.report.plots.tradeoff\n"
    check += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
