"""A calibration and its state: run where a cell needs it, kept in a file, continued by a later start."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

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
from toptheta.util.files import atomic_path


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
    params = replace(cell, calib_load_path="")
    if cell.sparse:
        params = replace(params, K=settings.layer_ks(cell, num_layers))
    if not cell.needs_calibration:
        use_params(model, params)
        return 0.0
    if settings.calib_load_path:
        use_params(model, replace(params, calib_load_path=settings.calib_load_path))
        return 0.0
    if (product.path / BINARY_NAME).is_file():  # an earlier start got this far
        use_params(model, replace(params, calib_load_path=str(product.path)))
        loaded = tables_of(model)
        return float(loaded.meta.get("seconds", 0.0)) if loaded is not None else 0.0

    started = time.monotonic()
    others = same_pass(run, cell)
    other_ks = [settings.layer_ks(other, num_layers) for other in others]
    dump = settings.calib_dump_samples and cell.needs_thresholds
    begin_calibration(model, params, other_ks, seed=settings.seed, keep_samples=dump)
    checkpoint = Checkpoint(product.path / "partial-calibration.safetensors", model)
    done = checkpoint.load()
    started -= checkpoint.seconds
    own_ks = settings.layer_ks(cell, num_layers)
    targets = [(product_folder(run, other), ks) for other, ks in zip(others, other_ks)]
    try:
        calibrate(checkpoint.maybe_save, done)
        for folder, ks in [*targets, (product.path, own_ks)]:
            folder.mkdir(parents=True, exist_ok=True)
            tables = calibrated_tables(model, ks)
            tables.meta["task"] = settings.calibration_task
            if folder == product.path:  # what a resumed run reports; the other cells cost nothing more
                tables.meta["seconds"] = f"{time.monotonic() - started:.1f}"
            if dump:  # before the tables: where these are, a later start takes the calibration for done
                write_calibration_samples(folder, calibration_samples(model, ks))
            save_tables(tables, folder)
    except KeyboardInterrupt:
        checkpoint.save()
        raise
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
    """The state of a calibration under way, kept in one file."""

    def __init__(self, path: Path, model: torch.nn.Module):
        self.path, self.calibrations = path, calibrations(model)
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
            for layer, calibration in self.calibrations.items():
                prefix = f"{layer}/"
                own = {key: value for key, value in state.items() if key.startswith(prefix)}
                calibration.load_state({key.removeprefix(prefix): value for key, value in own.items()})
        return self.done

    def maybe_save(self) -> None:
        if time.monotonic() - self._last > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        state = {"done": torch.tensor(list(" ".join(sorted(self.done)).encode()), dtype=torch.uint8)}
        state["seconds"] = torch.tensor(self.seconds + time.monotonic() - self._started)
        for layer, calibration in self.calibrations.items():
            for key, value in calibration.state().items():
                state[f"{layer}/{key}"] = value.cpu().contiguous()
        with atomic_path(self.path) as temporary:
            save_file(state, temporary)
        self._last = time.monotonic()
