"""Compensation for dropped keys: softmax denominator compensation (SDC) and V-mean compensation (VMC).

Rows with n <= K need no compensation: their theta is -inf, their table value 0, and nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from toptheta.methods.base import Method, RowTables
from toptheta.util.errors import UsageError

if TYPE_CHECKING:  # as in base.py
    from torch import Tensor

SDC_METHODS = ("none", "exact", "exp-threshold", "offline-calibrated")


def missing_denominator(
    sdc: str, exps: Tensor, keep: Tensor, row_max: Tensor, n: Tensor, tables: RowTables
) -> Tensor:
    """The missing part R of the softmax denominator (SDC), `[B, H, R, 1]`.

    exps: exp(scores - row_max) over visible keys; keep: the kept keys; both `[B, H, R, E]`. n: `[B or 1, R]`.
    """
    if sdc == "exact":
        return exps.masked_fill(keep, 0.0).sum(dim=-1, keepdim=True)
    if sdc == "exp-threshold":
        assert tables.theta is not None
        dropped = n[:, None, :, None] - keep.sum(dim=-1, keepdim=True)
        return dropped * (tables.theta - row_max).exp()
    if sdc == "offline-calibrated":
        assert tables.sdc is not None
        return tables.sdc.expand(exps.shape[0], -1, -1, -1)
    raise ValueError(f"no such SDC: {sdc}")


def add_mean(
    out: Tensor, weights: Tensor, v_mean: Tensor, sparse: Tensor, share: Tensor | None = None
) -> Tensor:
    """V-mean compensation: `out` `[B, H, R, D]` plus the lost weight of each row times the mean of V over its
    visible keys. weights: `[B, H, R, E]`; v_mean: `[B, H, R, D]`; sparse: `[B or 1, R]` bool; share: see
    `Block`."""
    whole = 1.0 if share is None else share[..., 0]
    lost = (whole - weights.sum(dim=-1)) * sparse[:, None]
    return out.float() + lost.unsqueeze(-1) * v_mean


def check(method: Method, placement: str, sdc: str, vmc: bool, flag: Callable[[str], str] = str) -> None:
    """Raise UsageError if a compensation has nothing to compensate, or needs something that the method does
    not have."""
    if sdc != "none" and placement != "pre-softmax":
        raise UsageError(
            f"{flag('sdc')} {sdc} corrects a softmax over the kept scores only, so it needs "
            f"{flag('placement')} pre-softmax: change the placement, or use {flag('sdc')} none."
        )
    if sdc == "exp-threshold" and not method.needs_thresholds:
        raise UsageError(
            f"{flag('sdc')} exp-threshold needs a threshold: use {flag('mode')} 0, or another {flag('sdc')}."
        )
    if sdc == "offline-calibrated" and not (method.samples_sdc and method.uses_k):
        raise UsageError(
            f"{flag('sdc')} offline-calibrated samples prompt rows longer than K, which do not show what "
            f"{method.name} drops: use {flag('sdc')} exact or none."
        )
    if vmc and placement == "pre-softmax" and sdc == "none":
        raise UsageError(
            f"{flag('vmc')} has nothing to compensate when {flag('placement')} is pre-softmax without "
            "SDC (the kept "
            f"weights then sum to 1): add {flag('sdc')} exact, exp-threshold or offline-calibrated."
        )
