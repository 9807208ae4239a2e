"""The parameters of sparse attention, and the checks of their rules.

Covers what `set_params` and the scripts' flags share, not the flags about tasks, files or devices
(settings.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toptheta.methods import compensation
from toptheta.methods.base import KernelSpec, Method, check_method, of_mode, parse_method
from toptheta.methods.compensation import SDC_METHODS
from toptheta.methods.dense import Dense
from toptheta.util.errors import UsageError
from toptheta.util.options import check_options, check_type, option, plain

if TYPE_CHECKING:  # as in base.py
    from torch import Tensor

PLACEMENTS = ("pre-softmax", "post-softmax", "none")
INTERPOLATIONS = ("nearest", "linear", "fit")  # of row lengths, see calibration/interpolation.py
CALIBRATION_AIMS = ("k", "budget")
WHEN_SLOWER = ("sparse", "dense")
LAYER_BUDGETS = ("uniform", "sensitivity")
CALIBRATION_GROUP = "calibration of thresholds"  # of flags
PUBLISHED = ("mode", "capk")  # names of the published project that are parts of `method` here


@dataclass(frozen=True)
class LayerSpec:
    """The resolved parameters of one layer. k <= 0 leaves every row dense, unless the method has no K."""

    method: Method = field(default_factory=Dense)
    placement: str = "none"
    k: int = 0
    sdc: str = "none"
    sdc_scale: float = 1.0
    vmc: bool = False

    @property
    def sparse(self) -> bool:
        """Whether any row may be sparse."""
        return (
            not self.method.is_dense and self.placement != "none" and (self.k > 0 or not self.method.uses_k)
        )

    def may_drop(self, n: "Tensor") -> "Tensor":
        """Whether rows with `n` visible keys may be sparse (n > K), as bool of n's shape."""
        return n > (self.k if self.method.uses_k else 0)

    @cached_property
    def kernel(self) -> KernelSpec | None:
        """The same in the form that kernels support; None: reference path only."""
        if not self.sparse:
            return KernelSpec()
        spec = self.method.kernel_spec()
        if spec is None or spec.weighed and self.placement != "post-softmax":
            return None
        return replace(
            spec, placement=self.placement, k=self.k, sdc=self.sdc, sdc_scale=self.sdc_scale, vmc=self.vmc
        )


@dataclass(frozen=True)
class MethodOptions:
    """The options of sparse attention that `set_params` and the scripts' flags share, except the method and
    K. calib_interp and calib_smooth apply when tables are used; the saved tables do not change.
    """

    placement: str = option(
        "pre-softmax",
        "what is compared: scores (pre-softmax, default), weights (post-softmax) or nothing (none, dense)",
        metavar="WHERE",
        group="method",
        choices=PLACEMENTS,
    )
    sdc: str = option(
        "none",
        f"softmax denominator compensation: {', '.join(SDC_METHODS)}",
        metavar="HOW",
        group="method",
        choices=SDC_METHODS,
    )
    sdc_scale: float = option(
        1.0,
        "factor on the compensated part of the denominator (default 1)",
        metavar="X",
        group="method",
        rule=(lambda scale: scale >= 0.0, "give a number of at least 0"),
    )
    vmc: bool = option(
        False, "V-mean compensation: add the mean V row, weighted by the lost mass", group="method"
    )
    when_slower: str = option(
        "sparse",
        "dense: compute a layer dense where a profile of the GPU (python -m toptheta.kernels.tune) predicts "
        "that thresholds are slower, which changes results; sparse (default): never",
        metavar="HOW",
        group="method",
        choices=WHEN_SLOWER,
    )
    calib_tac: bool = option(
        False, "compute Top-k attention while calibrating (recommended)", group=CALIBRATION_GROUP
    )
    calib_to: str = option(
        "k",
        "k (default, as published): every head and row length keeps about K; budget: one threshold on "
        "weights for the whole model, such that heads and rows keep K on average (needs --placement "
        "post-softmax)",
        metavar="AIM",
        group=CALIBRATION_GROUP,
        choices=CALIBRATION_AIMS,
    )
    calib_layers: str = option(
        "uniform",
        "with --calib_to budget: uniform (default), the same threshold in all layers; sensitivity: one per "
        "layer, by how much the output changes when only that layer is sparse",
        metavar="HOW",
        group=CALIBRATION_GROUP,
        choices=LAYER_BUDGETS,
    )
    calib_add_sigma: float = option(
        0.0,
        "add X standard deviations to the mean threshold",
        metavar="X",
        group=CALIBRATION_GROUP,
    )
    calib_sample_frac: float = option(
        0.1,
        "share of a prompt's rows to sample (default 0.1)",
        metavar="F",
        group=CALIBRATION_GROUP,
        rule=(lambda share: 0.0 < share <= 1.0, "give a share of rows above 0 and up to 1"),
    )
    calib_interp: str = option(
        "nearest",
        "thresholds of uncalibrated row lengths: nearest (default), linear (interpolated) or fit (a smooth "
        "curve per head for all lengths, also beyond the longest)",
        metavar="HOW",
        group=CALIBRATION_GROUP,
        choices=INTERPOLATIONS,
    )
    calib_smooth: int = option(
        0,
        "average calibrated values over row lengths up to W tokens apart (default 0; saved files are not "
        "smoothed)",
        metavar="W",
        group=CALIBRATION_GROUP,
        rule=(lambda width: width >= 0, "give a whole number of tokens, 0 for no smoothing"),
    )
    calib_load_path: str = option(
        "",
        "load the tables in DIR (calibration.safetensors, else th.txt / sdc.txt) instead of calibrating",
        metavar="DIR",
        group=CALIBRATION_GROUP,
    )


@dataclass(frozen=True)
class AttentionParams(MethodOptions):
    """All parameters of `set_params`, with the published project's names, except that `method` replaces
    `mode` and `capk`."""

    K: int | Sequence[int] | Mapping[int, int] = 256
    method: Method = field(default_factory=Dense)
    test_layer: int | None = None
    calibrate: bool = False
    calibration_requests: int | None = (
        None  # accepted for the published project's users; calibration ends explicitly
    )

    @property
    def sparse(self) -> bool:
        """Whether any row may be sparse: the method is not dense and the placement is not none."""
        return not self.method.is_dense and self.placement != "none"

    @property
    def needs_thresholds(self) -> bool:
        return self.sparse and self.method.needs_thresholds

    @property
    def needs_sdc_table(self) -> bool:
        return self.sparse and self.sdc == "offline-calibrated"

    @property
    def needs_calibration(self) -> bool:
        return self.needs_thresholds or self.needs_sdc_table

    @property
    def label(self) -> str:
        """The name in tables: 'dense', 'Top-k K=64', 'Top-theta K=64', 'Top-theta budget K=64'."""
        return self.label_with(())

    def label_with(self, more: Sequence[str]) -> str:
        """The name in tables, with further parts."""
        if not self.sparse:
            return Dense.title
        title = self.method.title
        label = self.method.label(self.K if isinstance(self.K, int) else None, more)
        if self.method.needs_thresholds and self.calib_to == "budget":
            return label.replace(title, f"{title} budget", 1)
        return label

    def k_per_layer(self, num_layers: int, default: int = 256) -> tuple[int, ...]:
        """K of every layer. Raises UsageError for a list of the wrong length or a layer that does not
        exist."""
        return expand_k(self.K, num_layers, default)

    def layer(self, k: int) -> LayerSpec:
        """The parameters of a layer with this K."""
        return LayerSpec(self.method, self.placement, k, self.sdc, self.sdc_scale, self.vmc)

    def changed(self, given: Mapping[str, Any], flag: Callable[[str], str] = str) -> "AttentionParams":
        """These parameters, changed to the given values; not checked. given: by the names of the fields or of
        the published project; its method is a Method, or text as `parse_method` reads it; numbers may be
        numpy's, and a folder a Path or None. Raises UsageError for an unknown name, for a `mode` or `capk` of
        another type, and if `method` and `mode` are both given."""
        known = [*(f.name for f in fields(self)), *PUBLISHED]
        for name in given:
            if name not in known:
                raise UsageError(f"set_params has no parameter {name!r}: choose from {', '.join(known)}.")
        given = {name: plain(value) for name, value in given.items()}
        method = self.method
        if "method" in given:
            if "mode" in given:
                raise UsageError(
                    f"{flag('method')} and {flag('mode')} both name the method: give one of them."
                )
            method = given["method"]
            if isinstance(method, str):
                method = parse_method(method, flag("method"))
            elif isinstance(method, Method):
                options = {f.name: plain(getattr(method, f.name)) for f in fields(method) if f.init}
                method = replace(method, **options)
        elif "mode" in given:
            mode = given["mode"]
            check_type(flag("mode"), mode, int, "give 0 (Top-theta), 1 (Top-k) or 3 (dense)")
            chosen = of_mode(mode)
            method = method if type(chosen) is type(method) else chosen
        if "capk" in given:
            check_type(flag("capk"), given["capk"], bool)
            if hasattr(method, "capk"):
                method = replace(method, capk=given["capk"])  # type: ignore[call-arg]
            elif given["capk"]:
                raise UsageError(
                    f"{flag('capk')} caps what a threshold keeps: use it with {flag('mode')} 0 only."
                )
        rest = {name: value for name, value in given.items() if name not in ("method", *PUBLISHED)}
        folder = rest.get("calib_load_path", "")
        if folder is None or isinstance(folder, Path):
            rest["calib_load_path"] = str(folder or "")
        return replace(self, method=method, **rest)


def expand_k(
    k: int | Sequence[int] | Mapping[int, int], num_layers: int, default: int = 256, name: str = "K"
) -> tuple[int, ...]:
    """K of each layer, from an int, a list with one per layer, or {layer: k} with `default` for the rest."""
    if isinstance(k, bool) or not isinstance(k, (int, Sequence, Mapping)) or isinstance(k, str):
        raise UsageError(f"{name} is {k!r}: give a whole number, a list with one per layer, or {{layer: k}}.")
    if isinstance(k, int):
        return (k,) * num_layers
    if isinstance(k, Mapping):
        for layer in k:
            if type(layer) is not int:
                raise UsageError(f"{name} names layer {layer!r}: the keys are the numbers of layers.")
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


def check_aim(params: AttentionParams, flag: Callable[[str], str]) -> None:
    """Raise UsageError if `calib_to` does not go with the other parameters."""
    if params.calib_to == "k":
        if params.method.needs_values:
            raise UsageError(
                f"value_aware needs one threshold on weights for all heads: add {flag('calib_to')} budget."
            )
        if params.calib_layers != "uniform":
            raise UsageError(
                f"{flag('calib_layers')} {params.calib_layers} distributes a budget over the layers: add "
                f"{flag('calib_to')} budget."
            )
        return
    if params.placement != "post-softmax":
        raise UsageError(
            f"{flag('calib_to')} budget calibrates a threshold on weights, which needs {flag('placement')} "
            f"post-softmax, not {params.placement}: change the placement, or use {flag('calib_to')} k."
        )
    for name, unused in (
        ("calib_add_sigma", params.calib_add_sigma != 0.0),
        ("calib_interp", params.calib_interp != "nearest"),
        ("calib_smooth", params.calib_smooth != 0),
    ):
        if unused:
            raise UsageError(
                f"{flag(name)} has no effect with {flag('calib_to')} budget, whose threshold is the same for "
                "all row lengths: leave it out."
            )


def check(params: AttentionParams, flag: Callable[[str], str] = str) -> AttentionParams:
    """Return `params` unchanged. Raises UsageError for an invalid value or combination.

    flag: turns a parameter's name into what the user typed: `set_params` leaves it, the scripts add '--'.
    """
    check_options(params, flag)
    for name, kind in (("test_layer", int | None), ("calibrate", bool), ("calibration_requests", int | None)):
        check_type(flag(name), getattr(params, name), kind)
    if params.calibrate and params.calib_load_path:
        raise UsageError(
            f"{flag('calib_load_path')} loads tables instead of calibrating: leave it out, or "
            f"{flag('calibrate')}=True."
        )
    method = params.method
    if not isinstance(method, Method):
        raise UsageError(f"{flag('method')} is {method!r}: give a method's name, or one of toptheta.methods.")
    check_method(method, flag)
    ks = params.K.values() if isinstance(params.K, Mapping) else params.K
    for k in [ks] if isinstance(ks, (int, str)) or not isinstance(ks, Iterable) else ks:
        advice = "give whole numbers (0 leaves a layer dense)"
        check_type(flag("K"), k, int, advice)
        if k < 0:
            raise UsageError(f"{flag('K')} is {k}: {advice}.")
        if k > 0 and params.sparse:
            method.check_k(k, flag)
    if not params.sparse:
        return params
    compensation.check(method, params.placement, params.sdc, params.vmc, flag)
    if method.needs_thresholds:
        check_aim(params, flag)
    if method.needs_weights and params.placement != "post-softmax":
        raise UsageError(
            f"{method.spec} compares weights: add {flag('placement')} post-softmax, not {params.placement}."
        )
    if params.calib_tac and not method.needs_thresholds:
        raise UsageError(
            f"{flag('calib_tac')} applies to calibrated thresholds only: use it with {flag('mode')} 0."
        )
    return params
