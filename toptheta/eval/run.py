"""A run: its folder, settings and lock, its cells, and resuming it."""

import fcntl
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from toptheta.eval import processes
from toptheta.eval.cell import Cell
from toptheta.eval.cell_params import CellParams
from toptheta.eval.cli import command, settings_from_json
from toptheta.eval.settings import QASettings, Settings
from toptheta.util.console import say
from toptheta.util.environment import environment
from toptheta.util.errors import UsageError
from toptheta.util.files import DISK_ERRORS, log_line, remove_unfinished, timestamp, write_json
from toptheta.util.interrupts import Announced
from toptheta.util.options import to_flags
from toptheta.util.schema import read_json


@dataclass
class Run:
    """One start of a script. folder: products/<timestamp>; script: the program's name, for the command to
    resume; root: the folder of the whole run, if this is its part for one of several tasks."""

    folder: Path
    settings: Settings
    script: str
    root: Path | None = None
    lock: Any = None

    @property
    def top(self) -> Path:
        return self.root or self.folder

    def log(self, text: str) -> None:
        if processes.rank() == 0:
            log_line(self.top / "run.log", text)

    @property
    def resume_command(self) -> str:
        return f"{processes.launched(command(self.script))} --resume {self.top}"


def open_run(
    settings: Settings, script: str, resume: str | None, inputs: Callable[[], dict[str, str]]
) -> Run:
    """A new run folder, or the one to resume; all processes share it. inputs: returns the hashes of what the
    answers depend on, by its name in messages. Raises UsageError if another process is running it, or if one
    of the inputs has changed since it was started: answers to both must not be mixed."""
    run: Run | None = None
    world_size = processes.world_size()

    def opened() -> Path:
        nonlocal run
        run = _open(settings, script, resume, world_size, inputs())
        return run.folder

    folder = processes.from_first(opened)
    processes.wait_for_file(folder / "run.json")
    return run or Run(folder, settings, script, lock=_lock(folder, fcntl.LOCK_SH))


def _open(
    settings: Settings, script: str, resume: str | None, world_size: int, inputs: dict[str, str]
) -> Run:
    folder = Path(resume) if resume else Path(settings.output_dir) / timestamp()
    try:
        if not resume:
            folder.mkdir(parents=True)
        lock = _lock(folder)
        if lock is None:
            raise UsageError(f"--resume {folder}: another process is running it; wait for it or stop it.")
        if resume:
            _check_inputs(folder, inputs)
            remove_unfinished(folder)
        else:
            run = Run(folder, settings, script)
            saved = {
                "script": script,
                "command": shlex.join(["python", script, *to_flags(settings)]),
                "settings": settings.to_json(),
                "environment": environment(settings.device),
                "inputs": inputs,
                "cells": [
                    str(product_folder(part, cell).relative_to(folder))
                    for part in task_parts(run)
                    for cell in settings.cells()
                ],
                "world_size": world_size,
            }
            write_json(folder / "run.json", saved)
        log_line(folder / "run.log", "resumed" if resume else "started")
        if world_size > 1:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the others too: each may outlive the first
    except OSError as error:
        what = f"--resume {folder}" if resume else f"--output_dir {settings.output_dir}"
        raise UsageError(f"{what}: {folder} cannot be written to ({error.strerror}).") from None
    return Run(folder, settings, script, lock=lock)


def _lock(folder: Path, kind: int = fcntl.LOCK_EX) -> Any:
    """An open file that locks a run as long as this process lives; None if it is already locked. kind: of
    flock."""
    file = open(folder / "run.lock", "w+")
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Raise UsageError for an input that has changed. Runs of earlier versions did not record theirs."""
    saved = read_json(folder / "run.json", Started, f"--resume {folder} is not possible, start a new run")
    for name, started_with in saved.get("inputs", {}).items():
        if name in inputs and inputs[name] != started_with:
            raise UsageError(
                f"--resume {folder}: {name} changed since this run was started, and its answers must not be "
                "mixed with new ones: restore it, or start a new run."
            )


def is_under_way(folder: Path) -> bool:
    """Whether a process is running the run in `folder`."""
    lock = _lock(folder)
    if lock is not None:
        lock.close()
    return lock is None


class Saved(TypedDict):
    """run.json, without its environment."""

    script: str
    settings: dict[str, Any]


class Started(Saved, total=False):
    """With what earlier versions did not save."""

    inputs: dict[str, str]


def saved_run(folder: Path, kinds: dict[str, type[Settings]]) -> tuple[str, Settings] | None:
    """Script and settings of the run in `folder`; None if it is damaged, or its script is not in `kinds`."""
    try:
        saved = read_json(folder / "run.json", Saved, "")
        return saved["script"], settings_from_json(kinds[saved["script"]], saved["settings"])
    except (OSError, KeyError, UsageError):
        return None


def task_parts(run: Run) -> list[Run]:
    """The run's parts, one for each task of --task, in folders of their own; one task: the run itself."""
    settings = run.settings
    if not isinstance(settings, QASettings) or "," not in settings.task:
        return [run]
    tasks = [task.strip() for task in settings.task.split(",")]
    return [
        Run(run.folder / task, replace(settings, task=task), run.script, root=run.folder) for task in tasks
    ]


def check_resume(resume: str, script: str) -> dict[str, Any]:
    """The settings saved in a run folder. Raises UsageError if it is not a run, or one of another script."""
    path = Path(resume) / "run.json"
    if not path.is_file():
        raise UsageError(f"--resume {resume}: the folder has no run.json, so it is not a run of {script}.")
    saved = read_json(path, Saved, f"--resume {resume} is not possible, start a new run")
    if saved["script"] != script:
        raise UsageError(f"--resume {resume}: this is a run of {saved['script']}, not of {script}.")
    return saved["settings"]


def cells(run: Run, num_layers: int) -> Iterator[tuple[CellParams, Cell]]:
    """Each cell's parameters (K of every layer filled in) and product folder; a single cell uses the run's
    own."""
    for cell in run.settings.cells():
        folder = product_folder(run, cell)
        ratio = run.settings.layer_ks(cell, num_layers) if cell.sparse and cell.method.aims_at_k else None
        yield cell, Cell(folder, ratio, run.settings.effective_k)


def product_folder(run: Run, cell: CellParams) -> Path:
    """The folder of a cell: a single cell uses the run's own folder."""
    if len(run.settings.cells()) == 1:
        return run.folder
    folder = run.folder / cell.folder
    earlier = run.folder / f"mode{cell.method.mode}_k{cell.K}"  # earlier versions' name, whatever the options
    if not cell.given and not folder.exists() and earlier.is_dir() and run.settings.capk:
        return earlier
    return folder


def write_config(
    run: Run, cell: CellParams, product: Cell, model: Any, name: str, extra: dict[str, Any]
) -> None:
    """config.json of a cell: every setting as the cell has it, the model's sizes, versions, device, seeds."""
    config = model.config
    write_json(
        product.path / "config.json",
        {
            "model": name,
            "method": cell.label,
            "name": cell.method.name,
            "mode": cell.method.mode,
            "k_per_layer": list(run.settings.layer_ks(cell, config.num_hidden_layers))
            if cell.sparse
            else None,
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "dtype": str(model.dtype).removeprefix("torch."),
            "settings": run.settings.to_json() | {name: getattr(cell, name) for name in cell.given},
            "environment": environment(run.settings.device),
        }
        | extra,
    )


@contextmanager
def resumable(run: Run) -> Iterator[None]:
    """If the block is interrupted, or a file cannot be written, print how to resume the run. Unlocks it."""
    try:
        yield
        run.log("finished")
    except KeyboardInterrupt:
        say(f"\nInterrupted. Finished work is kept in {run.top}. To resume:\n  {run.resume_command}")
        with suppress(OSError):  # the disk may be full
            run.log("interrupted")
        raise Announced from None
    except UsageError as error:
        with suppress(OSError):
            run.log(f"failed: {error}")
        raise
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UsageError(
            f"{error.filename or run.top} cannot be written ({error.strerror}). Finished work is kept; fix "
            f"the problem, then resume with: {run.resume_command}"
        ) from None
    finally:
        if run.lock is not None:
            run.lock.close()
