"""The same seed gives the same results, another one other ones."""

from pathlib import Path

import pytest

from tests.eval.helpers import gen_settings, qa_settings
from toptheta.eval.runner import evaluate
from toptheta.eval.settings import HUMANEVAL


def results(settings, monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[list, list[str], str]:
    """Metrics, answers and thresholds of a run in a folder of its own."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    (found,) = evaluate(settings)
    path = Path(str(found.folder))
    metrics = sorted((name, one.value, one.stderr) for name, one in found.metrics.items())
    return metrics, (path / "answers.jsonl").read_text().splitlines(), (path / "th.txt").read_text()


def test_questions(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed chooses questions, examples and rows."""
    settings = [qa_settings(folder_model, mode=(0,), calib_sample_frac=0.3, seed=seed) for seed in (7, 7, 8)]
    one, same, other = (results(s, monkeypatch, tmp_path / str(i)) for i, s in enumerate(settings))
    assert one == same
    assert one[1] != other[1] and one[2] != other[2]


def test_sampled_replies(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"dataset": HUMANEVAL, "mode": (0,), "num_tasks": 1, "do_sample": True, "max_seq_len": 180}
    values |= {"calib_samples": 1, "calib_sample_frac": 0.3}
    settings = [gen_settings(folder_model, seed=seed, **values) for seed in (7, 7, 8)]
    one, same, other = (results(s, monkeypatch, tmp_path / str(i)) for i, s in enumerate(settings))
    assert one == same
    assert one[1] != other[1] and one[2] != other[2]
