"""Sweeps: the cells of a table, which of them are finished, and the runs for the others.

A cell is one task, method and K. It is finished when any run under the output folder has a result with the
same settings, ignoring those that do not change an answer. A stopped sweep can therefore be continued, and a
K added to a table runs only the new cells.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired

from tqdm import tqdm

from toptheta.eval.cli import Parser
from toptheta.eval.rules import flag
from toptheta.eval.run import Run, is_under_way, product_folder, saved_run, task_parts
from toptheta.eval.slurm import executor
from toptheta.eval.table_cells import (
    KINDS,
    SweepCell,
    SweepOptions,
    answer_key,
    choose,
    only_named,
    plan,
    read_tables,
)
from toptheta.report.results import CellResult, read_result
from toptheta.report.summary import redraw_sweep, report_sweep, saved_rows
from toptheta.report.sweep_tables import SweepRow, with_k
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import make_folder, timestamp
from toptheta.util.interrupts import Announced
from toptheta.util.options import check_options, options_of
from toptheta.util.schema import read_json

MACHINE = ("device_name", "device", "threads", "torch", "transformers", "lm_eval")  # shown in tables
STOP_SECONDS = 120.0  # for runs to save their progress when the sweep is stopped


@dataclass
class Found:
    """The runs under the output folder. results: by key; unfinished: run folder -> script and missing keys;
    under_way: keys that another process is computing."""

    results: dict[str, CellResult] = field(default_factory=dict)
    unfinished: dict[Path, tuple[str, set[str]]] = field(default_factory=dict)
    under_way: set[str] = field(default_factory=set)


def run_sweep(options: SweepOptions, parsers: dict[str, Callable[[], Parser]], root: Path) -> int:
    """The work of reproduce.py; returns the exit code. parsers: of each script; root: the scripts' folder."""
    check_options(options, flag)
    _check_together(options)
    tables = read_tables(Path(options.file) if options.file else root / "reproduce.json")
    if options.table is None:
        for name, entry in tables["tables"].items():
            print(f"{name:32} {entry['title']}")
        return 0
    table = choose(options.table, tables["tables"], "--table")
    folder = Path(options.output_dir) / "tables" / options.table
    if options.redraw:
        redraw_sweep(folder, table["title"])
        return 0
    if options.data_dir and not Path(options.data_dir).is_dir():
        raise UsageError(f"--data_dir {options.data_dir}: there is no such folder.")
    cells = plan(table, tables, options, parsers)
    named = {(cell.task, with_k(cell.method, cell.k)) for cell in cells}
    dense = dict[str, str]()  # key of each task's first dense cell, which --only may leave out
    for cell in cells:
        if cell.dense:
            dense.setdefault(cell.task, cell.key)
    if options.only:
        cells = only_named(cells, options.only)
    found = scan(Path(options.output_dir), {cell.script for cell in cells})
    commands = missing_runs(cells, found, options.output_dir, None if options.slurm else options.jobs)
    done = sum(cell.key in found.results for cell in cells)
    say(f"{table['title']}: {done} of {len(cells)} cells are finished, {len(commands)} runs are left.")
    if options.dry_run:
        for command in commands:
            print(shlex.join(["python", *command]))
        return 0
    failed = 0
    if commands and not options.table_only:
        if options.slurm:
            gpus, hours = table.get("gpus", 1), options.slurm_hours
            _submit(commands, root, folder / "logs", options.slurm, hours, gpus)
            return 0
        failed = _run_all(commands, root, folder / "logs", options.jobs, table.get("gpus", 1))
        found = scan(Path(options.output_dir), {cell.script for cell in cells})
    rows = [SweepRow(cell.task, cell.method, cell.k, found.results.get(cell.key)) for cell in cells]
    if any(row.result is not None for row in rows):
        finished = {(row.task, with_k(row.method, row.k)) for row in rows if row.result is not None}
        lost = saved_rows(folder) & named - finished
        if lost:
            folder = folder / "part"
        shown = options.table + (" --data_dir DIR" if options.data_dir else "")
        references = {task: found.results[key] for task, key in dense.items() if key in found.results}
        for task in sorted({row.task for row in rows} & dense.keys() - references.keys()):
            say(f"{task}: nothing is compared with dense attention, which has not been run.")
        report_sweep(folder, table["title"], shown, rows, table.get("at_vrows", []), references)
        if lost:
            say(f"It is in {folder}, because the table beside it has {len(lost)} more of the cells.")
    else:
        say("No cell is finished yet, so there is no table.")
    if failed:
        say(f"{failed} runs failed; see the logs in {folder / 'logs'}. The same command retries them.")
    return 1 if failed else 0


def _check_together(options: SweepOptions) -> None:
    """Raise UsageError for a flag that has no effect, given the others."""
    given = [name for name, _, default in options_of(options) if getattr(options, name) != default]
    unused: dict[str, Collection[str]] = {}  # names, by the reason
    if options.table is None:
        unused["without --table: add it, or leave this out"] = {*given} - {"file"}
    if options.redraw:
        unused["with --redraw: leave one out"] = {*given} - {"table", "redraw", "file", "output_dir"}
    if options.table_only:
        unused["with --table_only: leave one out"] = ("dry_run", "jobs", "slurm", "slurm_hours")
    if options.slurm is None:
        unused["without --slurm: add it, or leave this out"] = ("slurm_hours",)
    else:
        unused["with --slurm: leave one out"] = ("jobs",)
    for why, names in unused.items():
        for name in given:
            if name in names:
                raise UsageError(f"{flag(name)} has no effect {why}.")


def scan(output_dir: Path, scripts: Iterable[str]) -> Found:
    """Read every run under `output_dir`, except runs of other versions whose settings cannot be read."""
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
                before = found.results.get(key)
                if before is None or result.effective_k or not before.effective_k:  # else it says less
                    found.results[key] = replace(result, folder=str(path), extra=extra)
        if missing and is_under_way(folder):
            found.under_way |= missing
        elif missing and not settings.calibrate_only:
            found.unfinished[folder] = (script, missing)
    return found


def missing_runs(
    cells: list[SweepCell], found: Found, output_dir: str, jobs: int | None = 1
) -> list[list[str]]:
    """The command lines (without 'python') that finish the cells: resumed runs first, then new ones. Methods
    that differ in --method alone share a run, as far as that leaves one for each of the `jobs`; None: each
    has its own."""
    wanted = {
        cell.key: cell for cell in cells if cell.key not in found.results | dict.fromkeys(found.under_way)
    }
    commands = []
    for folder, (script, missing) in found.unfinished.items():
        if missing <= wanted.keys():  # else it would do what nobody asked for
            commands.append([script, "--resume", str(folder)])
            for key in missing:
                del wanted[key]
    alike: dict[tuple[str, ...], dict[str | None, list[int]]] = {}  # K by method, of commands without them
    used: dict[tuple[tuple[str, ...], str | None], set[str]] = {}  # flags with an effect on the method
    for cell in wanted.values():
        command, method = _without_method((cell.script, *cell.asked))
        used.setdefault((command, method), set()).update(cell.arguments)
        ks = alike.setdefault(command, {}).setdefault(method, [])
        if cell.k is not None:
            ks.append(cell.k)
    runs = [(command, *run) for command, methods in alike.items() for run in _with_same_k(methods)]
    while jobs is None or len(commands) + len(runs) < jobs:
        most = max(runs, key=lambda run: len(run[2]), default=None)
        if most is None or len(most[2]) < 2:
            break
        (command, of_k, several), at = most, runs.index(most)
        half = len(several) // 2
        runs[at : at + 1] = [(command, of_k, several[:half]), (command, of_k, several[half:])]
    for asked, of_run, methods in runs:
        known = set[str]().union(*(used[asked, method] for method in methods))
        commands.append(_command(_only(asked, known), of_run, methods, output_dir))
    return commands


def _only(command: tuple[str, ...], flags: set[str]) -> tuple[str, ...]:
    """A command line without flags that are not among `flags`."""
    kept, keep = [], True
    for word in command:
        keep = word in flags if word.startswith("--") else keep
        kept += [word] if keep else []
    return tuple(kept)


def _without_method(command: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """A command line without the value of --method, and the value."""
    if "--method" not in command:
        return command, None
    at = command.index("--method") + 1
    return (*command[:at], *command[at + 1 :]), command[at]


def _with_same_k(methods: dict[str | None, list[int]]) -> list[tuple[tuple[int, ...], list[str | None]]]:
    """Methods that are run with the same K. Those without K go with the first of the others."""
    by_k: dict[tuple[int, ...], list[str | None]] = {}
    for method, ks in methods.items():
        by_k.setdefault(tuple(ks), []).append(method)
    without = by_k.pop((), [])
    first = next(iter(by_k), ())
    if without:
        by_k[first] = without + by_k.get(first, [])
    return list(by_k.items())


def _command(
    command: tuple[str, ...], ks: tuple[int, ...], methods: list[str | None], output_dir: str
) -> list[str]:
    full = [*command, *(["--k", ",".join(map(str, ks))] if ks else []), "--output_dir", output_dir]
    if "--method" in full:
        full.insert(full.index("--method") + 1, ",".join(filter(None, methods)))
    return full


def _run_all(commands: list[list[str]], root: Path, logs: Path, jobs: int, gpus: int) -> int:
    """Run the commands, `jobs` at a time; returns the number of failures. Ctrl-C stops them after saving."""
    make_folder(logs)
    waiting, failed = list(commands), 0
    running: dict[Popen, tuple[int, Path]] = {}
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
                    process = Popen(
                        [sys.executable, str(root / command[0]), *command[1:]],
                        stdout=file,
                        stderr=STDOUT,
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
            except TimeoutExpired:
                process.kill()
        say("\nInterrupted. All progress is saved; the same command continues.")
        raise Announced from None
    finally:
        bar.close()
    return failed


def _share(slot: int, jobs: int, gpus: int) -> dict[str, str]:
    """Environment variables that give one of `jobs` runs its own GPUs, or its share of the cores."""
    import torch

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        if jobs * gpus > len(names):
            raise UsageError(
                f"--jobs {jobs}: each run needs {gpus} GPUs, but there are only {len(names)}; lower --jobs."
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
