"""Telling a model that is calibrated which prompts it will be shown, so that the rows that are sampled of
each do not depend on how they come (calibration/plan.py)."""

from collections.abc import Mapping, Sequence

from torch import nn

from toptheta.calibration.plan import RowPlan
from toptheta.models.control import calibrations


def announce_prompts(model: nn.Module, spans: Mapping[str, tuple[int, int]]) -> None:
    """Say, before the first is computed, which prompts calibrate: by key (start, stop) where their rows have
    lengths start + 1 to stop. Rows are then drawn whatever order, chunks or batches they come in."""
    plan = _plan(model)
    if plan is not None:
        plan.announce(spans)


def begin_prompts(model: nn.Module, keys: Sequence[str]) -> None:
    """The sequences that the model is shown from here on are those of these keys, in this order."""
    plan = _plan(model)
    if plan is not None:
        plan.begin(keys)


def _plan(model: nn.Module) -> RowPlan | None:
    return next((one.plan for one in calibrations(model).values()), None)
