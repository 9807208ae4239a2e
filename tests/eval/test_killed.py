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

import pytest
from safetensors import safe_open

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
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


class Server:
    """The process that runs the scripts, and what a scenario is there."""

    def __init__(self, process: subprocess.Popen, model: str, root: Path):
        self.process, self.model, self.root = process, model, root
        self.straight: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def run(self, script: str, arguments: str, folder: Path, **when: Any) -> dict[str, Any]:
        job = {"script": script, "arguments": arguments.split(), "folder": str(folder), "checkpoint": 0.0}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job | when) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def folder(self, name: str) -> Path:
        folder = self.root / re.sub(r"\W+", "-", name)
        folder.mkdir()
        (folder / "text.txt").write_text("The hills were green, and the town below slept. " * 60)
        return folder

    def left_alone(self, scenario: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a run says that nobody stops, and its files."""
        if scenario not in self.straight:
            script, arguments = SCENARIOS[scenario]
            folder = self.folder(scenario)
            said = self.run(script, f"{arguments} --llama {self.model}", folder)
            assert said["code"] == 0, said["output"]
            self.straight[scenario] = said, contents(folder)
        return self.straight[scenario]


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
                arrays = {key: file.get_tensor(key).tobytes() for key in sorted(file.keys())}
            found[name] = (header | {"meta": meta}, arrays)
        elif path.suffix == ".gz":  # members are as many as chunks were saved
            found[name] = gzip.decompress(data)
        else:
            found[name] = data.replace(run.name.encode(), b"RUN")
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name != "seconds"}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point" in metafunc.fixturenames:
        metafunc.parametrize("point", range(metafunc.config.getoption("--kills")))


def stop(draw: random.Random, point: int, alone: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
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
    return how | {"event": draw.randint(1, alone["events"])}


def test_killed_and_resumed(point: int, server: Server) -> None:
    draw = random.Random(f"kill {point}")
    scenario = list(SCENARIOS)[point // 2 % len(SCENARIOS)]
    script, arguments = SCENARIOS[scenario]
    alone, expected = server.left_alone(scenario)
    folder = server.folder(f"{scenario} {point}")
    stops = [stop(draw, point + i, alone, expected) for i in range(draw.choice([1, 1, 2]))]
    said = []
    for when in [*stops, {}]:
        begun = list(folder.glob("products/*/run.json"))
        if not begun and (folder / "products").exists():
            for path in (folder / "products").iterdir():  # it did not get as far as to be resumed
                assert {file.name for file in path.iterdir()} <= {"run.lock"} or "signal" in stops[0]
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
        flags = (
            f"--resume products/{begun[0].parent.name}" if begun else f"{arguments} --llama {server.model}"
        )
        said.append(server.run(script, flags, folder, **when))
        output, code = said[-1]["output"], said[-1]["code"]
        assert "Traceback" not in output, (when, output)
        if "signal" in when:
            assert code in (0, 130, -signal.SIGKILL), (when, output)
            if code == 130 and list(folder.glob("products/*/run.json")) and "Run folder" in output:
                assert f"{script} --resume products/" in output
        elif "file_size" in when:
            assert code in (0, 2) and (code == 0 or "cannot be" in output), (when, output)
    assert said[-1]["code"] == 0, said[-1]["output"]
    found = contents(folder)
    assert sorted(found) == sorted(expected), stops
    for name, data in expected.items():
        assert found[name] == data, (name, stops)
