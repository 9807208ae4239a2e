"""The parameters of sparse attention and the one place where their rules are checked.

Covers what `set_params` and the scripts' flags share. Does not cover flags about tasks, files or devices
(settings.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from toptheta.util.errors import UsageError

TOP_THETA, TOP_K, DENSE = 0, 1, 3
INTERPOLATIONS = ("nearest", "linear", "fit")  # of row lengths, see calibration/interpolation.py
PLACEMENTS = ("pre-softmax", "post-softmax", "none")
SDC_METHODS = ("none", "exact", "exp-threshold", "offline-calibrated")
METHOD_NAMES = {TOP_THETA: "Top-theta", TOP_K: "Top-k"}


@dataclass(frozen=True)
class AttentionParams:
    """Everything that `set_params` steers, under the published project's names (DESIGN sections 1-4)."""

    K: int | Sequence[int] | Mapping[int, int] = 256
    mode: int = DENSE
    placement: str = "pre-softmax"
    sdc: str = "none"
    sdc_scale: float = 1.0
    vmc: bool = False
    capk: bool = False
    test_layer: int | None = None
    calibrate: bool = False
    calib_tac: bool = False
    calib_add_sigma: float = 0.0
    calib_sample_frac: float = 0.1
    calib_load_path: str = ""
    calib_interp: str = "nearest"  # of lengths that calibration never saw; both act when tables are used,
    calib_smooth: int = 0  # in tokens to either side; the tables themselves stay as calibrated
    calibration_requests: int | None = (
        None  # accepted for the published project's users; calibration ends explicitly
    )

    @property
    def sparse(self) -> bool:
        """Whether any row may be sparse: mode 0 or 1, placed somewhere."""
        return self.mode in (TOP_THETA, TOP_K) and self.placement != "none"

    @property
    def needs_thresholds(self) -> bool:
        return self.sparse and self.mode == TOP_THETA

    @property
    def needs_sdc_table(self) -> bool:
        return self.sparse and self.sdc == "offline-calibrated"

    @property
    def needs_calibration(self) -> bool:
        return self.needs_thresholds or self.needs_sdc_table

    def k_per_layer(self, num_layers: int, default: int = 256) -> tuple[int, ...]:
        """K of every layer; raises UsageError for a list of the wrong length or a layer that is not there."""
        return expand_k(self.K, num_layers, default)


def method_name(mode: int, placement: str = "pre-softmax") -> str:
    """The method's name in tables: 'Top-theta', 'Top-k' or 'dense'."""
    return "dense" if placement == "none" else METHOD_NAMES.get(mode, "dense")


def expand_k(
    k: int | Sequence[int] | Mapping[int, int], num_layers: int, default: int = 256, name: str = "K"
) -> tuple[int, ...]:
    """One K per layer from an int, a list with one per layer, or {layer: k} over `default`."""
    if isinstance(k, bool) or not isinstance(k, (int, Sequence, Mapping)) or isinstance(k, str):
        raise UsageError(f"{name} is {k!r}: give a whole number, a list with one per layer, or {{layer: k}}.")
    if isinstance(k, int):
        return (k,) * num_layers
    if isinstance(k, Mapping):
        for layer in k:
            if not 0 <= layer < num_layers:
                raise UsageError(
                    f"{name} names layer {layer}, but the model has layers 0 to {num_layers - 1}: "
                    "name one of those."
                )
        return tuple(k.get(layer, default) for layer in range(num_layers))
    if len(k) != num_layers:
        raise UsageError(
            f"{name} lists {len(k)} values, but the model has {num_layers} layers: give one per layer."
        )
    return tuple(k)


def check(params: AttentionParams, flag: Callable[[str], str] = str) -> AttentionParams:
    """Raise UsageError for a value or combination that makes no sense; return `params` unchanged otherwise.

    `flag` turns a parameter's name into what its user typed: `set_params` leaves it, the scripts add '--'.
    """
    mode, placement = params.mode, params.placement
    if placement not in PLACEMENTS:
        raise UsageError(f"{flag('placement')} is {placement!r}: choose one of {', '.join(PLACEMENTS)}.")
    if params.sdc not in SDC_METHODS:
        raise UsageError(f"{flag('sdc')} is {params.sdc!r}: choose one of {', '.join(SDC_METHODS)}.")
    if not isinstance(mode, int):
        raise UsageError(f"{flag('mode')} is {mode!r}: give 0 (Top-theta), 1 (Top-k) or 3 (dense).")
    if not params.sdc_scale >= 0.0:
        raise UsageError(f"{flag('sdc_scale')} is {params.sdc_scale}: give a number of at least 0.")
    if not 0.0 < params.calib_sample_frac <= 1.0:
        raise UsageError(
            f"{flag('calib_sample_frac')} is {params.calib_sample_frac}: give a share of rows above 0 "
            "and up to 1."
        )
    if params.calib_interp not in INTERPOLATIONS:
        raise UsageError(
            f"{flag('calib_interp')} is {params.calib_interp!r}: choose one of {', '.join(INTERPOLATIONS)}."
        )
    smooth = params.calib_smooth
    if isinstance(smooth, bool) or not isinstance(smooth, int) or smooth < 0:
        raise UsageError(
            f"{flag('calib_smooth')} is {smooth!r}: give a whole number of tokens, 0 for no smoothing."
        )
    for k in params.K.values() if isinstance(params.K, Mapping) else [params.K]:
        for value in k if isinstance(k, Sequence) and not isinstance(k, str) else [k]:
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError(f"{flag('K')} is {value!r}: give whole numbers.")
    if not params.sparse:
        return params
    if params.sdc != "none" and placement != "pre-softmax":
        raise UsageError(
            f"{flag('sdc')} {params.sdc} mends a softmax taken over kept scores only, so it needs "
            f"{flag('placement')} pre-softmax: change the placement, or use {flag('sdc')} none."
        )
    if params.sdc == "exp-threshold" and mode != TOP_THETA:
        raise UsageError(
            f"{flag('sdc')} exp-threshold needs a threshold: use {flag('mode')} 0, or another {flag('sdc')}."
        )
    if params.vmc and placement == "pre-softmax" and params.sdc == "none":
        raise UsageError(
            f"{flag('vmc')} has nothing to compensate when {flag('placement')} is pre-softmax without "
            "SDC (the kept "
            f"weights then sum to 1): add {flag('sdc')} exact, exp-threshold or offline-calibrated."
        )
    if params.capk and mode != TOP_THETA:
        raise UsageError(f"{flag('capk')} caps what a threshold keeps: use it with {flag('mode')} 0 only.")
    if params.calib_tac and mode != TOP_THETA:
        raise UsageError(
            f"{flag('calib_tac')} shapes the calibration of thresholds: use it with {flag('mode')} 0 only."
        )
    return params
