"""Runs that are killed at random points and resumed are those of a run that was left alone, file by file.

`pytest tests/eval/test_killed.py --kills 40` for the full proof; the usual suite does a few.
"""

import gzip
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
USUAL_KILLS = {"of_one": 2, "of_two": 1}
COMMON = "--seed 5 --device cpu --effective_k --k 16"
CALIBRATION = "--calib_samples 4 --calib_sample_frac 0.4"
SCENARIOS = {
    "questions, several K, SDC tables": (
        "test_llama.py",
        f"--mode 0,1,3 {COMMON},24 {CALIBRATION} --num_samples 5 --num_fewshot 2 --sdc offline-calibrated "
        "--vmc --batch_size 2 --calib_dump_samples --vrow_popularity",
    ),
    "questions, tac": (
        "test_llama.py",
        f"--mode 0 {COMMON} {CALIBRATION} --num_samples 5 --num_fewshot 2 --sdc exact --vmc --calib_tac",
    ),
    "programs": (
        "gen_llama.py",
        f"--mode 0,1 {COMMON} {CALIBRATION} --num_tasks 3 --num_samples_per_task 2 --do_sample "
        "--max_seq_len 200 --calib_tac --batch_size 2",
    ),
    "a text": (
        "gen_llama.py",
        f"--dataset perplexity --text text.txt --mode 0,3 {COMMON} {CALIBRATION} --max_seq_len 128 "
        "--sdc offline-calibrated --prefill_chunk 50",
    ),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WITH_TIMES = {"run.log", "run.lock", "summary.md", "report.html"}  # they name the run, or its seconds
SAMPLES = "calib_samples.safetensors"


class Server:
    """The process that runs the scripts, and what a scenario is there."""

    def __init__(self, process: subprocess.Popen, model: str, root: Path):
        self.process, self.model, self.root = process, model, root
        self.straight: dict[tuple[str, int], tuple[dict[str, Any], dict[str, Any]]] = {}

    def run(self, script: str, arguments: str, folder: Path, processes: int, **when: Any) -> dict[str, Any]:
        job = {"script": script, "arguments": arguments.split(), "folder": str(folder), "checkpoint": 0.0}
        job |= {"processes": processes, "launcher": None}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job | when) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def folder(self, name: str) -> Path:
        folder = self.root / re.sub(r"\W+", "-", name)
        folder.mkdir()
        (folder / "text.txt").write_text("The hills were green, and the town below slept. " * 60)
        return folder

    def left_alone(self, scenario: str, processes: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a run says that nobody stops, and its files."""
        if (scenario, processes) not in self.straight:
            script, arguments = SCENARIOS[scenario]
            folder = self.folder(f"{scenario} by {processes}")
            said = self.run(script, f"{arguments} --llama {self.model}", folder, processes)
            assert set(said["codes"]) == {0}, said["outputs"]
            self.straight[scenario, processes] = said, contents(folder)
        return self.straight[scenario, processes]

    def go_on(self, scenario: str, folder: Path, processes: int, **when: Any) -> dict[str, Any]:
        """Resume the run in a folder, or begin one where none has got as far as to be resumed."""
        script, arguments = SCENARIOS[scenario]
        begun = list(folder.glob("products/*/run.json"))
        if begun:
            flags = f"--resume products/{begun[0].parent.name}"
        else:
            flags = f"{arguments} --llama {self.model}"
            for path in folder.glob("products/*"):
                assert {file.name for file in path.iterdir()} <= {"run.lock"} or when["after_signal"]
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
        when.pop("after_signal", None)
        said = self.run(script, flags, folder, processes, **when)
        assert not said["hung"] and "Traceback" not in "".join(said["outputs"]), (when, said["outputs"])
        return said


@pytest.fixture(scope="module")
def server(folder_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [sys.executable, "-m", "tests.helpers.fork_server"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        yield Server(process, folder_model, tmp_path_factory.mktemp("killed"))
        assert process.stdin is not None
        process.stdin.close()


def contents(folder: Path) -> dict[str, Any]:
    """Every file that the runs in a folder left, without names of runs, and times."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "text.txt"):
        (run,) = (folder / "products").iterdir()
        name, data = str(path.relative_to(folder)).replace(run.name, "RUN"), path.read_bytes()
        if path.name in WITH_TIMES:
            found[name] = ""
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(data.decode().replace(run.name, "RUN")))
        elif path.name == "calibration.safetensors":
            with safe_open(path, framework="numpy") as file:
                header = file.metadata()
                meta = without_times(json.loads(header["meta"]))
                tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
                arrays = {key: (str(one.dtype), one.tobytes()) for key, one in tensors.items()}
            found[name] = (header | {"meta": meta}, arrays)
        elif path.suffix == ".gz":  # members are as many as chunks were saved
            found[name] = gzip.decompress(data)
        else:
            found[name] = data.replace(run.name.encode(), b"RUN")
    return found


def without_times(value: Any) -> Any:
    """Without how many processes began a run, too: one that is begun again may have another number."""
    if isinstance(value, dict):
        times = ("seconds", "dense_window_s", "world_size")
        return {name: without_times(one) for name, one in value.items() if name not in times}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def in_any_order(name: str, data: Any) -> tuple[Any, list[Any]]:
    """A file's content as several processes may leave it: what must be the same, and numbers that must be the
    same but for rounding. Lines and samples follow each other as they were finished, and sums are added up in
    that order."""
    path = Path(name.removesuffix(".gz"))
    if path.name in ("th.txt", "sdc.txt"):
        lines = [line.split() for line in data.splitlines()]
        return [line[:1] + line[2:] for line in lines], [float(line[1]) for line in lines]
    if path.name == "calibration.safetensors":
        header, arrays = data
        floats = [one for one in arrays.values() if one[0].startswith("float")]
        rest = {key: one for key, one in arrays.items() if one not in floats}
        numbers = [np.frombuffer(data, dtype) for dtype, data in floats]
        return (header, rest), np.concatenate(numbers).tolist()
    if path.name == SAMPLES:
        arrays = load(data)
        layers = [name.removesuffix(".n") for name in arrays if name.endswith(".n")]
        return {
            layer: sorted(zip(arrays[f"{layer}.n"].tolist(), arrays[f"{layer}.values"].tolist()))
            for layer in layers
        }, []
    if path.suffix in (".csv", ".txt", ".jsonl"):
        return sorted(data.splitlines()), []
    return data, []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.getoption("--kills")
    for name in USUAL_KILLS.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, range(USUAL_KILLS[name] if given is None else given))


def stop(
    draw: random.Random, point: int, alone: dict[str, Any], files: dict[str, Any], rank: int = 0
) -> dict[str, Any]:
    """When and how a run is stopped: the kinds take turns, the moment is random."""
    kind = point % 4
    if kind == 3:
        largest = max(len(data) for data in files.values() if isinstance(data, bytes))
        return {"file_size": int(10 ** draw.uniform(2, len(str(largest))))}
    how: dict[str, Any] = {
        "signal": int(SIGNALS[(point // 4 + kind) % 3]),
        "checkpoint": draw.choice([0.0, 0.2]),
    }
    if kind == 1:
        return how | {"seconds": draw.uniform(0, alone["seconds"])}
    return how | {"event": draw.randint(1, alone["events"][rank])}


def test_killed_and_resumed(of_one: int, server: Server) -> None:
    draw = random.Random(f"kill {of_one}")
    scenario = list(SCENARIOS)[of_one // 2 % len(SCENARIOS)]
    alone, expected = server.left_alone(scenario, 1)
    folder = server.folder(f"{scenario} {of_one}")
    stops = [stop(draw, of_one + i, alone, expected) for i in range(draw.choice([1, 1, 2]))]
    for when in [*stops, {}]:
        said = server.go_on(scenario, folder, 1, after_signal="signal" in stops[0], **when)
        (output,), (code,) = said["outputs"], said["codes"]
        if "signal" in when:
            assert code in (0, 130, -signal.SIGKILL), (when, output)
            if code == 130 and list(folder.glob("products/*/run.json")) and "Run folder" in output:
                assert f"{SCENARIOS[scenario][0]} --resume products/" in output
        elif "file_size" in when:
            assert code in (0, 2) and (code == 0 or "cannot be" in output), (when, output)
        else:
            assert code == 0, output
    found = contents(folder)
    assert sorted(found) == sorted(expected), stops
    for name, data in expected.items():
        assert found[name] == data, (name, stops)


def test_killed_together_and_resumed(of_two: int, server: Server) -> None:
    """One of two processes is stopped, or both are; one goes on, or two. Their launcher ends the other, or
    leaves it to see for itself."""
    draw = random.Random(f"kill two {of_two}")
    scenario = list(SCENARIOS)[of_two // 2 % len(SCENARIOS)]
    alone, expected = server.left_alone(scenario, 2)
    folder = server.folder(f"{scenario} {of_two} together")
    starts: list[tuple[int, dict[str, Any]]] = []
    for i in range(draw.choice([1, 1, 2])):
        count = 2 if i == 0 else draw.choice([1, 2])
        rank, both, launcher = draw.randrange(count), draw.random() < 0.4, draw.choice(["torchrun", None])
        when = stop(draw, of_two + i, alone, expected, rank)
        starts.append((count, when | {"rank": rank, "all": both, "launcher": launcher}))
    for count, when in [*starts, (draw.choice([1, 2]), {})]:
        said = server.go_on(scenario, folder, count, after_signal="signal" in starts[0][1], **when)
        check_ends(said, when, bool(list(folder.glob("products/*/run.json"))))
    found = contents(folder)
    assert sorted(found) == sorted(expected), starts
    for name, data in expected.items():
        (same, numbers), (wanted, wanted_numbers) = in_any_order(name, found[name]), in_any_order(name, data)
        assert same == wanted, (name, starts)
        np.testing.assert_allclose(numbers, wanted_numbers, rtol=1e-6, err_msg=str((name, starts)))


def check_ends(said: dict[str, Any], when: dict[str, Any], begun: bool) -> None:
    """Each process ended well, or as it was stopped, or with a sentence that says why."""
    everything = "\n".join(said["outputs"])
    if not when:
        assert set(said["codes"]) == {0}, everything
    for output, code in zip(said["outputs"], said["codes"]):
        if code == -signal.SIGKILL:
            assert when.get("signal") == signal.SIGKILL, (when, everything)
        elif code == 2:
            assert "error: " in everything, when
        elif code == 1:
            assert re.search(r"Process \d of \d stops: process \d ", output), (when, everything)
        else:
            assert code in (0, 130), (code, when, everything)
    # The first speaks for all, or another that saw it go; where the launcher has ended that one, nobody can.
    spoken = said["codes"][0] in (1, 2, 130) or 1 in said["codes"]
    if begun and spoken and "Run folder" in said["outputs"][0]:
        assert "--resume products/" in everything, (when, everything)
