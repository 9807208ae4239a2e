"""Steering a patched model: parameters, calibration, look-up tables, statistics."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toptheta.attention.reference import NEG_INF, LayerSpec
from toptheta.calibration.interpolation import lookup_table
from toptheta.calibration.sampler import LayerCalibration
from toptheta.calibration.tables import CalibrationTables, LayerTable, check_fit, load_tables
from toptheta.methods.params import TOP_K, TOP_THETA, AttentionParams, check
from toptheta.models.patch import TopK_LLamaAttention, choose_implementation, patched_layers
from toptheta.models.recorder import Recorder
from toptheta.util.errors import UsageError


def get_params(model: nn.Module) -> AttentionParams:
    """The parameters that the model computes with now."""
    return patched_layers(model)[0].params


def set_params(model: nn.Module, **params) -> None:
    """Steer a patched model; parameters that are not given stay as they are (fields of AttentionParams).

    calibrate=True starts calibration of what the other parameters need; the prompts then run through the
    model are its samples; calibrate=False ends it and puts the tables to use. calib_load_path loads tables
    from a folder instead. Raises UsageError for an unknown name, a combination that makes no sense, or tables
    that are missing or do not fit.
    """
    known = [field.name for field in fields(AttentionParams)]
    for name in params:
        if name not in known:
            raise UsageError(f"set_params knows no parameter {name!r}: choose from {', '.join(known)}.")
    layers = patched_layers(model)
    old = get_params(model)
    implied: dict[str, Any] = {"calib_load_path": ""}
    if params.get("mode", old.mode) != TOP_THETA:
        implied["calib_tac"] = False  # left over from a calibration; given in this call, it is an error
    new = check(replace(old, **(implied | params)))
    k_per_layer = new.k_per_layer(len(layers))
    if new.test_layer is not None and not 0 <= new.test_layer < len(layers):
        raise UsageError(f"test_layer is {new.test_layer}, but the model has layers 0 to {len(layers) - 1}.")

    calibrating = any(layer.calibration is not None for layer in layers)
    if calibrating and not new.calibrate and not new.calib_load_path:
        use_tables(model, calibrated_tables(model))
    if new.calibrate:
        begin_calibration(model, new)
    elif new.calib_load_path:
        use_tables(model, load_tables(new.calib_load_path, len(layers), layers[0].config.num_attention_heads))
    tables = layers[0].tables
    if not new.calibrate:
        for layer in layers:
            layer.calibration = None
        _install(layers, new, k_per_layer, tables)
    for layer in layers:
        layer.params = new
    choose_implementation(layers)


def _sparse_layers(params: AttentionParams, k_per_layer: tuple[int, ...]) -> list[int]:
    return [
        i for i, k in enumerate(k_per_layer) if params.sparse and k > 0 and params.test_layer in (None, i)
    ]


def _install(
    layers: list[TopK_LLamaAttention],
    params: AttentionParams,
    k_per_layer: tuple[int, ...],
    tables: CalibrationTables | None,
) -> None:
    """Give every layer its spec and look-up tables."""
    sparse = _sparse_layers(params, k_per_layer)
    for kind, needed in (("theta", params.needs_thresholds), ("sdc", params.needs_sdc_table)):
        if not needed:
            continue
        if tables is None:
            raise UsageError(
                f"{'mode 0' if kind == 'theta' else 'sdc offline-calibrated'} needs calibrated tables: call "
                "set_params with calibrate=True, run some prompts, then calibrate=False; or load them with "
                "calib_load_path."
            )
        check_fit(tables, kind, k_per_layer, params.placement, sparse)
    for i, layer in enumerate(layers):
        layer.theta = layer.sdc_table = None
        if i not in sparse:
            layer.spec = LayerSpec()
            continue
        layer.spec = LayerSpec(
            mode=params.mode,
            placement=params.placement,
            k=k_per_layer[i],
            sdc=params.sdc,
            sdc_scale=params.sdc_scale,
            vmc=params.vmc,
            capk=params.capk,
        )
        if tables is not None and params.needs_thresholds:
            within = (0.0, 1.0) if params.placement == "post-softmax" else (-np.inf, np.inf)
            layer.theta = _lookup(layer, tables.theta[i], params, NEG_INF, within)
        if tables is not None and params.needs_sdc_table:
            layer.sdc_table = _lookup(layer, tables.sdc[i], params, 0.0, (0.0, np.inf))


def _lookup(
    layer: TopK_LLamaAttention,
    table: LayerTable,
    params: AttentionParams,
    below: float,
    within: tuple[float, float],
) -> Tensor:
    """`[H, L]` float32 by row length, where the layer computes."""
    table_of_all = lookup_table(
        table.values,
        table.samples,
        layer.spec.k,
        below,
        params.calib_interp,
        params.calib_smooth,
        layer.config.max_position_embeddings,
        within,
    )
    return torch.from_numpy(table_of_all).to(_execution_device(layer))


def begin_calibration(
    model: nn.Module,
    params: AttentionParams,
    more_k: Sequence[tuple[int, ...]] = (),
    seed: int = 0,
    keep_samples: bool = False,
) -> None:
    """Start calibrating what `params` will need. more_k: K per layer of other cells that the same pass serves
    (without calib_tac), beside params.K. keep_samples: keep every sample of thresholds too, see
    `calibration_samples`."""
    layers = patched_layers(model)
    k_per_layer = params.k_per_layer(len(layers))
    if not params.needs_calibration:
        raise UsageError(
            "calibrate=True has nothing to calibrate: it serves mode 0 and sdc offline-calibrated."
        )
    if more_k and params.calib_tac:
        raise UsageError("calib_tac computes with one K, so it calibrates one K at a time.")
    sparse = _sparse_layers(replace(params, test_layer=None), k_per_layer)
    for i, layer in enumerate(layers):
        layer.theta = layer.sdc_table = layer.calibration = None
        layer.recorder = None  # calibration prompts count in no statistic
        layer.spec = LayerSpec()
        if i not in sparse:
            continue
        tac = params.calib_tac and params.mode == TOP_THETA
        # Top-k's weights lack mass only when they are dropped after the softmax: only there VMC has something
        # to do.
        layer.spec = LayerSpec(
            mode=TOP_K if tac else 3,
            placement=params.placement,
            k=k_per_layer[i],
            vmc=params.vmc and tac and params.placement == "post-softmax",
        )
        layer.calibration = LayerCalibration(
            ks=sorted({k_per_layer[i], *(ks[i] for ks in more_k)}),
            num_heads=layer.config.num_attention_heads,
            mode=params.mode,
            with_sdc=params.needs_sdc_table,
            add_sigma=params.calib_add_sigma,
            sample_frac=params.calib_sample_frac,
            seed=seed,
            device=_execution_device(layer),
            keep_samples=keep_samples,
        )
    for layer in layers:
        layer.params = replace(params, calibrate=True)
    choose_implementation(layers)


def calibrated_tables(model: nn.Module, k_per_layer: tuple[int, ...] | None = None) -> CalibrationTables:
    """Tables from the samples so far. k_per_layer: which K, of several calibrated at once; None: params.K.

    Raises UsageError when no row was longer than K, with the lengths seen.
    """
    layers = patched_layers(model)
    params = get_params(model)
    k_per_layer = k_per_layer or params.k_per_layer(len(layers))
    tables = CalibrationTables(len(layers), layers[0].config.num_attention_heads)
    tables.meta = {
        "model": str(getattr(layers[0].config, "_name_or_path", "")),
        "revision": str(getattr(layers[0].config, "_commit_hash", "") or ""),
        "placement": params.placement,
        "mode": str(params.mode),
        "calib_tac": str(params.calib_tac),
        "calib_add_sigma": str(params.calib_add_sigma),
        "calib_sample_frac": str(params.calib_sample_frac),
    }
    for i, layer in enumerate(layers):
        calibration = layer.calibration
        if calibration is None:
            continue
        layer_k = k_per_layer[i]
        tables.k[i] = layer_k
        kinds = [
            (tables.theta, calibration.thresholds, lambda sums: sums.threshold(params.calib_add_sigma)),
            (tables.sdc, calibration.missing, lambda sums: sums.mean()),
        ]
        for target, sums_by_k, value in kinds:
            if layer_k not in sums_by_k:
                continue
            sums = sums_by_k[layer_k]
            samples = sums.count.cpu().numpy()
            if not samples.any():
                raise UsageError(
                    f"calibration found no row longer than K={layer_k} in layer {i}: the calibration "
                    "prompts had up to "
                    f"{calibration.longest} tokens. Lower K, or calibrate on longer prompts (more shots)."
                )
            target[i] = LayerTable(value(sums).cpu().numpy(), samples)
    return tables


def calibration_samples(
    model: nn.Module, k_per_layer: tuple[int, ...] | None = None
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The samples of thresholds that a calibration with keep_samples has kept so far, by layer: row lengths
    int32 `[S]` and values float32 `[S, H]`. k_per_layer: as in `calibrated_tables`."""
    layers = patched_layers(model)
    k_per_layer = k_per_layer or get_params(model).k_per_layer(len(layers))
    return {
        i: layer.calibration.kept_samples(k_per_layer[i])
        for i, layer in enumerate(layers)
        if layer.calibration is not None
    }


def use_tables(model: nn.Module, tables: CalibrationTables) -> None:
    """Hand tables to the model; the next `set_params` checks that they fit and puts them to use."""
    patched_layers(model)[0].tables = tables


def record_statistics(model: nn.Module, recorder: Recorder | None) -> None:
    """Collect counts of kept elements and V rows into `recorder` from now on; None stops it and costs
    nothing."""
    layers = patched_layers(model)
    for layer in layers:
        layer.recorder = recorder
    choose_implementation(layers)


def _execution_device(layer: TopK_LLamaAttention) -> torch.device:
    """Where the layer computes: an offloaded layer's weights rest on 'meta' until its hook brings them."""
    device = layer.q_proj.weight.device
    if device.type != "meta":
        return device
    hook = getattr(layer.q_proj, "_hf_hook", None)
    where = getattr(hook, "execution_device", None)
    return torch.device("cpu" if where is None else where)
