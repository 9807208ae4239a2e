"""Control of a patched model: parameters, calibration, look-up tables, statistics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toptheta.calibration.budget import BudgetCalibration, budget_tables
from toptheta.calibration.interpolation import MAX_FIT_LENGTH, lookup_table
from toptheta.calibration.plan import RowPlan
from toptheta.calibration.sampler import LayerCalibration, RowSampler
from toptheta.calibration.tables import (
    CalibrationTables,
    LayerTable,
    LayerValues,
    check_fit,
    load_tables,
    no_long_row,
)
from toptheta.methods.base import NEG_INF, ValueNorms
from toptheta.methods.params import AttentionParams, LayerSpec, check
from toptheta.models.families import sliding_window
from toptheta.models.patch import choose_implementation, execution_device, model_state, patched_layers
from toptheta.models.recorder import Recorder
from toptheta.models.sensitivity import keep_prompts, measure
from toptheta.models.tensor_parallel import of_all_heads, refuse
from toptheta.util.errors import UsageError


def get_params(model: nn.Module) -> AttentionParams:
    """The current parameters of the model."""
    return model_state(model).params


def tables_of(model: nn.Module) -> CalibrationTables | None:
    """The calibrated tables in use, if any."""
    return model_state(model).tables


def recorder_of(model: nn.Module) -> Recorder | None:
    """The recorder that collects statistics, if any."""
    return model_state(model).recorder


@contextmanager
def reading_prompt(model: nn.Module) -> Iterator[None]:
    """Within the context all rows belong to a prompt; otherwise a last chunk of one row would look like a
    decode step. `end_prompt` ends it earlier. Contexts may be nested."""
    shared = model_state(model)
    outer, shared.in_prompt = shared.in_prompt, True
    try:
        yield
    finally:
        shared.in_prompt = outer


@contextmanager
def reading_steps(model: nn.Module) -> Iterator[None]:
    """Within the context all rows are decode steps: for a known text, many can be computed in one call."""
    shared = model_state(model)
    outer, shared.in_steps = shared.in_steps, True
    try:
        yield
    finally:
        shared.in_steps = outer


def take_dense_calls(model: nn.Module) -> tuple[int, int]:
    """The number of calls of sparse layers that were computed dense because of `when_slower`, and of all
    their calls, since the last time this was called. Calls of a compiled model are not counted."""
    shared = model_state(model)
    found = shared.dense_calls, shared.sparse_calls
    shared.dense_calls = shared.sparse_calls = 0
    return found


def end_prompt(model: nn.Module) -> None:
    """From now on a single row is a decode step."""
    model_state(model).in_prompt = False


def calibrations(model: nn.Module) -> dict[int, RowSampler]:
    """The calibrations under way, by layer."""
    states = [layer.toptheta for layer in patched_layers(model)]
    return {i: state.calibration for i, state in enumerate(states) if state.calibration is not None}


def calibrates_in_order(model: nn.Module) -> bool:
    """Whether the calibration under way depends on the order of its prompts."""
    return model_state(model).prompt_hook is not None or any(
        one.in_order for one in calibrations(model).values()
    )


def set_params(model: nn.Module, **params) -> None:
    """Set the parameters of a patched model; parameters that are not given keep their values.

    params: fields of AttentionParams, and `mode` and `capk` of the published project; method: a name with
    options ('streaming_llm:sinks=8') or an object of toptheta/methods. calibrate=True starts a calibration of
    the tables that the other parameters need, on all prompts that then run through the model; calibrate=False
    ends it and uses the tables. calib_load_path loads tables from a folder instead. Raises UsageError for an
    unknown name, an invalid combination, or tables that are missing or do not match.
    """
    old = get_params(model)
    implied: dict[str, Any] = {"calib_load_path": ""}
    if not old.changed(
        {name: params[name] for name in ("method", "mode") if name in params}
    ).method.needs_thresholds:
        implied["calib_tac"] = False  # left over from a calibration; given in this call, it is an error
    use_params(model, old.changed(implied | params))


def use_params(model: nn.Module, params: AttentionParams) -> None:
    """`set_params` with all parameters at once. A UsageError leaves the model as it was, and a calibration
    under way."""
    check(params)
    layers = patched_layers(model)
    shared = model_state(model)
    k_per_layer = params.k_per_layer(len(layers))
    if params.test_layer is not None and not 0 <= params.test_layer < len(layers):
        raise UsageError(
            f"test_layer is {params.test_layer}, but the model has layers 0 to {len(layers) - 1}."
        )
    tables = shared.tables
    if params.calibrate:
        begin_calibration(model, params)
    else:
        if params.calib_load_path:
            config = layers[0].config
            sizes = len(layers), config.num_attention_heads
            longest = max(config.max_position_embeddings, MAX_FIT_LENGTH)
            tables = load_tables(params.calib_load_path, *sizes, max_length=longest)
        elif calibrations(model):
            try:
                tables = calibrated_tables(model)
            except UsageError:
                if params.needs_calibration:
                    raise
        _install(layers, params, k_per_layer, tables)
        shared.tables = tables
        end_calibration(model)
    shared.params = params
    choose_implementation(layers)


def _sparse_layers(layers: list[Any], params: AttentionParams, k_per_layer: tuple[int, ...]) -> list[int]:
    return [
        i
        for i, k in enumerate(k_per_layer)
        if params.layer(k).sparse
        and params.test_layer in (None, i)
        and not params.method.leaves_dense(i)
        and k < (sliding_window(layers[i]) or k + 1)  # else no row sees more than K keys
    ]


def same_sparse_layers(model: nn.Module, params: AttentionParams, *ks: tuple[int, ...]) -> bool:
    """Whether the same layers are sparse with each of these K per layer: one calibration can serve them."""
    layers = patched_layers(model)
    return len({tuple(_sparse_layers(layers, params, of_layers)) for of_layers in ks}) == 1


def _install(
    layers: list[Any],
    params: AttentionParams,
    k_per_layer: tuple[int, ...],
    tables: CalibrationTables | None,
) -> None:
    """Give every layer its spec and look-up tables. Raises UsageError, without any change, if tables do not
    fit."""
    sparse = _sparse_layers(layers, params, k_per_layer)
    for kind, needed in (("theta", params.needs_thresholds), ("sdc", params.needs_sdc_table)):
        if not needed:
            continue
        if tables is None:
            raise UsageError(
                f"{'mode 0' if kind == 'theta' else 'sdc offline-calibrated'} needs calibrated tables: call "
                "set_params with calibrate=True, run some prompts, then calibrate=False; or load them with "
                "calib_load_path."
            )
        check_fit(tables, kind, k_per_layer, params.placement, sparse, params.calib_to)
    values = _value_norms(layers, sparse, tables) if params.method.needs_values else {}
    for i, layer in enumerate(layers):
        state = layer.toptheta
        state.theta = state.sdc_table = state.values = None
        if i not in sparse:
            state.spec = LayerSpec()
            continue
        state.spec = params.layer(k_per_layer[i])
        if tables is not None and params.needs_thresholds:
            within = (0.0, 1.0) if params.placement == "post-softmax" else (-np.inf, np.inf)
            state.theta = _lookup(layer, tables.theta[i], params, NEG_INF, within)
        state.values = values.get(i)
        if tables is not None and params.needs_sdc_table:
            state.sdc_table = _lookup(layer, tables.sdc[i], params, 0.0, (0.0, np.inf))


def _value_norms(
    layers: list[Any], sparse: Sequence[int], tables: CalibrationTables | None
) -> dict[int, ValueNorms]:
    """By layer. Raises UsageError for tables without them."""
    found = {}
    for i in sparse if tables is not None else ():
        assert tables is not None
        layer = layers[i]
        refuse(layer.toptheta.mesh, "value_aware", "use thresholds without it")
        if i not in tables.values:
            raise UsageError(
                "value_aware needs thresholds that were calibrated with it, which th.txt alone does not "
                "contain: calibrate with it, or load a folder with the calibration.safetensors of such a run."
            )
        parts = (torch.from_numpy(part) for part in (tables.values[i].mean, tables.values[i].scale))
        found[i] = ValueNorms(value_gram(layer), *(part.to(execution_device(layer)) for part in parts))
    return found


def _lookup(
    layer: Any,
    table: LayerTable,
    params: AttentionParams,
    below: float,
    within: tuple[float, float],
) -> Tensor:
    """`[H, L]` float32 by row length, on the layer's device."""
    table_of_all = lookup_table(
        table.values,
        table.samples,
        layer.toptheta.spec.k,
        below,
        params.calib_interp,
        params.calib_smooth,
        layer.config.max_position_embeddings,
        within,
    )
    return torch.from_numpy(table_of_all[layer.toptheta.heads]).to(execution_device(layer))


def begin_calibration(
    model: nn.Module,
    params: AttentionParams,
    more_k: Sequence[tuple[int, ...]] = (),
    seed: int = 0,
    keep_samples: bool = False,
) -> None:
    """Start calibrating the tables that `params` need. more_k: K per layer of other cells to calibrate in the
    same pass (without calib_tac), in addition to params.K. keep_samples: also keep every threshold sample,
    see `calibration_samples`."""
    layers = patched_layers(model)
    k_per_layer = params.k_per_layer(len(layers))
    if not params.needs_calibration:
        raise UsageError(
            "calibrate=True has nothing to calibrate: use it with mode 0 or sdc offline-calibrated."
        )
    if more_k and params.calib_tac:
        raise UsageError("calib_tac computes attention with one K, so it calibrates one K at a time.")
    if keep_samples and params.calib_to == "budget":
        raise UsageError("calib_to budget keeps no threshold samples: leave calib_dump_samples out.")
    mesh = layers[0].toptheta.mesh
    if params.calib_to == "budget":
        refuse(mesh, "calib_to budget", "calibrate in one process, and load the folder with calib_load_path")
    if keep_samples:
        refuse(mesh, "calib_dump_samples", "leave it out")
    sparse = _sparse_layers(layers, replace(params, test_layer=None), k_per_layer)
    computes = params.method.while_calibrating(params.calib_tac)
    plan = None
    if params.calib_sample_frac < 1.0:
        plan = RowPlan(params.calib_sample_frac, seed, layers[0].config.max_position_embeddings)
    budget = params.calib_to == "budget" and params.needs_thresholds
    grams = {i: value_gram(layers[i]) for i in sparse} if budget and params.method.needs_values else {}
    for i, layer in enumerate(layers):
        state = layer.toptheta
        state.theta = state.sdc_table = state.calibration = None
        state.spec = LayerSpec()
        if i not in sparse:
            continue
        # Top-k's weights lack mass only when they are dropped after the softmax: only there VMC has something
        # to do.
        vmc = params.vmc and not computes.is_dense and params.placement == "post-softmax"
        state.spec = LayerSpec(computes, params.placement, k_per_layer[i], vmc=vmc)
        ks = sorted({k_per_layer[i], *(ks[i] for ks in more_k)})
        num_heads, device = state.heads.stop - state.heads.start, execution_device(layer)
        if budget:
            sampled = params.calib_sample_frac
            state.calibration = BudgetCalibration(ks, num_heads, sampled, seed, device, grams.get(i))
            state.calibration.plan, state.calibration.window = plan, sliding_window(layer)
            continue
        state.calibration = LayerCalibration(
            ks=ks,
            num_heads=num_heads,
            method=params.method,
            placement=params.placement,
            with_sdc=params.needs_sdc_table,
            add_sigma=params.calib_add_sigma,
            sample_frac=params.calib_sample_frac,
            seed=seed,
            device=device,
            keep_samples=keep_samples,
        )
        state.calibration.plan, state.calibration.window = plan, sliding_window(layer)
    shared = model_state(model)
    shared.end_prompt_hook()  # of a calibration before
    found = next(iter(calibrations(model).values()), None)
    if params.calib_layers == "sensitivity" and isinstance(found, BudgetCalibration):
        shared.prompt_hook = keep_prompts(model, found)
    shared.recorder = None  # calibration prompts count in no statistic
    shared.params = replace(params, calibrate=True)
    choose_implementation(layers)


def calibrated_tables(model: nn.Module, k_per_layer: tuple[int, ...] | None = None) -> CalibrationTables:
    """Tables from the samples so far. k_per_layer: which K, if several are calibrated at once; None:
    params.K.

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
        "method": params.method.spec,
        "mode": str(params.method.mode),
        "calib_to": params.calib_to,
        "calib_layers": params.calib_layers,
        "calib_tac": str(params.calib_tac),
        "calib_add_sigma": str(params.calib_add_sigma),
        "calib_sample_frac": str(params.calib_sample_frac),
    }
    under_way = calibrations(model)
    budgets = {i: found for i, found in under_way.items() if isinstance(found, BudgetCalibration)}
    if budgets:
        damage = None
        if params.calib_layers == "sensitivity":
            prompts = next((found.prompts for found in budgets.values() if found.prompts), [])
            if not prompts:
                raise UsageError(
                    f"calib_layers sensitivity needs a prompt of more than {2 * min(k_per_layer)} tokens: "
                    "lower K, or calibrate on longer prompts."
                )
            damage = partial(measure, model, list(prompts), params)
        tables.theta = budget_tables(budgets, k_per_layer, damage)
        tables.k = {i: k_per_layer[i] for i in budgets}
        tables.values = {
            i: LayerValues(found.values.mean.cpu().numpy(), found.values.scale.cpu().numpy())
            for i, found in budgets.items()
            if found.values is not None
        }
    for i, calibration in under_way.items():
        if not isinstance(calibration, LayerCalibration):
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
                raise no_long_row(layer_k, i, calibration.longest)
            target[i] = of_all_heads(LayerTable(value(sums).cpu().numpy(), samples), layers[i].toptheta.mesh)
    return tables


def calibration_samples(
    model: nn.Module, k_per_layer: tuple[int, ...] | None = None
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The threshold samples of a calibration with keep_samples so far, by layer: row lengths int32 `[S]` and
    values float32 `[S, H]`. k_per_layer: as in `calibrated_tables`."""
    k_per_layer = k_per_layer or get_params(model).k_per_layer(len(patched_layers(model)))
    found = calibrations(model).items()
    return {i: one.kept_samples(k_per_layer[i]) for i, one in found if isinstance(one, LayerCalibration)}


def use_tables(model: nn.Module, tables: CalibrationTables) -> None:
    """Give tables to the model, and end any calibration; the next `set_params` checks that they match and
    uses them."""
    model_state(model).tables = tables
    end_calibration(model)


def end_calibration(model: nn.Module) -> None:
    """End a calibration under way, without its tables."""
    for layer in patched_layers(model):
        layer.toptheta.calibration = None
    model_state(model).end_prompt_hook()


def record_statistics(model: nn.Module, recorder: Recorder | None) -> None:
    """Collect counts of kept elements and V rows in `recorder` from now on; None stops counting."""
    if recorder is not None:
        refuse(patched_layers(model)[0].toptheta.mesh, "record_statistics", "measure in one process")
    model_state(model).recorder = recorder
    choose_implementation(patched_layers(model))


def value_gram(layer: Any) -> Tensor:
    """`[H, D, D]` float32, W_o^T W_o of each head's part of a layer's output projection. Raises UsageError
    for weights that are offloaded."""
    weight = layer.o_proj.weight
    if weight.device.type == "meta":
        raise UsageError("value_aware needs the output projections, which are offloaded: leave it out.")
    parts = weight.detach().float().view(weight.shape[0], -1, layer.head_dim).transpose(0, 1)
    return parts.transpose(1, 2) @ parts
