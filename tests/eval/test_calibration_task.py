"""Calibration on the prompts of another task than the one that is evaluated."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.eval.helpers import calibrating_settings
from toptheta.calibration.tables import load_tables
from toptheta.eval.settings import GenSettings, QASettings
from toptheta.util.errors import UsageError


def arc_rows(folder: Path, split: str, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": str(i),
            "question": f"Which of these numbers follows {i}?",
            "choices": {"text": [str(i + 1), str(i + 5), str(i + 7)], "label": ["A", "B", "C"]},
            "answerKey": "A",
        }
        for i in range(count)
    ]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_calibration_on_another_task(folder_model: str, here: Path) -> None:
    """Evaluates the bundled task with the tables that the other task's own run calibrates."""
    from toptheta.eval.runner import evaluate

    arc_rows(here / "data" / "arc_easy", "train", 30)
    local = {"data_dir": str(here / "data")}
    (result,) = evaluate(
        calibrating_settings(folder_model, calib_task="arc_easy", calib_interp="fit", **local)
    )
    assert result.task == "everyday_science" and result.metrics["acc"].count == 2
    evaluate(
        calibrating_settings(
            folder_model, task="arc_easy", num_fewshot=25, calibrate_only=True, output_dir="own", **local
        )
    )
    evaluate(calibrating_settings(folder_model, calibrate_only=True, output_dir="plain"))
    (run,), (own,), (plain,) = (here.glob(f"{name}/*") for name in ("products", "own", "plain"))
    assert (run / "th.txt").read_text() == (own / "th.txt").read_text() != (plain / "th.txt").read_text()
    assert load_tables(run, 2, 6).meta["task"] == "arc_easy"
    assert load_tables(plain, 2, 6).meta["task"] == "everyday_science"
    config = json.loads((run / "config.json").read_text())
    assert (config["task"], config["num_fewshot"]) == ("everyday_science", 2)
    assert (config["calib_task"], config["calib_num_fewshot"]) == ("arc_easy", 25)
    assert config["settings"]["calib_task"] == "arc_easy" and config["settings"]["calib_interp"] == "fit"


@pytest.mark.parametrize("dataset", ["openai_humaneval", "perplexity"])
def test_generation_calibrates_on_a_task(folder_model: str, here: Path, dataset: str) -> None:
    """gen_llama.py's tables of --calib_task are those of test_llama.py."""
    from toptheta.eval.runner import evaluate

    arc_rows(here / "data" / "arc_easy", "train", 30)
    local = {"data_dir": str(here / "data"), "calibrate_only": True}
    evaluate(calibrating_settings(folder_model, task="arc_easy", num_fewshot=25, output_dir="own", **local))
    shared = {"llama": folder_model, "mode": (0,), "k": (16,), "calib_sample_frac": 1.0, "calib_samples": 3}
    (here / "text").write_text("One sentence follows the other, and all are alike. " * 200)
    shared["max_seq_len"] = 256
    text = {"text": str(here / "text")} if dataset == "perplexity" else {}
    evaluate(GenSettings(**shared, **local, **text, dataset=dataset, device="cpu", calib_task="arc_easy"))
    (run,), (own,) = (here.glob(f"{name}/*") for name in ("products", "own"))
    assert (run / "th.txt").read_text() == (own / "th.txt").read_text()
    assert load_tables(run, 2, 6).meta["task"] == "arc_easy"
    config = json.loads((run / "config.json").read_text())
    assert config["task"] == dataset and config["calib_task"] == "arc_easy"


def test_wrong_calibration_tasks(folder_model: str, here: Path) -> None:
    from toptheta.eval.runner import evaluate

    arc_rows(here / "data" / "arc_challenge", "test", 3)
    for changes, message in (
        ({"calib_task": "hellaswagg"}, "--calib_task 'hellaswagg' is unknown: choose for example hellaswag"),
        ({"calib_task": "arc_easy", "data_dir": "data"}, "no folder 'arc_easy' for --calib_task arc_easy"),
        ({"calib_task": "arc_challenge", "data_dir": "data"}, "no train.jsonl, which --calib_task arc_ch"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(calibrating_settings(folder_model, **changes))
    with pytest.raises(UsageError, match="--calib_task arc_challenge"):
        evaluate(GenSettings(llama=folder_model, calib_task="arc_challenge", data_dir="data"))
    assert not here.joinpath("products").exists()
    assert GenSettings().calibration_task == "openai_humaneval"


def test_generation_calibrated_on_a_qa_task(folder_model: str, here: Path) -> None:
    """Thresholds of another task's prompts: the same as test_llama.py --calibrate_only finds on them."""
    from toptheta.calibration.tables import load_tables
    from toptheta.eval.runner import evaluate

    shared = {"mode": (0,), "k": (16,), "calib_sample_frac": 1.0, "calib_samples": 3, "device": "cpu"}
    settings = GenSettings(
        **shared, llama=folder_model, calib_task="everyday_science", num_tasks=1, max_seq_len=256
    )
    (result,) = evaluate(settings)
    config = json.loads((Path(result.folder) / "config.json").read_text())
    assert config["calib_task"] == "everyday_science" and config["task"] == "openai_humaneval"
    evaluate(QASettings(**shared, llama=folder_model, calibrate_only=True, output_dir="tables"))
    ours = load_tables(result.folder, 2, 6)
    theirs = load_tables(next(here.joinpath("tables").iterdir()), 2, 6)
    assert ours.meta["task"] == theirs.meta["task"] == "everyday_science"
    for layer in range(2):
        np.testing.assert_array_equal(ours.theta[layer].samples, theirs.theta[layer].samples)
        np.testing.assert_allclose(ours.theta[layer].values, theirs.theta[layer].values, rtol=1e-5)
    with pytest.raises(UsageError, match="--calib_task 'nothing' is unknown"):
        evaluate(GenSettings(**shared, llama=folder_model, calib_task="nothing"))


def test_cells_without_calibration(folder_model: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    """With --calibrate_only they are passed over, which is said."""
    from toptheta.eval.runner import evaluate

    assert evaluate(calibrating_settings(folder_model, mode=(3, 0), calibrate_only=True)) == []
    said = capsys.readouterr().err
    assert "dense: nothing to calibrate" in said and "Calibrated tables of Top-theta K=16: " in said
    assert [path.parent.name for path in here.rglob("config.json") if "products" in str(path)] == [
        "mode0_k16"
    ]
