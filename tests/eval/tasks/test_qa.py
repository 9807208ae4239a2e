"""The QA job end to end on a small folder model: results, products, resuming, several tasks."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.eval.helpers import interrupt_at, qa_settings
from toptheta.util.errors import UsageError


def test_qa(folder_model: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    from toptheta.eval.runner import evaluate

    results = evaluate(qa_settings(folder_model))
    assert [r.method for r in results] == ["Top-theta K=16", "Top-k K=16", "dense"]
    for result in results:
        assert result.metrics["acc"].count == 5 and result.metrics["acc"].stderr is not None
    kept = [result.kept["prefill"].attn for result in results]
    assert kept[2] == 1.0 and 0.05 < kept[0] < 0.6 and abs(kept[0] - kept[1]) < 0.1
    printed = capsys.readouterr().out
    assert "| Top-theta K=16 |" in printed and "±" in printed and "(n=5)" in printed

    run = next(here.joinpath("products").iterdir())
    cell = run / "mode0_k16"
    assert {
        "th.txt",
        "calibration.safetensors",
        "config.json",
        "results.json",
        "sequence_lengths_per_example.csv",
    } <= {path.name for path in cell.iterdir()}
    assert (
        not (cell / "partial").exists()
        and (run / "summary.json").is_file()
        and (run / "tradeoff.png").is_file()
    )
    attn = np.loadtxt(gzip.open(cell / "layer1_kept_attn_prefill.csv.gz", "rt"), delimiter=",")
    lengths = np.loadtxt(cell / "sequence_lengths_per_example.csv")
    assert attn.shape == (len(lengths) * 6, 5) and (attn[:, 0] == 1).all()
    assert (attn[::6, 2] == lengths).all() and (attn[:, 4] == attn[:, 2] * (attn[:, 2] + 1) / 2).all()
    vrow = np.loadtxt(gzip.open(cell / "layer0_kept_vrow_prefill.csv.gz", "rt"), delimiter=",")
    assert vrow.shape == (len(lengths) * 2, 5) and (vrow[:, 3] <= vrow[:, 4]).all()
    assert attn[:, 3].sum() < attn[:, 4].sum()
    first = gzip.open(cell / "layer0.txt.gz", "rt").readline().split(" ")
    assert (
        first[0] == f"L0_H0:{int(lengths[0])}"
        and first[1:3] == ["16", "prefill"]
        and 0.3 < float(first[3]) < 3
    )
    assert (
        here / "results-tiny-llama" / "tiny-llama_everyday_science_mode0_placementpre-softmax.txt"
    ).is_file()
    config = json.loads((cell / "config.json").read_text())
    assert config["k_per_layer"] == [16, 16] and config["environment"]["torch"] == torch.__version__

    loaded = evaluate(qa_settings(folder_model, mode=(0,), calib_load_path=str(cell)))
    assert loaded[0].metrics == results[0].metrics and loaded[0].kept == results[0].kept
    wrong = qa_settings(folder_model, mode=(0,), calib_load_path=str(cell), calib_add_sigma=5.0)
    with pytest.raises(UsageError, match="--calib_add_sigma 5.0 has no effect .* calibrated with 0.0"):
        evaluate(wrong)


@pytest.mark.parametrize("stop_after", [2, 6])
def test_qa_resumes(folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    """Interrupted while calibrating (2) or evaluating (6), then resumed: the same results as in one go."""
    from toptheta.eval.runner import evaluate

    settings = qa_settings(folder_model, mode=(0, 3), output_dir="straight")
    straight = evaluate(settings)
    batches = interrupt_at(monkeypatch, stop_after)
    with pytest.raises(KeyboardInterrupt):
        evaluate(qa_settings(folder_model, mode=(0, 3), output_dir="stopped"))
    run = next(here.joinpath("stopped").iterdir())
    assert not (run / "mode0_k16" / "results.json").exists()
    resumed = evaluate(qa_settings(folder_model, mode=(0, 3), output_dir="stopped"), resume=str(run))
    cut_off = stop_after > 3  # a prompt that calibrates counts whole, one that is evaluated is done again
    assert len(batches) == cut_off + 3 + 5 + 5
    for a, b in zip(straight, resumed):
        assert a.metrics == b.metrics and a.kept == b.kept
    assert resumed[0].seconds["calibration"] > 0  # what the first start took counts
    name = "mode0_k16/layer1_kept_attn_prefill.csv.gz"
    first = next(here.joinpath("straight").iterdir())
    assert gzip.decompress((first / name).read_bytes()) == gzip.decompress((run / name).read_bytes())
    assert (first / "mode0_k16/th.txt").read_text() == (run / "mode0_k16/th.txt").read_text()


def test_several_k_are_calibrated_in_one_pass(
    folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without calib_tac the prompts run once for all K, with the tables of separate runs; with it once for
    each."""
    from toptheta.calibration.tables import load_tables
    from toptheta.eval import checkpoint
    from toptheta.eval.runner import evaluate

    passes = []
    begin = checkpoint.begin_calibration
    monkeypatch.setattr(
        checkpoint, "begin_calibration", lambda *args, **more: passes.append(1) or begin(*args, **more)
    )
    one_pass = {"mode": (0,), "calib_tac": False, "calibrate_only": True}
    evaluate(qa_settings(folder_model, **one_pass, k=(16, 32), layerk={1: 24}, output_dir="joint"))
    assert len(passes) == 1
    evaluate(qa_settings(folder_model, **one_pass, k=(32,), layerk={1: 24}, output_dir="alone"))
    evaluate(qa_settings(folder_model, **one_pass | {"calib_tac": True}, k=(16, 32), output_dir="tac"))
    assert len(passes) == 4
    joint = load_tables(str(next(here.glob("joint/*/mode0_k32"))), 2, 6)
    alone = load_tables(str(next(here.glob("alone/*"))), 2, 6)
    assert joint.k == alone.k == {0: 32, 1: 24}
    for layer in range(2):
        np.testing.assert_allclose(joint.theta[layer].values, alone.theta[layer].values, rtol=1e-6)
        assert (joint.theta[layer].samples == alone.theta[layer].samples).all()


def test_qa_k_above_every_prompt(folder_model: str, here: Path) -> None:
    from toptheta.eval.runner import evaluate

    with pytest.raises(
        UsageError, match="no row longer than K=900 in layer 0: the calibration prompts had at most"
    ):
        evaluate(qa_settings(folder_model, mode=(0,), k=(900,)))


def test_local_data(folder_model: str, here: Path, local_data: Path) -> None:
    """Stock tasks from local rows: one question each of several kinds, calibration on another split."""
    from toptheta.eval.runner import evaluate

    for task in ("arc_easy", "hellaswag", "mmlu"):
        settings = qa_settings(
            folder_model,
            mode=(0,),
            task=task,
            num_samples=6,
            num_fewshot=1,
            calib_samples=6,
            data_dir=str(local_data),
        )
        result = evaluate(settings)[0]
        assert result.metrics["acc"].count == 6, task


def test_several_tasks(
    folder_model: str, here: Path, local_data: Path, capsys: pytest.CaptureFixture
) -> None:
    """Multiple choice and generation in one run: a folder and a table for each, resumed where it stopped."""
    from toptheta.eval.runner import evaluate

    settings = qa_settings(
        folder_model,
        task="medmcqa,gsm8k",
        data_dir=str(local_data),
        num_samples=2,
        num_fewshot=2,
        mode=(0, 3),
        calib_samples=2,
    )
    results = evaluate(settings)
    assert [(r.task, r.method) for r in results] == [
        (task, method) for task in ("medmcqa", "gsm8k") for method in ("Top-theta K=16", "dense")
    ]
    assert results[0].metrics["acc"].count == 2
    assert "exact_match(strict-match)" in results[2].metrics
    assert results[2].kept["generative_decoding"].attn < 0.6 < 1.0 == results[3].kept["prefill"].attn
    (run,) = here.joinpath("products").iterdir()
    assert json.loads((run / "summary.json").read_text()) == [result.to_json() for result in results]
    assert "medmcqa" in (run / "summary.md").read_text() and "gsm8k" in (run / "summary.md").read_text()
    assert (run / "gsm8k" / "mode0_k16" / "th.txt").is_file()

    (run / "gsm8k" / "mode3" / "results.json").unlink()
    capsys.readouterr()
    again = evaluate(settings, resume=str(run))
    assert [r.metrics for r in again] == [r.metrics for r in results]
    assert "Calibrating" not in capsys.readouterr().err


def test_any_other_task_by_name(folder_model: str, here: Path) -> None:
    """A task of the harness that no table here knows, on rows of its format."""
    from toptheta.eval.runner import evaluate

    folder = here / "data" / "sciq"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        rows = [
            {
                "question": f"What number follows {n} ({split})?",
                "support": "Numbers follow each other, one by one, without an end. " * 3,
                "correct_answer": str(n + 1),
                **{f"distractor{i}": str(n + 1 + i) for i in (1, 2, 3)},
            }
            for n in range(4)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result, _) = evaluate(
        qa_settings(folder_model, task="sciq", data_dir=str(here / "data"), mode=(0, 3), num_samples=None)
    )
    assert result.task == "sciq" and result.metrics["acc"].count == 4
    assert 0.0 < result.kept["prefill"].attn < 1.0


@pytest.mark.parametrize("task", ["arc_easy,arc_easy", "arc_easy,", "arc_easyy,hellaswag"])
def test_wrong_lists_of_tasks(folder_model: str, here: Path, task: str) -> None:
    from toptheta.eval.runner import evaluate

    with pytest.raises(UsageError, match="--task"):
        evaluate(qa_settings(folder_model, task=task))
    assert not here.joinpath("products").exists()
