"""A run that several processes share: the same thresholds, answers and products as of one, also when one of
them is killed and others go on."""

import gzip
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.eval.helpers import gen_settings, only_run, qa_settings
from tests.helpers.processes import run, start
from toptheta.calibration.tables import load_tables
from toptheta.eval import cell as products
from toptheta.eval import checkpoint, processes
from toptheta.eval.runner import evaluate
from toptheta.eval.settings import Settings
from toptheta.util.errors import UsageError


def found_in(folder: Path) -> dict[str, Any]:
    """What a run has found, but for times: by file, the lines of large ones in the order of the alphabet."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "results.json":
            result = json.loads(path.read_text())
            found[name] = {key: value for key, value in result.items() if key not in ("seconds", "folder")}
        elif path.name.endswith(".gz"):
            found[name] = sorted(gzip.decompress(path.read_bytes()).splitlines())
        elif path.suffix in (".jsonl", ".csv"):
            found[name] = sorted(path.read_bytes().splitlines())
        elif path.name == "th.txt":
            found[name] = len(path.read_text().splitlines())
    return found


def check_same(one: Path, several: Path) -> None:
    expected, found = found_in(one), found_in(several)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    for path in one.rglob("th.txt"):
        tables, others = (
            load_tables(folder, 2, 6) for folder in (path.parent, several / path.parent.relative_to(one))
        )
        for kind in ("theta", "sdc"):
            for layer, table in getattr(tables, kind).items():
                other = getattr(others, kind)[layer]
                np.testing.assert_array_equal(other.samples, table.samples)
                np.testing.assert_allclose(other.values, table.values, rtol=1e-6)


def qa(model: str) -> Settings:
    changes: dict[str, Any] = {"mode": (0,), "k": (16, 24), "calib_tac": False, "num_samples": 4}
    return qa_settings(model, batch_size=2, calib_sample_frac=0.5, **changes)


def in_order(model: str) -> Settings:
    """SDC's samples are of what the thresholds so far drop, so they depend on the order of prompts."""
    return qa_settings(model, mode=(0,), sdc="offline-calibrated", calib_tac=False, num_samples=2)


def needle(model: str) -> Settings:
    return gen_settings(model, dataset="needle", mode=(0,), needle_lengths=(160,), needle_depths=(0, 50))


@pytest.fixture(scope="module")
def one(folder_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process finds with the settings `qa`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("one"))
        evaluate(qa(folder_model))
        return only_run(Path.cwd() / "products")


def test_the_same_as_one_process(one: Path, folder_model: str, here: Path) -> None:
    started = run(3, here / "logs", evaluate, qa(folder_model))
    several = only_run(here / "products")
    check_same(one, several)
    assert json.loads((several / "run.json").read_text())["world_size"] == 3
    assert "Run folder" in started.printed(0) and "Run folder" not in started.printed(1)


@pytest.mark.parametrize("settings", [in_order, pytest.param(needle, marks=pytest.mark.long)])
def test_the_same_as_one_process_of_other_kinds(
    settings: Callable[[str], Settings], folder_model: str, here: Path
) -> None:
    evaluate(settings(folder_model))
    single = only_run(here / "products").rename(here / "single")
    run(2, here / "logs", evaluate, settings(folder_model))
    check_same(single, only_run(here / "products"))


def evaluate_and_die(settings: Settings, resume: str | None, calibrating: bool) -> None:
    """Process 1 is killed when its first batch is through; all save after each batch."""
    processes.BEAT_SECONDS, processes.LOST_SECONDS = 0.5, 3.0
    checkpoint.CHECKPOINT_SECONDS = products.CHECKPOINT_SECONDS = -1.0
    kind, name = (checkpoint.Checkpoint, "save") if calibrating else (products.Cell, "checkpoint")
    save = getattr(kind, name)

    def save_and_die(self: Any) -> None:
        save(self)
        if processes.rank() == 1 and (calibrating or self.answers):
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(kind, name, save_and_die)
    evaluate(settings, resume)


def test_one_is_killed_and_others_go_on(one: Path, folder_model: str, here: Path) -> None:
    """First while calibrating, then while evaluating; each start has another number of processes."""
    settings = qa(folder_model)
    folder: str | None = None
    for calibrating, count in ((True, 2), (False, 3)):
        with start(count, here / str(count), evaluate_and_die, settings, folder, calibrating) as started:
            codes = started.join(100.0)
        assert codes == [1, -signal.SIGKILL] + [1] * (count - 2), started.printed(0)
        for rank in (0, count - 1):
            if rank != 1:
                assert "process 1 does not respond" in started.printed(rank)
        assert "To resume:" in started.printed(0) and "Traceback" not in started.printed(0)
        folder = str(only_run(here / "products"))
        assert not list(Path(folder).rglob("results.json"))
        found = "partial-calibration-1.safetensors" if calibrating else "partial/*.zip"
        assert list(Path(folder).rglob(found))
    run(2, here / "again", evaluate, settings, folder)
    check_same(one, only_run(here / "products"))
    assert not list(Path(str(folder)).rglob("partial*"))


def evaluate_and_leave_one(settings: Settings) -> None:
    """The first process is killed while it calibrates; the other does not look after it for a while."""
    processes.BEAT_SECONDS = 100.0
    save = checkpoint.Checkpoint.save

    def save_and_die(self: checkpoint.Checkpoint) -> None:
        save(self)
        if processes.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.Checkpoint.save = save_and_die  # type: ignore[method-assign]
    evaluate(settings)


def test_no_run_is_resumed_while_one_of_its_processes_lives(folder_model: str, here: Path) -> None:
    settings = in_order(folder_model)
    with start(2, here / "logs", evaluate_and_leave_one, settings) as started:
        started.processes[0].join(100.0)
        assert started.processes[0].exitcode == -signal.SIGKILL, started.printed(0)
        folder = str(only_run(here / "products"))
        with pytest.raises(UsageError, match="another process is running it"):
            evaluate(settings, folder)
        assert started.processes[1].is_alive()
    started.processes[1].join()
    evaluate(settings, folder)
    assert (Path(folder) / "results.json").is_file()
