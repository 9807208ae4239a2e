#!/usr/bin/env python3
"""Everything that a GPU has to tell, as one command: `make gpu`, or

    .venv/bin/python bench/gpu.py [--only PART,PART] [--output DIR] [--tiny]

The parts are the tests of the kernels, the sweep of tiles and stages, the profile of toptheta.kernels.tune,
and the tables of the call and of a whole model; each is a process of its own and ends within ten minutes.
products/gpu/<device>/ gets the device's state, and for each part what it printed (.log), its table (.json)
and how it ended. A part that has succeeded is not run again unless its command or the sources change, so an
interrupted run goes on where it stopped.
--tiny runs all of it on toys, in Triton's interpreter where there is no GPU: that tries the scripts and says
nothing of speed.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toptheta.util.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds of a part
TESTS = "tests/kernels/triton"


@dataclass(frozen=True)
class Part:
    """command: arguments of Python; with a table, where to write it is added."""

    name: str
    command: tuple[str, ...]
    table: bool = True


def parts(tiny: bool) -> list[Part]:
    def bench(name: str, script: str, *arguments: str) -> Part:
        return Part(name, (f"bench/{script}", *arguments))

    def tests(name: str, *files: str) -> Part:
        return Part(name, ("-m", "pytest", "-q", *(f"{TESTS}/test_{file}.py" for file in files)), table=False)

    if tiny:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return [
            tests("tests", "splits"),
            bench("tune-decode", "tune_gpu.py", "decode", "--tiny"),
            Part("tune", ("-m", "toptheta.kernels.tune", "--tiny")),
            bench("call-decode", "attention.py", "--device", "cuda", "--phase", "decode", "--tiny"),
            bench(
                "model", "decode.py", "--device", device, "--shape", "tiny", "--lengths", "100",
                "--batches", "1", "--k", "16", "--steps", "1", "--blocks", "1", "--eager",
            ),
        ]  # fmt: skip
    found = [
        tests("tests-calls", "attend", "value_aware", "splits", "refusals"),
        tests("tests-copies", "key_copy", "append"),
        tests("tests-models", "operators", "whole_models", "when_slower"),
        Part("tests-int8", ("-m", "pytest", "-q", "tests/kernels/test_int8_keys.py"), table=False),
    ]
    found += [bench(f"tune-{kind}", "tune_gpu.py", kind) for kind in ("decode", "int8", "prefill")]
    found.append(
        Part("tune", ("-m", "toptheta.kernels.tune"))
    )  # whole models run with its tiles from here on
    call = ("attention.py", "--device", "cuda", "--phase")
    found += [bench(f"call-decode-b{batch}", *call, "decode", "--batch", str(batch)) for batch in (1, 4, 16)]
    found.append(bench("call-prefill", *call, "prefill"))
    found += [
        bench(f"model-{length}-b{batch}", "decode.py", "--lengths", str(length), "--batches", str(batch))
        for length in (8192, 32768, 131072)
        for batch in (1, 4)
    ]
    return found


def sources() -> str:
    """A digest of what the numbers depend on."""
    files = [*(ROOT / "toptheta").rglob("*.py"), *(ROOT / "bench").glob("*.py"), *(ROOT / TESTS).glob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def device_state() -> dict[str, Any]:
    """The device, its driver, and what else is on it, for the record."""
    state: dict[str, Any] = {"python": sys.version.split()[0]}
    for package in ("torch", "triton", "transformers"):
        try:
            state[package] = version(package)
        except PackageNotFoundError:
            state[package] = None
    if torch.cuda.is_available():
        state["device"] = torch.cuda.get_device_name()
        state["properties"] = str(torch.cuda.get_device_properties(0))
    try:
        state["nvidia-smi"] = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True).stdout
    except OSError:
        state["nvidia-smi"] = None
    return state


def run(part: Part, folder: Path, tiny: bool, digest: str) -> dict[str, Any]:
    """Run a part; returns how it ended, which is also written to `folder`."""
    command = [sys.executable, *part.command]
    if part.table:
        command += ["--output", str(folder / f"{part.name}.json")]
    env = dict(os.environ)
    if tiny and not torch.cuda.is_available():
        env |= {"TRITON_INTERPRET": "1", "TOPTHETA_KERNEL": "triton"}
    if not part.table:
        env.pop("TOPTHETA_KERNEL", None)
    start, log = time.perf_counter(), folder / f"{part.name}.log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            ended = f"exit code {process.wait(timeout=LIMIT)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {LIMIT} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    done = {
        "ended": "done" if ended == "exit code 0" else ended,
        "seconds": round(time.perf_counter() - start, 1),
        "command": " ".join(part.command),
        "sources": digest,
    }
    write_json(folder / f"{part.name}.end.json", done)
    return done


def before(part: Part, folder: Path, digest: str) -> dict[str, Any] | None:
    """How the same part of the same sources ended earlier, if it is done."""
    file = folder / f"{part.name}.end.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    same = (done.get("command"), done.get("sources")) == (" ".join(part.command), digest)
    return done if same and done["ended"] == "done" else None


def summary(folder: Path, ends: dict[str, dict[str, Any]], state: dict[str, Any]) -> None:
    """summary.md: how each part ended, and what it printed."""
    lines = [f"# {state.get('device', 'no GPU')}", ""]
    lines += [f"torch {state['torch']}, triton {state['triton']}, transformers {state['transformers']}", ""]
    lines += ["| part | ended | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {end['ended']} | {end['seconds']} |" for name, end in ends.items()]
    for name in ends:
        tail = (folder / f"{name}.log").read_text().strip().splitlines()[-200:]
        lines += ["", f"## {name}", "", "```", *tail, "```"]
    write_text(folder / "summary.md", "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="of the parts, separated by commas")
    parser.add_argument("--output", type=Path, default=ROOT / "products" / "gpu")
    parser.add_argument("--tiny", action="store_true", help="toys, in the interpreter where there is no GPU")
    args = parser.parse_args()
    chosen = parts(args.tiny)
    if args.only:
        names = args.only.split(",")
        for name in names:
            if name not in [part.name for part in chosen]:
                parser.error(f"--only names {name}: choose from {', '.join(part.name for part in chosen)}")
        chosen = [part for part in chosen if part.name in names]
    if not args.tiny and not torch.cuda.is_available():
        parser.exit(2, "gpu.py: this machine has no GPU to measure; --tiny tests the scripts without one.\n")
    state, digest = device_state(), sources()
    name = re.sub(r"[^A-Za-z0-9]+", "-", state.get("device", "interpreter")).strip("-")
    folder = args.output / (f"{name}-tiny" if args.tiny else name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "device.json", state)
    ends = {}
    for part in chosen:
        end = before(part, folder, digest)
        print(f"{part.name}: ", end="", flush=True)
        if end is None:
            end = run(part, folder, args.tiny, digest)
            print(f"{end['ended']}, {end['seconds']} s", flush=True)
        else:
            print("done before")
        ends[part.name] = end
        summary(folder, ends, state)
    failed = [name for name, end in ends.items() if end["ended"] != "done"]
    print(f"written to {folder}" + (f"; not done: {', '.join(failed)} (see the logs)" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ngpu.py: stopped; the same command goes on with the parts that are left.")
