"""A calibration and its state: run where a cell needs it, kept in a file, continued by a later start."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from toptheta.calibration.kept_samples import write_calibration_samples
from toptheta.calibration.tables import BINARY_NAME, save_tables
from toptheta.eval.cell import CHECKPOINT_SECONDS, Cell
from toptheta.eval.run import Run, product_folder
from toptheta.methods.params import AttentionParams
from toptheta.models.control import (
    begin_calibration,
    calibrated_tables,
    calibration_samples,
    calibrations,
    tables_of,
    use_params,
    use_tables,
)
from toptheta.util.errors import UsageError
from toptheta.util.files import write_bytes
from toptheta.util.interrupts import stop_requested, uninterrupted


def prepare(
    run: Run,
    cell: AttentionParams,
    product: Cell,
    model: Any,
    calibrate: Callable[["Checkpoint"], None],
) -> float:
    """Bring the model into a cell's state, calibrating first where that is needed; returns seconds of
    calibration.

    calibrate(checkpoint) runs the calibration prompts within the checkpoint's `counting`, but for those that
    it has done.
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
    checkpoint = Checkpoint(product.path / "partial-calibration.safetensors", model)
    if (product.path / BINARY_NAME).is_file():  # an earlier start got this far
        checkpoint.path.unlink(missing_ok=True)
        use_params(model, replace(params, calib_load_path=str(product.path)))
        loaded = tables_of(model)
        return float(loaded.meta.get("seconds", 0.0)) if loaded is not None else 0.0

    started = time.monotonic()
    others = same_pass(run, cell)
    other_ks = [settings.layer_ks(other, num_layers) for other in others]
    dump = settings.calib_dump_samples and cell.needs_thresholds
    begin_calibration(model, params, other_ks, seed=settings.seed, keep_samples=dump)
    checkpoint.load()
    started -= checkpoint.seconds
    own_ks = settings.layer_ks(cell, num_layers)
    targets = [(product_folder(run, other), ks) for other, ks in zip(others, other_ks)]
    calibrate(checkpoint)
    checkpoint.save()  # tables may take long, too
    for folder, ks in [*targets, (product.path, own_ks)]:
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
    use_params(model, params)
    seconds = time.monotonic() - started
    run.log(f"calibrated {', '.join(one.label for one in [cell, *others])} in {seconds:.1f} s")
    return seconds


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


class Checkpoint:
    """The state of a calibration under way, kept in one file. done: keys of the prompts that it has seen."""

    def __init__(self, path: Path, model: torch.nn.Module):
        self.path, self.model = path, model
        self.done: set[str] = set()
        self.seconds = 0.0  # that earlier starts spent
        self._started = self._last = time.monotonic()

    def load(self) -> None:
        """Take up the saved state, if any. Raises UsageError when the file is damaged."""
        if not self.path.is_file():
            return
        try:
            state = load_file(self.path)
            self.done.update(bytes(state.pop("done").tolist()).decode().split())
            self.seconds = float(state.pop("seconds"))
            for layer, calibration in calibrations(self.model).items():
                prefix = f"{layer}/"
                own = {key: value for key, value in state.items() if key.startswith(prefix)}
                calibration.load_state({key.removeprefix(prefix): value for key, value in own.items()})
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"{self.path} is damaged ({error}): remove it to calibrate from the start."
            ) from None

    @contextmanager
    def counting(self, keys: Iterable[str]) -> Iterator[None]:
        """The model reads the prompts of these keys within the block. They count whole or not at all: a first
        signal waits for the end, and then what was sampled is saved; a second one ends the block at once, and
        what was saved last is what a later start finds."""
        with uninterrupted(until_second=True):
            yield
            self.done.update(keys)
            if stop_requested() or time.monotonic() - self._last > CHECKPOINT_SECONDS:
                self.save()

    def save(self) -> None:
        state = {"done": torch.tensor(list(" ".join(sorted(self.done)).encode()), dtype=torch.uint8)}
        state["seconds"] = torch.tensor(self.seconds + time.monotonic() - self._started)
        for layer, calibration in calibrations(self.model).items():
            for key, value in calibration.state().items():
                state[f"{layer}/{key}"] = value.cpu().contiguous()
        write_bytes(self.path, save(state))
        self._last = time.monotonic()
