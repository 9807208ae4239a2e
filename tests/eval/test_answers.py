"""Every cell keeps its answer to each question, in every data set: keys, hashes, and scores that
make the metric."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.eval.helpers import gen_settings, interrupt_at, only_run, qa_settings
from toptheta.report.results import Answer, CellResult, read_answers
from toptheta.util.errors import UsageError


def answers_by_key(result: CellResult) -> dict[str, Answer]:
    assert result.folder is not None
    return {answer.key: answer for answer in read_answers(result.folder)}


def test_multiple_choice(folder_model: str, here: Path) -> None:
    from toptheta.eval.runner import evaluate

    sparse, dense = map(answers_by_key, results := evaluate(qa_settings(folder_model, mode=(1, 3))))
    assert len(dense) == 5 and all(key.startswith("everyday_science/") for key in dense)
    assert {key: answer.hash for key, answer in sparse.items()} == {k: a.hash for k, a in dense.items()}
    assert any(sparse[key].loglikelihoods != dense[key].loglikelihoods for key in dense)
    for result, answers in zip(results, (sparse, dense)):
        for name, metric in result.metrics.items():
            assert np.mean([answer.score[name] for answer in answers.values()]) == metric.value
    for answer in dense.values():
        assert answer.loglikelihoods is not None and answer.tokens["prompt"] > 50
        assert answer.answer == int(np.argmax(answer.loglikelihoods))
        assert answer.score["acc"] == (answer.answer == answer.target)
    fewer = evaluate(qa_settings(folder_model, mode=(3,), num_fewshot=2))
    assert not {a.hash for a in answers_by_key(fewer[0]).values()} & {a.hash for a in dense.values()}


def test_a_resumed_cell_keeps_all(folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toptheta.eval import cell as products
    from toptheta.eval.runner import evaluate

    monkeypatch.setattr(products, "CHECKPOINT_SECONDS", 0.0)
    (straight,) = evaluate(qa_settings(folder_model, mode=(1,), output_dir="straight"))
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(qa_settings(folder_model, mode=(1,), output_dir="stopped"))
    (run,) = here.joinpath("stopped").iterdir()
    assert not (run / "answers.jsonl").exists()
    (resumed,) = evaluate(qa_settings(folder_model, mode=(1,), output_dir="stopped"), resume=str(run))
    assert answers_by_key(resumed) == answers_by_key(straight)


def test_replies_of_the_harness(folder_model: str, here: Path, local_data: Path) -> None:
    """One answer to a question, with the scores of both filters."""
    from toptheta.eval.runner import evaluate

    (result,) = evaluate(
        qa_settings(
            folder_model, mode=(3,), task="gsm8k", data_dir=str(local_data), num_samples=2, num_fewshot=1
        )
    )
    answers = answers_by_key(result)
    assert len(answers) == 2 and all(key.startswith("gsm8k/") for key in answers)
    for answer in answers.values():
        assert isinstance(answer.answer, str) and set(answer.score) == set(result.metrics)
        assert answer.tokens["prompt"] > 50 and "reply" in answer.tokens and answer.loglikelihoods is None


def test_windows_and_needles(folder_model: str, here_with_text: Path) -> None:
    from toptheta.eval.runner import evaluate

    for changes, metric, keys in (
        (
            {"dataset": "perplexity", "text": "text.txt", "num_tasks": 3},
            "nll",
            ["window0", "window1", "window2"],
        ),
        (
            {"dataset": "needle", "needle_lengths": (200,), "needle_depths": (0, 100)},
            "found",
            ["200/0/0", "200/100/0"],
        ),
    ):
        sparse, dense = evaluate(gen_settings(folder_model, mode=(1, 3), **changes))
        of_sparse, of_dense = answers_by_key(sparse), answers_by_key(dense)
        assert list(of_dense) == list(of_sparse) == keys
        assert len({answer.hash for answer in of_dense.values()}) == len(keys)
        assert [a.hash for a in of_dense.values()] == [a.hash for a in of_sparse.values()]
        mean = np.mean([answer.score[metric] for answer in of_dense.values()])
        expected = np.log(dense.metrics["ppl"].value) if metric == "nll" else dense.metrics["found"].value
        assert mean == pytest.approx(expected)


def test_programs_scored_later(folder_model: str, here: Path) -> None:
    """Without execution there is no score; --score adds it, sample by sample."""
    from toptheta.eval.runner import evaluate
    from toptheta.eval.score import score_folder

    (result,) = evaluate(
        gen_settings(
            folder_model, mode=(3,), num_tasks=2, num_samples_per_task=2, do_sample=True, batch_size=4,
            max_seq_len=400, prefill_chunk=None,
        )
    )  # fmt: skip
    answers = answers_by_key(result)
    assert list(answers) == [f"HumanEval/{task}#{sample}" for task in (0, 1) for sample in (0, 1)]
    assert all(a.score == {} and isinstance(a.answer, str) and a.tokens["reply"] for a in answers.values())
    assert answers["HumanEval/0#0"].hash == answers["HumanEval/0#1"].hash != answers["HumanEval/1#0"].hash
    score_folder(str(here / "products"))
    assert {a.score["passed"] for a in answers_by_key(result).values()} == {0.0}
    lines = (Path(str(result.folder)) / "samples.jsonl_results.jsonl").read_text().splitlines()
    assert [json.loads(line)["passed"] for line in lines] == [False] * 4
    root = only_run(here / "products")
    assert "pass@1" in (root / "summary.md").read_text() and (root / "report.html").is_file()
    (Path(str(result.folder)) / "samples.jsonl").write_text("")
    with pytest.raises(UsageError, match="samples.jsonl is empty: there is nothing to score"):
        score_folder(str(here / "products"))
    assert "pass@1" in (root / "summary.md").read_text()


def test_files_of_replies_are_in_the_order_of_the_questions(
    folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches, which are sorted by length, and with a prompt that does not fit in memory; samples that are
    drawn differ, whatever the seed."""
    from toptheta.eval.runner import evaluate
    from toptheta.eval.tasks.humaneval.job import HumanEvalJob

    once = HumanEvalJob.run

    def running(self, model, batch):
        if any(item.key == "HumanEval/1#0" for item in batch):
            raise torch.OutOfMemoryError
        return once(self, model, batch)

    monkeypatch.setattr(HumanEvalJob, "run", running)
    (result,) = evaluate(
        gen_settings(
            folder_model, mode=(3,), num_tasks=3, num_samples_per_task=2, do_sample=True, batch_size=2,
            max_seq_len=400, prefill_chunk=None, seed=1234,
        )
    )  # fmt: skip
    folder, answers = Path(str(result.folder)), answers_by_key(result)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["reply"] for sample in samples] == [answer.answer for answer in answers.values()]
    assert [sample["task_id"] for sample in samples] == [key.partition("#")[0] for key in answers]
    lengths = np.loadtxt(folder / "prompt_completion_lengths_per_sample.csv", dtype=int)
    assert [tuple(row) for row in lengths] == [
        (a.tokens["prompt"], a.tokens["reply"]) for a in answers.values()
    ]
    assert samples[2]["reply"] == "" and lengths[2, 1] == 0 and lengths[3, 1] > 0
    assert samples[0]["reply"] != samples[1]["reply"]


def test_choices_of_beginnings() -> None:
    """Several prompts with one end, as in winogrande: the prompts are the choices."""
    from toptheta.eval.tasks.harness import answers_of

    for right in (False, True):
        sample = {
            "doc_id": 0, "doc": {}, "filter": "none", "metrics": ["acc"], "acc": float(right),
            "target": " ate.", "arguments": [("The cat", " ate."), ("The stone", " ate.")],
            "resps": [[(-1.0, False)], [(-2.0, False)]], "filtered_resps": [(-1.0, False), (-2.0, False)],
        }  # fmt: skip
        (answer,) = answers_of({"samples": {"w": [sample]}}, {}, {})
        assert answer.choices == ["The cat", "The stone"] and answer.answer == 0
        assert answer.target == (0 if right else 1)


def test_prompts_that_are_cut(folder_model: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results and table give their number, answers the number of tokens that the model saw."""
    from toptheta.eval.runner import evaluate

    rows = [
        {
            "id": str(i),
            "question": f"What is ice {i}? " * (600 if i else 2),
            "choices": {"text": ["water", "wood"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for i in range(3)
    ]
    (here / "data" / "arc_easy").mkdir(parents=True)
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (here / "data" / "arc_easy" / f"{split}.jsonl").write_text(lines)
    settings = qa_settings(
        folder_model, mode=(1, 3), task="arc_easy", data_dir="data", num_samples=3, num_fewshot=0
    )
    for result in evaluate(settings):
        assert result.extra["cut_prompts"] == 2
        assert sorted(answer.tokens["prompt"] for answer in read_answers(result.folder))[1:] == [2048, 2048]
    out = capsys.readouterr()
    assert "| prompts cut |" in out.out
    assert out.err.count("2 of 3 prompts are too long for the model's context of 2048 tokens") == 1
