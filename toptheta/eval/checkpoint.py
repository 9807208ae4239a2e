"""Runs the calibration of a cell if needed, and saves its state so that a later start can continue it."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from toptheta.calibration.kept_samples import write_calibration_samples
from toptheta.calibration.tables import BINARY_NAME, CalibrationTables, load_tables, save_tables
from toptheta.eval import processes
from toptheta.eval.cell import CHECKPOINT_SECONDS, Cell
from toptheta.eval.cell_params import OF_FLAGS, CellParams
from toptheta.eval.run import Run, product_folder
from toptheta.eval.settings import Settings
from toptheta.methods.base import Method
from toptheta.models.calibrate import (
    begin_calibration,
    calibrated_tables,
    calibrates_in_order,
    calibration_samples,
    calibrations,
    end_calibration,
    same_sparse_layers,
    sparse_layers,
    use_tables,
)
from toptheta.models.control import check_tables, tables_in, use_params
from toptheta.util.errors import UsageError
from toptheta.util.files import write_bytes
from toptheta.util.interrupts import stop_requested, uninterrupted

STATE = "partial-calibration"  # how the names of files with a calibration's state begin


def check_loaded(settings: Settings, config: Any) -> None:
    """Raise UsageError unless the tables in --calib_load_path, if it is given, fit every cell, for a model of
    this config, which need not be loaded."""
    path, num_layers = settings.calib_load_path, config.num_hidden_layers
    if not path:
        return
    tables = tables_in(path, config, num_layers, "--calib_load_path")
    layers = [SimpleNamespace(config=config, layer_idx=i) for i in range(num_layers)]
    for cell in settings.cells():
        if not cell.needs_calibration:
            continue
        ks = settings.layer_ks(cell, num_layers)
        try:
            check_tables(sparse_layers(layers, cell, ks), cell, ks, tables)
        except UsageError as error:
            raise UsageError(f"--calib_load_path {path}, {cell.label}: {error}") from None
        for name in ("calib_tac", "calib_add_sigma", "calib_sample_frac"):
            value, saved = getattr(cell, name), tables.meta.get(name)  # th.txt does not contain it
            if value != OF_FLAGS[name] and saved not in (None, str(value)):
                raise UsageError(
                    f"{cell.flag(name)} {value} has no effect with --calib_load_path, whose tables were "
                    f"calibrated with {saved}: leave it out."
                )


def prepare(
    run: Run,
    cell: CellParams,
    product: Cell,
    model: Any,
    calibrate: Callable[["Checkpoint"], None],
) -> float:
    """Set the model to a cell's parameters, after a calibration if needed; returns the seconds of the
    calibration.

    calibrate(checkpoint) runs the calibration prompts that the checkpoint has not done, within its
    `counting`.
    """
    settings = run.settings
    num_layers = model.config.num_hidden_layers
    params = replace(cell, calib_load_path="")
    if cell.sparse:
        params = replace(params, K=settings.layer_ks(cell, num_layers))
    if not cell.needs_calibration:
        use_params(model, params)
        return 0.0
    if settings.calib_load_path:
        use_params(model, replace(params, calib_load_path=settings.calib_load_path))
        return 0.0
    tables = processes.from_first(lambda: _finished_tables(product, model))
    if tables is None:
        try:
            tables = _calibrate(run, cell, params, product, model, calibrate)
        except UsageError:
            end_calibration(model)  # other cells may follow
            raise
    use_tables(model, tables)
    use_params(model, params)
    try:
        return float(tables.meta.get("seconds", 0.0))
    except ValueError as error:
        raise _damaged(product.path / BINARY_NAME, error) from None


def _finished_tables(product: Cell, model: Any) -> CalibrationTables | None:
    """Tables calibrated by an earlier start."""
    if not (product.path / BINARY_NAME).is_file():
        return None
    Checkpoint(product.path, model).remove()
    return load_tables(product.path, model.config.num_hidden_layers, model.config.num_attention_heads)


def _calibrate(
    run: Run,
    cell: CellParams,
    params: CellParams,
    product: Cell,
    model: Any,
    calibrate: Callable[["Checkpoint"], None],
) -> CalibrationTables:
    """Calibrate a cell, and others that can use the same pass; all processes get its tables."""
    settings, num_layers = run.settings, model.config.num_hidden_layers
    checkpoint = Checkpoint(product.path, model)
    own_ks = settings.layer_ks(cell, num_layers)
    others = [
        other
        for other in processes.from_first(lambda: same_pass(run, cell))
        if same_sparse_layers(model, params, own_ks, settings.layer_ks(other, num_layers))
    ]
    other_ks = [settings.layer_ks(other, num_layers) for other in others]
    dump = settings.calib_dump_samples and cell.needs_thresholds
    begin_calibration(model, params, other_ks, seed=settings.seed, keep_samples=dump)
    checkpoint.load()
    if calibrates_in_order(model):
        processes.from_first(lambda: calibrate(checkpoint))
    else:
        calibrate(checkpoint)
        checkpoint.join()
    targets = [(other, product_folder(run, other), ks) for other, ks in zip(others, other_ks)]

    def write() -> CalibrationTables:
        checkpoint.save()  # tables may take long, too
        by_ks: dict[tuple[int, ...] | None, CalibrationTables] = {}
        for target, folder, ks in [*targets, (cell, product.path, own_ks)]:
            try:
                tables = by_ks[ks] = by_ks.get(ks) or calibrated_tables(model, ks)
            except UsageError:
                if target is not cell:
                    continue  # that cell will say so
                checkpoint.remove()  # the same samples would fail again
                raise
            folder.mkdir(parents=True, exist_ok=True)
            tables.meta |= {"task": settings.calibration_task, "method": target.method.spec}
            if target is cell:  # what a resumed run reports; the other cells cost nothing more
                tables.meta["seconds"] = f"{checkpoint.seconds_so_far():.1f}"
            if dump:  # before the tables: where these are, a later start takes the calibration for done
                write_calibration_samples(folder, calibration_samples(model, ks))
            save_tables(tables, folder)
        checkpoint.remove()
        labels = ", ".join(one.label for one in [cell, *others])
        run.log(f"calibrated {labels} in {tables.meta['seconds']} s")
        return tables

    return processes.from_first(write)


def same_pass(run: Run, cell: CellParams) -> list[CellParams]:
    """The other uncalibrated cells that can be calibrated in the same pass as `cell`: those that differ only
    in K, or in options of the method that calibration does not use. With calib_tac there are none, because
    attention during calibration depends on K."""
    if cell.calib_tac:
        return []
    return [
        other
        for other in run.settings.cells()
        if other != cell
        and replace(other, K=cell.K, method=cell.method) == cell
        and (other.method == cell.method or _take_the_same_samples(cell, other.method))
        and not (product_folder(run, other) / BINARY_NAME).is_file()
    ]


def _take_the_same_samples(cell: CellParams, other: Method) -> bool:
    """Whether the calibration of a cell would be the same with the method `other`."""
    own = cell.method
    return (
        cell.calib_layers == "uniform"  # else the damage that the method does is measured
        and (type(other), other.needs_values) == (type(own), own.needs_values)
        and other.while_calibrating(tac=False) == own.while_calibrating(tac=False)
        and other.for_sdc_samples() == own.for_sdc_samples()
    )


class Checkpoint:
    """The state of a running calibration, saved in one file per process in `folder`. done: keys of the
    prompts that are finished or skipped."""

    def __init__(self, folder: Path, model: torch.nn.Module):
        self.folder, self.model = folder, model
        rank = processes.rank()
        self.path = folder / f"{STATE}{f'-{rank}' if rank else ''}.safetensors"
        self.done: set[str] = set()
        self._in_first: set[str] = set()  # prompts of earlier starts: the first process has their samples
        self.seconds = 0.0  # that earlier starts spent
        self._started = self._last = time.monotonic()

    def load(self) -> None:
        """Load the saved state, if any. Raises UsageError if a file is damaged."""
        done, self.seconds = processes.from_first(self._load)
        self.done |= done
        if processes.rank():
            self._in_first = done
            self.save()

    def _load(self) -> tuple[set[str], float]:
        """Merge the states of all processes of earlier starts."""
        states = []
        for path in self.folder.glob(f"{STATE}*.safetensors"):
            state = _read(path)
            states.append((_keys(state, path), path, state))
        for keys, path, state in sorted(states, key=lambda found: -len(found[0])):
            if keys & self.done:  # an earlier start has added it to another file already
                continue
            taken = bool(self.done)
            self.done |= keys
            try:
                self.seconds = max(self.seconds, float(state["seconds"]))
                for layer, calibration in calibrations(self.model).items():
                    take = calibration.add_state if taken else calibration.load_state
                    take(_of_layer(state, layer))
            except (KeyError, ValueError, RuntimeError) as error:
                raise _damaged(path, error) from None
        self.save()
        for _, path, _ in states:
            if path != self.path:
                path.unlink()
        return self.done, self.seconds

    def restore(self) -> None:
        """Return to the last saved state, after an unfinished batch of prompts."""
        state = _read(self.path)
        self.done.clear()
        self.done.update(self._in_first, _keys(state, self.path))
        for layer, calibration in calibrations(self.model).items():
            calibration.load_state(_of_layer(state, layer))

    def skip(self, key: str) -> None:
        """Skip a prompt."""
        self.done.add(key)
        self.save()

    def join(self) -> None:
        """Collect the samples of all processes in the first one."""
        for layer in calibrations(self.model).values():
            own = {name: value.cpu() for name, value in layer.state().items()}
            for state in processes.gather(own)[1:]:
                layer.add_state(state)
        for done in processes.gather(self.done)[1:]:
            self.done |= done

    @contextmanager
    def counting(self, keys: Iterable[str]) -> Iterator[None]:
        """Run the prompts of these keys within the block; they are counted completely or not at all. A first
        signal takes effect at the end of the block, after saving; a second one ends the block at once, and a
        later start continues from the last saved state."""
        with uninterrupted(until_second=True):
            yield
            self.done.update(keys)
            if stop_requested() or time.monotonic() - self._last > CHECKPOINT_SECONDS:
                self.save()

    def seconds_so_far(self) -> float:
        return self.seconds + time.monotonic() - self._started

    def save(self) -> None:
        done = " ".join(sorted(self.done - self._in_first))
        state = {"done": torch.tensor(list(done.encode()), dtype=torch.uint8)}
        state["seconds"] = torch.tensor(self.seconds_so_far())
        for layer, calibration in calibrations(self.model).items():
            for key, value in calibration.state().items():
                state[f"{layer}/{key}"] = value.cpu().contiguous()
        write_bytes(self.path, save(state))
        self._last = time.monotonic()

    def remove(self) -> None:
        """Remove the files of all processes."""
        for path in self.folder.glob(f"{STATE}*.safetensors"):
            path.unlink()


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = load_file(path)
        state["done"], state["seconds"]  # noqa: B018
        return state
    except (SafetensorError, OSError, KeyError) as error:
        raise _damaged(path, error) from None


def _keys(state: dict[str, torch.Tensor], path: Path) -> set[str]:
    """Of the prompts that a state has seen."""
    try:
        return set(bytes(state["done"].tolist()).decode().split())
    except (TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _of_layer(state: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    prefix = f"{layer}/"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} is damaged ({error}): remove it to calibrate from the start.")
