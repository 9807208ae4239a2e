"""Announces the prompts of a calibration to the model, so that the sampled rows do not depend on their order,
chunks or batches (calibration/plan.py)."""

from collections.abc import Mapping, Sequence

from torch import nn

from toptheta.calibration.plan import RowPlan
from toptheta.models.calibrate import calibrations


def announce_prompts(model: nn.Module, spans: Mapping[str, tuple[int, int]]) -> None:
    """Announce the calibration prompts before the first is computed: by key (start, stop), their rows having
    lengths start + 1 to stop. The sampled rows then do not depend on order, chunks or batches."""
    plan = _plan(model)
    if plan is not None:
        plan.announce(spans)


def begin_prompts(model: nn.Module, keys: Sequence[str]) -> None:
    """Declare that the following sequences are the prompts with these keys, in this order."""
    plan = _plan(model)
    if plan is not None:
        plan.begin(keys)


def _plan(model: nn.Module) -> RowPlan | None:
    return next((one.plan for one in calibrations(model).values()), None)
