"""What a run keeps through signals, damaged chunks and full disks: each request whole, and once."""

import errno
import gzip
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.eval.helpers import calibrating_settings, only_run, qa_settings
from toptheta.eval import cell as products
from toptheta.eval import partial
from toptheta.eval.cell import Cell
from toptheta.models.recorder import LayerRecord
from toptheta.report.results import CellResult
from toptheta.util import files, interrupts
from toptheta.util.errors import UsageError
from toptheta.util.interrupts import on_signal, stop_requested, uninterrupted

ROWS = "sequence_lengths_per_example.csv"


def record(n: int) -> LayerRecord:
    ones = np.ones((1, 1), dtype=int)
    return LayerRecord(ones * n, ones * n, np.array([n]), np.array([n]), np.array([n]))


def add(cell: Cell, n: int) -> None:
    cell.add({str(n): n}, {0: record(n)}, {})


def finished(cell: Cell) -> tuple[list[str], list[str]]:
    """What is in two product files in the end."""
    cell.finish(CellResult("dense"), [])
    assert not (cell.path / "partial").exists()
    kept = gzip.decompress((cell.path / "layer0_kept_attn_prefill.csv.gz").read_bytes()).decode()
    return (cell.path / ROWS).read_text().split(), [line.split(",")[2] for line in kept.splitlines()]


def interrupted_call(call, at: int) -> bool:
    """Make a call during which a signal comes before the instruction number `at` of toptheta/eval; whether
    there are that many."""
    count, came = 0, False

    def tracing(frame, event, argument):
        nonlocal count, came
        if "toptheta/eval" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == at:
                came = True
                on_signal(signal.SIGTERM, None)
        return tracing

    sys.settrace(tracing)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return came


def test_a_signal_at_any_instruction_of_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between the writing of a chunk and the clearing: answers and rows are there whole, and once."""
    monkeypatch.setattr(products, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(files, "flush", lambda path: None)  # hundreds of times
    at, came = 1, True
    while came:
        cell = Cell(tmp_path / str(at))
        add(cell, 3)
        came = interrupted_call(lambda: add(cell, 5), at)  # noqa: B023
        cell.checkpoint()
        again = Cell(cell.path)
        assert again.answers in ({"3": 3}, {"3": 3, "5": 5})
        if "5" not in again.answers:  # what a resumed run does
            add(again, 5)
        assert finished(again) == (["3", "5"], ["3", "5"]), at
        at += 7  # each of many hundred takes files
    assert at > 300


def test_blocks() -> None:
    """Signals wait for the outermost block; a second one ends a long block at once, but none of those that it
    is in."""
    with pytest.raises(KeyboardInterrupt):
        on_signal(signal.SIGINT, None)
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            with uninterrupted():
                on_signal(signal.SIGINT, None)
                on_signal(signal.SIGTERM, None)
                steps.append("inner")
            assert stop_requested()
            steps.append("outer")
    assert steps == ["inner", "outer"] and not stop_requested()
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted(until_second=True):
            on_signal(signal.SIGINT, None)
            with uninterrupted():
                on_signal(signal.SIGINT, None)
                steps.append("saved")
            on_signal(signal.SIGINT, None)
            steps.append("not reached")
    assert steps[2:] == ["saved"] and not interrupts._blocks and not stop_requested()


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "a folder"])
def test_a_damaged_chunk_is_computed_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(products, "CHECKPOINT_SECONDS", -1.0)
    cell = Cell(tmp_path)
    for n in (3, 4, 5):
        add(cell, n)
    path = partial.chunks(tmp_path / "partial")[1]
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":  # what earlier versions left
        path.with_suffix("").mkdir()
    else:
        at = data.index(b"4\n")
        path.write_bytes(
            {"empty": b"", "cut": data[:-9], "changed": data[:at] + b"9" + data[at + 1 :]}[damage]
        )
    again = Cell(tmp_path)
    assert again.answers == {"3": 3, "5": 5} and "computed again" in capsys.readouterr().err
    add(again, 4)
    assert finished(again) == (["3", "5", "4"], ["3", "5", "4"])


def test_what_a_kill_leaves_is_cleared(tmp_path: Path) -> None:
    cell = Cell(tmp_path)
    add(cell, 3)
    cell.finish(CellResult("dense"), [])
    (tmp_path / "partial").mkdir()
    with zipfile.ZipFile(tmp_path / "partial" / "00000.zip", "w"):
        pass
    assert Cell(tmp_path).finished and not (tmp_path / "partial").exists()


@pytest.mark.parametrize("second", [False, True])
def test_a_calibration_request_counts_whole_or_not_at_all(
    second: bool, folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the middle of a request's layers: the request is finished and saved; with a second signal
    it is dropped. The tables are those of a run that was left alone."""
    from toptheta.calibration.sampler import LayerCalibration
    from toptheta.eval.runner import evaluate

    options = {"calibrate_only": True, "calib_sample_frac": 0.3, "sdc": "offline-calibrated"}
    evaluate(calibrating_settings(folder_model, **options, output_dir="straight"))
    start, calls = LayerCalibration.start_call, []

    def starting(self, *arguments):
        calls.append(1)
        if len(calls) == 6:  # each request calls both layers twice, for the prompt and for its answers
            for _ in range(1 + second):
                on_signal(signal.SIGINT, None)
        start(self, *arguments)

    monkeypatch.setattr(LayerCalibration, "start_call", starting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(calibrating_settings(folder_model, **options, output_dir="stopped"))
    assert len(calls) == (6 if second else 8)
    run = only_run(here / "stopped")
    seen = bytes(load_file(run / "partial-calibration.safetensors")["done"].tolist())
    assert bool(seen) != second
    evaluate(calibrating_settings(folder_model, **options, output_dir="stopped"), resume=str(run))
    for name in ("th.txt", "sdc.txt"):
        assert (run / name).read_text() == (only_run(here / "straight") / name).read_text()
    assert not (run / "partial-calibration.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["partial-calibration.safetensors", "th.txt", "00000.zip", "results.json", "tradeoff.png"]
)
def test_a_full_disk(name: str, folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file there is no room for: one sentence that says how to go on, and nothing is lost."""
    from toptheta.eval.runner import evaluate

    real = files.flush

    def full(path):
        if f"{name}." in Path(path).name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    settings = qa_settings(folder_model, mode=(0,), num_samples=2, sdc="exact")
    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(
        UsageError, match=r"No space left.*resume with: python test_llama.py --resume products/"
    ):
        evaluate(settings)
    run = only_run(here / "products")
    assert not list(run.rglob(f"{files.UNFINISHED}*"))
    assert (run / "results.json").exists() == (name == "tradeoff.png")
    monkeypatch.setattr(files, "flush", real)
    (result,) = evaluate(settings, resume=str(run))
    assert result.metrics["acc"].count == 2
    assert len((run / ROWS).read_text().split()) == 2 * 4  # each question has four choices
    (log,) = here.glob("results-tiny-llama/*")
    assert log.read_text().count(run.name) == 1


@pytest.mark.parametrize(
    ("place", "output_dir", "message"),
    [
        ("/proc", "{here}", "the folder of the summaries, results-tiny-llama cannot be written to"),
        ("{here}", "/proc/new/below", "--output_dir /proc/new/below cannot be written to"),
    ],
)
def test_folders_that_cannot_be_written(
    place: str, output_dir: str, message: str, folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is computed, and nothing is left."""
    from toptheta.eval import runner

    monkeypatch.chdir(place.format(here=here))
    monkeypatch.delattr(runner, "_load")
    settings = qa_settings(folder_model, num_samples=1, output_dir=output_dir.format(here=here))
    with pytest.raises(UsageError, match=message):
        runner.evaluate(settings)
    assert not list(here.iterdir())


def test_calls_that_were_computed_dense_add_up(tmp_path: Path) -> None:
    """Over chunks and starts, like answers."""
    more = iter([(1, 10), (2, 20), (4, 40)])
    for n, total in ((3, (1, 10)), (4, (3, 30)), (5, (7, 70))):
        cell = Cell(tmp_path)
        cell.take_calls = lambda: next(more)
        add(cell, n)
        cell.checkpoint()
        cell.checkpoint()  # there is nothing new
        assert cell.calls == total
    assert Cell(tmp_path).calls == (7, 70)
