"""Sweeps: the cells of a table, which of them are finished, and the runs that the others need.

A cell is one task, method and K. It is finished when any run under the output folder holds a result with the
same settings, as far as they change an answer; so a sweep that was stopped goes on, and a table that gains a
K runs only that.
"""

import fnmatch
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from toptheta.eval.cli import Parser, parse_settings
from toptheta.eval.rules import flag
from toptheta.eval.run import Run, is_under_way, product_folder, saved_run, task_parts
from toptheta.eval.settings import CellOptions, GenSettings, QASettings, Settings, cell_k, resolve_device
from toptheta.eval.slurm import executor
from toptheta.eval.tasks.lm_eval_tasks import check_task
from toptheta.methods.params import AttentionParams, MethodOptions
from toptheta.report.results import CellResult, read_result
from toptheta.report.summary import report_sweep
from toptheta.report.tables import SweepRow
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import timestamp
from toptheta.util.options import at_least, check_options, option, options_of
from toptheta.util.schema import read_json

KINDS: dict[str, type[Settings]] = {"test_llama.py": QASettings, "gen_llama.py": GenSettings}
TASK_FLAG = {"test_llama.py": "task", "gen_llama.py": "dataset"}
SAMPLES_FLAG = {"test_llama.py": "num_samples", "gen_llama.py": "num_tasks"}
TEXT_FLAGS = {"text", "calib_text"}  # files of a table: their names are relative to --data_dir
MACHINE = ("device_name", "device", "threads", "torch", "transformers", "lm_eval")  # that tables name
STOP_SECONDS = 120.0  # that runs get to save what they have when the sweep is stopped


@dataclass(frozen=True)
class SweepOptions:
    """The flags of reproduce.py."""

    table: str | None = option(None, "the table to make; without it, the tables are listed", metavar="NAME")
    dry_run: bool = option(False, "print the commands that are left to run, and stop")
    table_only: bool = option(False, "run nothing: build the table of what is finished")
    only: str | None = option(
        None, "only cells whose name (task, method, K=64) holds one of these", metavar="TEXT[,TEXT]"
    )
    samples: str | None = option(
        None, "questions and HumanEval tasks of each cell, instead of the table's", metavar="N"
    )
    data_dir: str | None = option(None, "local data of the tasks: see test_llama.py --help", metavar="DIR")
    jobs: int = option(
        1, "runs at a time: a GPU each, or a share of the CPU cores", metavar="N", rule=at_least(1)
    )
    slurm: str | None = option(
        None, "submit the runs to a Slurm cluster instead, and stop", metavar="PARTITION"
    )
    slurm_hours: int = option(24, "time limit of each Slurm job (default 24)", metavar="H", rule=at_least(1))
    file: str | None = option(
        None, "the file of tables (default reproduce.json next to this script)", metavar="FILE"
    )
    output_dir: str = option("products", "where runs and tables go (default products)", metavar="DIR")


@dataclass(frozen=True)
class SweepCell:
    """One row of a table. task: the table's name for it; arguments: of the script, but for --k; k: None for
    dense."""

    task: str
    method: str
    k: int | None
    script: str
    arguments: tuple[str, ...]
    key: str

    @property
    def name(self) -> str:
        return f"{self.task} {self.method}" + ("" if self.k is None else f" K={self.k}")


@dataclass
class Found:
    """What lies under the output folder. results: by key; unfinished: run folder -> script and missing keys;
    under_way: keys that another process works on."""

    results: dict[str, CellResult] = field(default_factory=dict)
    unfinished: dict[Path, tuple[str, set[str]]] = field(default_factory=dict)
    under_way: set[str] = field(default_factory=set)


def run_sweep(options: SweepOptions, parsers: dict[str, Callable[[], Parser]], root: Path) -> int:
    """The work of reproduce.py; returns the exit code. parsers: of each script; root: the scripts' folder."""
    check_options(options, flag)
    tables = _read_tables(Path(options.file) if options.file else root / "reproduce.json")
    if options.table is None:
        for name, entry in tables["tables"].items():
            print(f"{name:32} {entry['title']}")
        return 0
    table = _choose(options.table, tables["tables"], "--table")
    if options.data_dir and not Path(options.data_dir).is_dir():
        raise UsageError(f"--data_dir {options.data_dir}: there is no such folder.")
    cells = _plan(table, tables, options, parsers)
    if options.only:
        cells = _only(cells, options.only)
    found = scan(Path(options.output_dir), {cell.script for cell in cells})
    commands = missing_runs(cells, found, options.output_dir)
    done = sum(cell.key in found.results for cell in cells)
    say(f"{table['title']}: {done} of {len(cells)} cells are finished, {len(commands)} runs are left.")
    if options.dry_run:
        for command in commands:
            print(shlex.join(["python", *command]))
        return 0
    failed = 0
    folder = Path(options.output_dir) / "tables" / options.table
    if commands and not options.table_only:
        if options.slurm:
            gpus, hours = table.get("gpus", 1), options.slurm_hours
            _submit(commands, root, folder / "logs", options.slurm, hours, gpus)
            return 0
        failed = _run_all(commands, root, folder / "logs", options.jobs, table.get("gpus", 1))
        found = scan(Path(options.output_dir), {cell.script for cell in cells})
    rows = [SweepRow(cell.task, cell.method, cell.k, found.results.get(cell.key)) for cell in cells]
    if any(row.result is not None for row in rows):
        report_sweep(folder, table["title"], options.table, rows)
    else:
        say("No cell is finished yet, so there is no table.")
    if failed:
        say(f"{failed} runs failed: their logs are in {folder / 'logs'}. The same command tries them again.")
    return 1 if failed else 0


def _read_tables(path: Path) -> dict[str, Any]:
    try:
        tables = json.loads(path.read_text())
        assert isinstance(tables["methods"], dict) and isinstance(tables["tables"], dict)
        return tables
    except OSError as error:
        raise UsageError(f"--file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UsageError(
            f"--file {path} is no file of tables ({error}): it needs 'methods' and 'tables'."
        ) from None


def _choose(name: str, among: dict[str, Any], flag: str) -> Any:
    if name in among:
        return among[name]
    near = get_close_matches(name, among, n=3, cutoff=0.4) or list(among)
    raise UsageError(f"{flag} {name!r} is unknown: near it are {', '.join(near)}.")


def _rows(part: dict[str, Any], groups: dict[str, Any]) -> list[dict[str, Any]]:
    """A part of a table for each row of its group, whose methods, K and flags others may share; a part
    without one is its own."""
    if "group" not in part:
        return [part]
    rows = _choose(part["group"], groups, "reproduce.json: group")
    return [part | row | {"flags": part.get("flags", {}) | row.get("flags", {})} for row in rows]


def _plan(
    table: dict[str, Any],
    tables: dict[str, Any],
    options: SweepOptions,
    parsers: dict[str, Callable[[], Parser]],
) -> list[SweepCell]:
    """The cells of one of the `tables`, each checked like a command line. Raises UsageError."""
    cells, methods = [], tables["methods"]
    for part in [row for given in table["parts"] for row in _rows(given, tables.get("groups", {}))]:
        script = part["script"]
        if script not in KINDS:
            raise UsageError(f"reproduce.json: script {script!r} is none of {', '.join(KINDS)}.")
        for task in part["tasks"]:
            if script == "test_llama.py":
                check_task(task, options.data_dir)
            for name in part["methods"]:
                method = _choose(name, methods, "reproduce.json: method")
                if len(method.keys() & {"mode", "method"}) != 1:
                    raise UsageError(
                        f"reproduce.json: method {name!r} wants 'method' or 'mode', one of them."
                    )
                flags = table.get("flags", {}) | part.get("flags", {}) | method
                flags[TASK_FLAG[script]] = task
                if options.samples is not None:
                    flags[SAMPLES_FLAG[script]] = options.samples
                for file in TEXT_FLAGS & flags.keys():
                    flags[file] = str(Path(options.data_dir or ".") / flags[file])
                if options.data_dir and (script == "test_llama.py" or task.startswith("longbench")):
                    flags["data_dir"] = options.data_dir
                ks = ",".join(map(str, part["k"]))
                arguments, settings = _settings(script, flags, ks, parsers)
                for cell in settings.cells():
                    key = answer_key(settings, cell)
                    shown = part.get("name", task)
                    cells.append(SweepCell(shown, name, cell_k(cell), script, tuple(arguments), key))
    return cells


def _settings(
    script: str, flags: dict[str, Any], ks: str, parsers: dict[str, Callable[[], Parser]]
) -> tuple[list[str], Settings]:
    """Arguments of a script, but for --k, and the settings they give. Raises UsageError.

    A table's calib_task and calib_text are for its calibrated methods; the scripts refuse them where they do
    nothing.
    """

    def read(flags: dict[str, Any]) -> tuple[list[str], Settings]:
        arguments = _arguments(flags)
        namespace = parsers[script]().parse_args([*arguments, "--k", ks])
        return arguments, resolve_device(parse_settings(KINDS[script], namespace))

    calibrating = ("calib_task", "calib_text")
    arguments, settings = read({name: value for name, value in flags.items() if name not in calibrating})
    if flags.keys() & set(calibrating) and any(cell.needs_calibration for cell in settings.cells()):
        return read(flags)
    return arguments, settings


def _arguments(flags: dict[str, Any]) -> list[str]:
    arguments = []
    for name, value in flags.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not False and value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            arguments += [f"--{name}", text]
    return arguments


def _only(cells: list[SweepCell], only: str) -> list[SweepCell]:
    chosen: set[SweepCell] = set()
    for text in (part.strip() for part in only.split(",")):
        found = [c for c in cells if fnmatch.fnmatch(c.name.lower(), f"*{text.lower()}*")]
        if not found:
            words = dict.fromkeys(word for cell in cells for word in (cell.task, cell.method))
            near = get_close_matches(text, words, n=3, cutoff=0.4) or list(words)
            raise UsageError(f"--only {text!r} fits no cell: near it are {', '.join(near)}.")
        chosen.update(found)
    return [cell for cell in cells if cell in chosen]


def answer_key(settings: Settings, cell: AttentionParams) -> str:
    """Names a cell by everything that changes its answer: its method, and the settings that can."""
    method_options = [f.name for f in fields(MethodOptions)]
    of_cell = {*method_options, *(f.name for f in fields(CellOptions))}
    answering = [name for name, facts, _ in options_of(settings) if facts.answers]
    facts: dict[str, Any] = {name: getattr(settings, name) for name in answering if name not in of_cell}
    if cell.sparse:
        facts |= {name: getattr(cell, name) for name in method_options} | {"method": cell.method.spec}
    if cell_k(cell) is not None:
        facts |= {"k": cell_k(cell), "layerk": settings.layerk}
    if not cell.needs_calibration:
        facts = {name: value for name, value in facts.items() if not name.startswith("calib_")}
    for name in ("data_dir", *TEXT_FLAGS):
        if facts.get(name):
            facts[name] = str(Path(facts[name]).resolve())
    return json.dumps(facts, sort_keys=True)


def scan(output_dir: Path, scripts: Iterable[str]) -> Found:
    """Read every run under `output_dir`. A run of another version, whose settings do not fit, is left out."""
    found = Found()
    for folder in sorted(path.parent for path in output_dir.glob("*/run.json")):
        loaded = saved_run(folder, {script: KINDS[script] for script in scripts})
        if loaded is None:
            continue
        script, settings = loaded
        run, missing = Run(folder, settings, script), set()
        for part in task_parts(run):
            for cell in settings.cells():
                path = product_folder(part, cell)
                key = answer_key(part.settings, cell)
                try:
                    result = read_result(path / "results.json")
                    machine = read_json(path / "config.json", dict, "run the cell again")["environment"]
                    machine = {**machine, **{name: machine[name] for name in MACHINE}}
                except (OSError, ValueError, KeyError, TypeError):
                    missing.add(key)
                    continue
                extra = result.extra | {"environment": machine}
                found.results[key] = replace(result, folder=str(path), extra=extra)
        if missing and is_under_way(folder):
            found.under_way |= missing
        elif missing and not settings.calibrate_only:
            found.unfinished[folder] = (script, missing)
    return found


def missing_runs(cells: list[SweepCell], found: Found, output_dir: str) -> list[list[str]]:
    """The command lines (without 'python') that finish the cells: resumed runs first, then new ones."""
    wanted = {
        cell.key: cell for cell in cells if cell.key not in found.results | dict.fromkeys(found.under_way)
    }
    commands = []
    for folder, (script, missing) in found.unfinished.items():
        if missing <= wanted.keys():  # else it would do what nobody asked for
            commands.append([script, "--resume", str(folder)])
            for key in missing:
                del wanted[key]
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for cell in wanted.values():
        ks = groups.setdefault((cell.script, cell.arguments), [])
        if cell.k is not None:
            ks.append(cell.k)
    together: dict[tuple[str, ...], list[str]] = {}  # what differs in --method alone is one run
    for (script, arguments), ks in groups.items():
        k = ["--k", ",".join(map(str, ks))] if ks else []
        line, method = [script, *arguments, *k, "--output_dir", output_dir], ""
        if "--method" in line:
            at = line.index("--method")
            method, line[at + 1] = line[at + 1], ""
        together.setdefault(tuple(line), []).append(method)
    for whole, methods in together.items():
        commands.append(
            [",".join(methods) if before == "--method" else x for before, x in pairwise(("", *whole))]
        )
    return commands


def _run_all(commands: list[list[str]], root: Path, logs: Path, jobs: int, gpus: int) -> int:
    """Run the commands, `jobs` at a time; returns how many failed. Ctrl-C stops them; they save first."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting, failed = list(commands), 0
    running: dict[subprocess.Popen, tuple[int, Path]] = {}
    slots = list(range(min(jobs, len(commands))))
    bar = tqdm(total=len(commands), desc="Runs", unit="run", disable=None)
    try:
        while waiting or running:
            while waiting and slots:
                command, slot = waiting.pop(0), slots.pop(0)
                log = logs / f"{timestamp()}.log"
                with open(log, "w") as file:
                    file.write(shlex.join(["python", *command]) + "\n")
                    file.flush()
                    process = subprocess.Popen(
                        [sys.executable, str(root / command[0]), *command[1:]],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=os.environ | _share(slot, jobs, gpus),
                        start_new_session=True,  # Ctrl-C reaches them through this process alone
                    )
                running[process] = (slot, log)
                tqdm.write(f"{shlex.join(['python', *command])}\n  log: {log}", file=sys.stderr)
            time.sleep(0.5)
            for process in [p for p in running if p.poll() is not None]:
                slot, log = running.pop(process)
                slots.append(slot)
                bar.update()
                if process.returncode:
                    failed += 1
                    last = (log.read_text().strip().splitlines() or [""])[-1]
                    tqdm.write(f"failed with exit code {process.returncode}: {last}", file=sys.stderr)
    except KeyboardInterrupt:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        say("\nInterrupted. Finished cells are kept, and unfinished runs saved: the same command goes on.")
        raise
    finally:
        bar.close()
    return failed


def _share(slot: int, jobs: int, gpus: int) -> dict[str, str]:
    """Environment that gives one of `jobs` runs its own GPUs, or its share of the cores."""
    import torch

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        if jobs * gpus > len(names):
            raise UsageError(
                f"--jobs {jobs}: each run needs {gpus} GPUs, and {len(names)} are there; lower --jobs."
            )
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[slot * gpus : (slot + 1) * gpus])}
    if jobs == 1:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}


def _submit(commands: list[list[str]], root: Path, logs: Path, partition: str, hours: int, gpus: int) -> None:
    """Submit each command as a Slurm job through submitit, and return at once."""
    from submitit.helpers import CommandFunction

    cluster = executor(partition, hours, logs, gpus_per_node=gpus)
    with cluster.batch():
        submitted = [
            cluster.submit(CommandFunction([sys.executable, str(root / command[0]), *command[1:]]))
            for command in commands
        ]
    for job, command in zip(submitted, commands):
        print(job.job_id, shlex.join(["python", *command]))
    say("Submitted. When the jobs have ended, the same command with --table_only builds the table.")
