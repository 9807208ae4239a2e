"""A run is resumed only with the model and the data that it was started with."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.eval.helpers import calibrating_settings, gen_settings, only_run, qa_settings
from tests.eval.test_calibration_task import arc_rows
from toptheta.eval.run import open_run
from toptheta.eval.runner import evaluate
from toptheta.eval.settings import PERPLEXITY, Settings
from toptheta.models.fingerprint import fingerprint
from toptheta.models.loading import ModelSource, find_model, load_config
from toptheta.report import load
from toptheta.util.errors import UsageError


def no_change(here: Path) -> None:
    pass


def other_text(here: Path) -> None:
    """One word; the number of tokens stays."""
    text = (here / "text.txt").read_text()
    (here / "text.txt").write_text(text.replace("green", "brown", 1))


def other_weights(here: Path) -> None:
    """As after a training step: the same names, shapes and types."""
    path = here / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({name: value + 1e-3 for name, value in weights.items()}, path, {"format": "pt"})


def other_config(here: Path) -> None:
    path = here / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


@pytest.fixture(scope="module")
def begun(folder_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    """Settings, and a folder with the model, the text, and a run whose second cell is not finished."""
    root = tmp_path_factory.mktemp("begun")
    settings = gen_settings("model", dataset=PERPLEXITY, text="text.txt", mode=(1, 3), num_tasks=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        shutil.copytree(folder_model, "model")
        Path("text.txt").write_text("The hills were green, and the town below slept. " * 120)
        evaluate(settings)
    sorted(root.glob("products/*/*/results.json"))[-1].unlink()
    return settings, root


@pytest.fixture
def stopped(begun: tuple[Settings, Path], here: Path) -> tuple[Settings, str]:
    """The settings, and the run in a folder of the test's own."""
    settings, root = begun
    shutil.copytree(root, here, dirs_exist_ok=True)
    return settings, str(only_run(here / "products"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (no_change, None),
        (other_text, "the data of perplexity (--text text.txt)"),
        (other_weights, "the model model"),
        (other_config, "the model model"),
    ],
)
def test_resume(
    stopped: tuple[Settings, str], here: Path, change: Callable[[Path], None], named: str | None
) -> None:
    change(here)
    settings, run = stopped
    if named is None:
        assert len(load(run).notes) == 1 and len(evaluate(settings, run)) == 2 and not load(run).notes
        return
    with pytest.raises(UsageError, match=re.escape(f"--resume {run}: {named} changed since this run")):
        evaluate(settings, run)


def test_runs_of_earlier_versions(stopped: tuple[Settings, str], here: Path) -> None:
    """They do not say what they were started with."""
    settings, run = stopped
    path = Path(run) / "run.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "inputs"}))
    other_text(here)
    assert len(evaluate(settings, run)) == 2


def test_questions(folder_model: str, here: Path) -> None:
    """A bundled task and its calibration split have the same hash each time, and another one with shots."""
    from toptheta.eval.tasks.qa import qa_jobs

    plain, again = (qa_jobs(qa_settings(folder_model, num_fewshot=0))[0].data_hash() for _ in range(2))
    (few,) = qa_jobs(qa_settings(folder_model, num_fewshot=2))
    assert plain == again != few.data_hash()


def test_rows_of_a_calibration_task(folder_model: str, here: Path) -> None:
    arc_rows(here / "data" / "arc_easy", "train", 30)
    settings = calibrating_settings(
        folder_model, calib_task="arc_easy", data_dir="data", calib_samples=2, calibrate_only=True
    )
    evaluate(settings)
    run = str(only_run(here / "products"))
    evaluate(settings, run)
    arc_rows(here / "data" / "arc_easy", "train", 31)
    with pytest.raises(UsageError, match="the data of --calib_task arc_easy changed since"):
        evaluate(settings, run)


def test_hub_models_are_known_by_their_commit() -> None:
    class Config:
        _commit_hash = "a" * 40

    assert fingerprint(ModelSource("x", "owner/x"), Config()) == "a" * 40
    assert fingerprint(ModelSource("x", "owner/x"), object()) == ""


def test_pieces_of_the_file_are_those_that_lie_apart(tmp_path: Path) -> None:
    """A file of some MB: a change of one percent of it anywhere changes the hash; the small model is read in
    a moment."""
    values = torch.zeros(2_000_000)
    (tmp_path / "config.json").write_text("{}")
    source = ModelSource("x", str(tmp_path))
    seen = set()
    for place in (None, 0, 777_777, 1_980_000):
        changed = values.clone()
        if place is not None:
            changed[place : place + 20_000] = 1.0
        save_file({"w": changed}, tmp_path / "model.safetensors")
        seen.add(fingerprint(source, None))
    assert len(seen) == 4
    small = find_model("smollm2")
    assert fingerprint(small, load_config(small)) == fingerprint(small, load_config(small))


def test_inputs_by_name(here: Path) -> None:
    """A name that only one of both knows is not compared, as of a model that was moved."""
    run = open_run(gen_settings("x"), "gen_llama.py", None, lambda: {"the model x": "1", "the data": "2"})
    run.lock.close()
    open_run(gen_settings("y"), "gen_llama.py", str(run.folder), lambda: {"the model y": "3"}).lock.close()
    with pytest.raises(UsageError, match="the data changed since"):
        open_run(gen_settings("x"), "gen_llama.py", str(run.folder), lambda: {"the data": "3"})
