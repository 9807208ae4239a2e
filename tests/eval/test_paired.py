"""Runs with a dense cell compare the others with it, in every data set, in tables and in sweeps."""

import csv
import json
from pathlib import Path

import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

import test_llama
from tests.eval.helpers import gen_settings, qa_settings
from tests.helpers.paths import ROOT
from tests.helpers.processes import Script
from toptheta.eval import sweep
from toptheta.eval.sweep import run_sweep
from toptheta.eval.table_cells import SweepOptions
from toptheta.report.paired import compare
from toptheta.report.results import CellResult, read_answers
from toptheta.util.errors import UsageError


def test_multiple_choice(folder_model: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    """Against scipy and statsmodels on the answers of a run."""
    from toptheta.eval.runner import evaluate

    sparse, dense = evaluate(
        qa_settings(folder_model, mode=(1, 3), num_samples=40, k=(4,), sdc="none", vmc=False)
    )
    table = capsys.readouterr().out
    assert "| acc_norm minus dense % | lost / gained % |" in table
    ours, theirs = (read_answers(str(result.folder)) for result in (sparse, dense))
    found = compare(theirs, ours)
    for name in ("acc", "acc_norm"):
        a, b = ([answer.score[name] for answer in one] for one in (theirs, ours))
        expected = stats.ttest_rel(b, a)
        assert found.scores[name].value / found.scores[name].stderr == pytest.approx(expected.statistic)
        assert found.scores[name].value == pytest.approx(
            sparse.metrics[name].value - dense.metrics[name].value
        )
        counts = [[sum((x, y) == (p, q) for x, y in zip(a, b)) for q in (1, 0)] for p in (1, 0)]
        assert (found.flips[name].lost, found.flips[name].gained) == (counts[0][1], counts[1][0])
        assert found.flips[name].lost + found.flips[name].gained > 0
        assert found.flips[name].p == pytest.approx(mcnemar(counts, exact=True).pvalue)
    change = [b.loglikelihoods[b.target] - a.loglikelihoods[a.target] for a, b in zip(theirs, ours)]
    assert found.target_logprob.value == pytest.approx(sum(change) / 40)
    assert found.target_logprob.stderr == pytest.approx(stats.sem(change))
    saved = json.loads((Path(str(sparse.folder)).parent / "summary.json").read_text())
    assert [CellResult.from_json(one).paired for one in saved] == [sparse.paired, {}]
    assert sparse.paired == {"baseline": "dense"} | json.loads(json.dumps(found.to_json()))


def test_texts_and_replies(folder_model: str, here_with_text: Path, capsys: pytest.CaptureFixture) -> None:
    from toptheta.eval.runner import evaluate

    text = {"dataset": "perplexity", "text": "text.txt", "num_tasks": 3}
    sparse, dense = evaluate(gen_settings(folder_model, mode=(1, 3), **text))
    for name in ("kl", "same_top", "ln_ppl_ratio"):
        for number in ("value", "stderr"):
            found = sparse.paired["text"][name][number]
            assert found == pytest.approx(getattr(sparse.metrics[name], number), rel=1e-3)
    assert "minus dense" not in capsys.readouterr().out
    (other,) = evaluate(gen_settings(folder_model, mode=(3,), decode_from=50, **text))
    with pytest.raises(UsageError, match="have different prompts for window0"):
        compare(read_answers(str(dense.folder)), read_answers(str(other.folder)))

    needles = {"dataset": "needle", "needle_lengths": (200,), "needle_depths": (0, 50, 100)}
    sparse, dense = evaluate(gen_settings(folder_model, mode=(1, 3), k=(4,), vmc=False, **needles))
    assert "found minus dense %" in capsys.readouterr().out
    ours, theirs = (read_answers(str(result.folder)) for result in (sparse, dense))
    for answer in (*ours, *theirs):
        assert len(answer.reply_ids) == answer.tokens["reply"]
    same = [a.reply_ids == b.reply_ids for a, b in zip(ours, theirs)]
    completions = sparse.paired["completions"]
    assert completions["identical"]["value"] == pytest.approx(sum(same) / 3) and not all(same)
    assert 1 <= completions["first_difference"] <= 24


def test_replies_of_the_harness_and_samples(folder_model: str, here: Path, local_data: Path) -> None:
    """Tokens of replies; samples of one program go together."""
    from toptheta.eval.runner import evaluate

    settings = qa_settings(
        folder_model, mode=(3,), task="gsm8k", data_dir=str(local_data), num_samples=2, num_fewshot=1
    )
    for answer in read_answers(str(evaluate(settings)[0].folder)):
        assert len(answer.reply_ids) == answer.tokens["reply"] and answer.cluster is None
    (result,) = evaluate(
        gen_settings(
            folder_model, mode=(3,), num_tasks=2, num_samples_per_task=2, do_sample=True, max_seq_len=400
        )
    )
    answers = read_answers(str(result.folder))
    assert [answer.cluster for answer in answers] == ["HumanEval/0"] * 2 + ["HumanEval/1"] * 2
    assert all(len(answer.reply_ids) == answer.tokens["reply"] for answer in answers)


def test_the_noise_floor_of_a_sweep(folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense attention in another type is compared with the dense row above it, as a sparse method is."""
    monkeypatch.setattr(sweep, "Popen", Script)
    flags = {"llama": folder_model, "num_fewshot": 3, "num_samples": 12, "device": "cpu"}
    part = {
        "script": "test_llama.py",
        "tasks": ["everyday_science"],
        "methods": ["dense", "dense bfloat16", "Top-k"],
        "k": [4],
    }
    methods = {"dense": {"mode": 3}, "dense bfloat16": {"mode": 3, "dtype": "bfloat16"}, "Top-k": {"mode": 1}}
    table = {"title": "A tiny model", "flags": flags, "parts": [part]}
    (here / "tables.json").write_text(json.dumps({"methods": methods, "tables": {"tiny": table}}))
    options = SweepOptions(table="tiny", file="tables.json")
    assert run_sweep(options, {"test_llama.py": test_llama.make_parser}, ROOT) == 0
    folder = here / "products" / "tables" / "tiny"
    text = (folder / "table.md").read_text()
    assert "| acc_norm minus dense % | lost / gained % |" in text and "not run" not in text
    rows = {(r["method"], r["metric"]): r for r in csv.DictReader((folder / "table.csv").open())}
    assert rows["dense", "acc"]["minus_dense"] == ""
    for method in ("dense bfloat16", "Top-k"):
        expected = float(rows[method, "acc"]["value"]) - float(rows["dense", "acc"]["value"])
        assert float(rows[method, "acc"]["minus_dense"]) == pytest.approx(expected)
        assert float(rows[method, "acc"]["mcnemar_p"]) <= 1.0
    saved = {one["method"]: one for one in json.loads((folder / "results.json").read_text())}
    assert "paired" not in saved["dense"]
    noise, sparse = (saved[name]["paired"] for name in ("dense bfloat16", "Top-k K=4"))
    assert noise["baseline"] == sparse["baseline"] == "dense"
    assert 0 < noise["target_logprob"]["stderr"] < sparse["target_logprob"]["stderr"]
