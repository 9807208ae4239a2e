"""What both jobs do around their own work: run folder, resume, calibration with checkpoints, results."""

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from toptheta.calibration.kept_samples import write_calibration_samples
from toptheta.calibration.tables import BINARY_NAME, save_tables
from toptheta.eval.cell import CHECKPOINT_SECONDS, Cell
from toptheta.eval.cli import settings_from_json
from toptheta.eval.settings import QASettings, Settings, cell_folder, label
from toptheta.methods.params import TOP_THETA, AttentionParams
from toptheta.models.control import (
    begin_calibration,
    calibrated_tables,
    calibration_samples,
    set_params,
    use_tables,
)
from toptheta.models.patch import patched_layers
from toptheta.report import tables as report
from toptheta.util.console import say
from toptheta.util.environment import environment
from toptheta.util.errors import UsageError
from toptheta.util.files import atomic_path, log_line, timestamp, write_json, write_text


@dataclass
class Run:
    """One start of a script. folder: products/<timestamp>; script: the program's name, for the hint how to
    resume; root: the whole run's folder, where this is its part for one of several tasks."""

    folder: Path
    settings: Settings
    script: str
    root: Path | None = None
    lock: Any = None

    @property
    def top(self) -> Path:
        return self.root or self.folder

    def log(self, text: str) -> None:
        log_line(self.top / "run.log", text)

    @property
    def resume_command(self) -> str:
        return f"python {self.script} --resume {self.top}"


def open_run(settings: Settings, script: str, resume: str | None) -> Run:
    """A new run folder, or the one to resume. Raises UsageError when another process works on that."""
    folder = Path(resume) if resume else Path(settings.output_dir) / timestamp()
    if not resume:
        folder.mkdir(parents=True)
    lock = _lock(folder)
    if lock is None:
        raise UsageError(f"--resume {folder}: another process works on that run; wait for it or stop it.")
    if not resume:
        saved = {
            "script": script,
            "settings": settings.to_json(),
            "environment": environment(settings.device),
        }
        write_json(folder / "run.json", saved)
    return Run(folder, settings, script, lock=lock)


def _lock(folder: Path) -> Any:
    """An open file that marks a run as being worked on, for as long as this process lives; None: it is."""
    file = open(folder / "run.lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def is_under_way(folder: Path) -> bool:
    """Whether a process works on the run in `folder` now."""
    lock = _lock(folder)
    if lock is not None:
        lock.close()
    return lock is None


def saved_run(folder: Path, kinds: dict[str, type[Settings]]) -> tuple[str, Settings] | None:
    """Script and settings of the run in `folder`; None when it is damaged, or of no script in `kinds`."""
    try:
        saved = json.loads((folder / "run.json").read_text())
        return saved["script"], settings_from_json(kinds[saved["script"]], saved["settings"])
    except (OSError, ValueError, KeyError, UsageError):
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
    """Settings saved in a run folder. Raises UsageError when it is none, or another script's."""
    path = Path(resume) / "run.json"
    if not path.is_file():
        raise UsageError(f"--resume {resume}: the folder holds no run.json, so it is no run of {script}.")
    try:
        saved = json.loads(path.read_text())
    except ValueError:
        raise UsageError(f"--resume {resume}: run.json there is damaged; start the run anew.") from None
    if saved.get("script") != script:
        raise UsageError(f"--resume {resume}: that is a run of {saved.get('script')}, not of {script}.")
    return saved["settings"]


def cells(run: Run, num_layers: int) -> Iterator[tuple[AttentionParams, Cell]]:
    """Each cell's parameters (K of every layer filled in) and product folder; a single cell uses the run's
    own."""
    for cell in run.settings.cells():
        folder = product_folder(run, cell)
        ratio = run.settings.layer_ks(cell, num_layers) if cell.sparse and cell.mode == TOP_THETA else None
        yield cell, Cell(folder, ratio, run.settings.effective_k)


def product_folder(run: Run, cell: AttentionParams) -> Path:
    """Where a cell's products go: a single cell has the run's own folder."""
    return run.folder if len(run.settings.cells()) == 1 else run.folder / cell_folder(cell)


def same_pass(run: Run, cell: AttentionParams) -> list[AttentionParams]:
    """The other cells, not calibrated yet, that the calibration of `cell` can serve too: those that differ in
    K only. With calib_tac each K computes something else while calibrating, so there are none."""
    if cell.calib_tac:
        return []
    return [
        other
        for other in run.settings.cells()
        if other != cell
        and replace(other, K=cell.K) == cell
        and not (product_folder(run, other) / BINARY_NAME).is_file()
    ]


def write_config(
    run: Run, cell: AttentionParams, product: Cell, model: Any, name: str, extra: dict[str, Any]
) -> None:
    """config.json of a cell: every setting, the model's sizes, versions, device, seeds."""
    config = model.config
    write_json(
        product.path / "config.json",
        {
            "model": name,
            "method": label(cell),
            "mode": cell.mode,
            "k_per_layer": list(run.settings.layer_ks(cell, config.num_hidden_layers))
            if cell.sparse
            else None,
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "dtype": str(model.dtype).removeprefix("torch."),
            "settings": run.settings.to_json(),
            "environment": environment(run.settings.device),
        }
        | extra,
    )


def prepare(
    run: Run,
    cell: AttentionParams,
    product: Cell,
    model: Any,
    calibrate: Callable[[Callable[[], None], set[str]], None],
) -> float:
    """Bring the model into a cell's state, calibrating first where that is needed; returns seconds of
    calibration.

    calibrate(after_batch, done) runs the calibration prompts, calls after_batch after each and skips what is
    in `done`.
    """
    settings = run.settings
    num_layers = model.config.num_hidden_layers
    fields = {
        name: getattr(cell, name)
        for name in (
            "mode",
            "placement",
            "sdc",
            "sdc_scale",
            "vmc",
            "capk",
            "calib_tac",
            "calib_add_sigma",
            "calib_sample_frac",
            "calib_interp",
            "calib_smooth",
        )
    }
    fields["K"] = settings.layer_ks(cell, num_layers) if cell.sparse else 0
    if not cell.needs_calibration:
        set_params(model, **fields, calibrate=False)
        return 0.0
    if settings.calib_load_path:
        set_params(model, **fields, calibrate=False, calib_load_path=settings.calib_load_path)
        return 0.0
    if (product.path / BINARY_NAME).is_file():  # an earlier start got this far
        set_params(model, **fields, calibrate=False, calib_load_path=str(product.path))
        loaded = patched_layers(model)[0].tables
        return float(loaded.meta.get("seconds", 0.0)) if loaded is not None else 0.0

    started = time.monotonic()
    params = AttentionParams(**fields)
    others = same_pass(run, cell)
    other_ks = [settings.layer_ks(other, num_layers) for other in others]
    dump = settings.calib_dump_samples and cell.needs_thresholds
    begin_calibration(model, params, other_ks, seed=settings.seed, keep_samples=dump)
    checkpoint = Checkpoint(product.path / "partial-calibration.safetensors", model)
    done = checkpoint.load()
    started -= checkpoint.seconds
    try:
        calibrate(checkpoint.maybe_save, done)
    except KeyboardInterrupt:
        checkpoint.save()
        raise
    own_ks = settings.layer_ks(cell, num_layers)
    for folder, ks in [
        *((product_folder(run, other), ks) for other, ks in zip(others, other_ks)),
        (product.path, own_ks),
    ]:
        folder.mkdir(parents=True, exist_ok=True)
        tables = calibrated_tables(model, ks)
        tables.meta["task"] = settings.calibration_task
        if folder == product.path:  # what a resumed run reports; the other cells cost nothing more
            tables.meta["seconds"] = f"{time.monotonic() - started:.1f}"
        if dump:  # before the tables: where these are, a later start takes the calibration for done
            write_calibration_samples(folder, calibration_samples(model, ks))
        save_tables(tables, folder)
    checkpoint.path.unlink(missing_ok=True)
    use_tables(model, tables)
    set_params(model, **fields, calibrate=False)
    seconds = time.monotonic() - started
    run.log(f"calibrated {', '.join(label(one) for one in [cell, *others])} in {seconds:.1f} s")
    return seconds


class Checkpoint:
    """The state of a calibration under way, kept in one file."""

    def __init__(self, path: Path, model: torch.nn.Module):
        self.path, self.layers = path, patched_layers(model)
        self.done: set[str] = set()
        self.seconds = 0.0  # that earlier starts spent
        self._started = self._last = time.monotonic()

    def load(self) -> set[str]:
        """Take up the saved state, if any; returns the keys of the requests it has seen (shared, to be added
        to)."""
        if self.path.is_file():
            try:
                state = load_file(self.path)
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    f"{self.path} is damaged ({error}): remove it to calibrate from the start."
                ) from None
            self.done.update(bytes(state.pop("done").tolist()).decode().split())
            self.seconds = float(state.pop("seconds", torch.zeros(())))
            for i, layer in enumerate(self.layers):
                if layer.calibration is not None:
                    prefix = f"{i}/"
                    layer.calibration.load_state(
                        {
                            key.removeprefix(prefix): value
                            for key, value in state.items()
                            if key.startswith(prefix)
                        }
                    )
        return self.done

    def maybe_save(self) -> None:
        if time.monotonic() - self._last > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        state = {"done": torch.tensor(list(" ".join(sorted(self.done)).encode()), dtype=torch.uint8)}
        state["seconds"] = torch.tensor(self.seconds + time.monotonic() - self._started)
        for i, layer in enumerate(self.layers):
            if layer.calibration is not None:
                for key, value in layer.calibration.state().items():
                    state[f"{i}/{key}"] = value.cpu().contiguous()
        with atomic_path(self.path) as temporary:
            save_file(state, temporary)
        self._last = time.monotonic()


def interrupted(run: Run) -> None:
    """Tell the person what an interrupted run kept and how to go on."""
    run.log("interrupted")
    say(f"\nInterrupted. What was finished is kept in {run.top}; go on with:\n  {run.resume_command}")


def finish_run(run: Run, results: list[dict[str, Any]], model_name: str) -> None:
    """Print the table of all cells; write it, its JSON and its picture into the run folder."""
    from toptheta.report.plots.tradeoff import draw_tradeoff

    text = report.results_table(results)
    title = f"{model_name}, {results[0]['task']}"
    if run.settings.effective_k:
        text += "\n\n" + report.effective_k(results)
    print(f"\n{title}\n\n{text}\n")
    write_text(run.folder / "summary.md", f"# {title}\n\n{text}\n")
    write_json(run.folder / "summary.json", results)
    if any(result["k"] is not None and result["metrics"] and result["kept"] for result in results):
        picture = run.folder / "tradeoff.png"
        for left_out in draw_tradeoff(results, picture, title):
            say(left_out)
        print(f"Picture: {picture}")
    print(f"Products: {run.folder}")
