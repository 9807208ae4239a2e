"""Control of a patched model: parameters, look-up tables, statistics. Calibration: calibrate.py."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toptheta.calibration.artefact import SHAPING
from toptheta.calibration.interpolation import MAX_FIT_LENGTH, lookup_table
from toptheta.calibration.tables import (
    CalibrationTables,
    LayerTable,
    check_fit,
    load_tables,
)
from toptheta.methods.base import NEG_INF, ValueNorms, option_value
from toptheta.methods.params import AttentionParams, LayerSpec, check, expand_k
from toptheta.models.calibrate import (
    begin_calibration,
    calibrated_tables,
    calibrations,
    end_calibration,
    sparse_layers,
    value_gram,
)
from toptheta.models.patch import choose_implementation, execution_device, model_state, patched_layers
from toptheta.models.recorder import Recorder
from toptheta.models.tensor_parallel import refuse
from toptheta.util.errors import UsageError
from toptheta.util.options import plain

# The options of a calibration, as they are for tables that were loaded
UNSHAPED = {name: getattr(AttentionParams(), name) for name in SHAPING}


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


def set_params(model: nn.Module, **params) -> None:
    """Set the parameters of a patched model; parameters that are not given keep their values.

    params: fields of AttentionParams, and `mode` and `capk` of the published project; method: a name with
    options ('streaming_llm:sinks=8') or an object of toptheta/methods. K may be a number, a list with one for
    each layer, or {layer: k}, where the other layers keep theirs. calibrate=True starts a calibration of
    the tables that the other parameters need, on all prompts that then run through the model; calibrate=False
    ends it and uses the tables. calib_load_path loads tables from a folder instead. Raises UsageError for an
    unknown name, a value of another type, an invalid combination, tables that are missing or do not match, an
    option that would need another calibration, or, once prompts were sampled, a call that neither ends the
    calibration nor starts another.
    """
    change_params(model, get_params(model), params)


def change_params(model: nn.Module, old: AttentionParams, given: dict[str, Any]) -> None:
    """`set_params` with the parameters `given`; those that are not given have their values in `old`."""
    if "calibrate" not in given and any(one.longest for one in calibrations(model).values()):
        raise UsageError(
            "a calibration is under way, whose samples this call would discard: first end it with "
            "calibrate=False, or add calibrate=True to start again."
        )
    if isinstance(given.get("K"), Mapping):
        num_layers, k = len(patched_layers(model)), plain(given["K"])
        expand_k(k, num_layers)  # checks it
        given = given | {"K": dict(enumerate(old.k_per_layer(num_layers))) | k}
    implied: dict[str, Any] = {"calib_load_path": ""}
    if given.get("calib_load_path"):
        implied = UNSHAPED | {"calibrate": False}  # left over from a calibration, as below
    method = old.changed({name: given[name] for name in ("method", "mode") if name in given}).method
    if not getattr(method, "needs_thresholds", True):  # what is no method is refused below
        implied["calib_tac"] = False  # left over from a calibration; given in this call, it is an error
    new = check(old.changed(implied | given))
    if new.calibrate and "calibrate" not in given and not new.needs_calibration:
        raise UsageError(
            "a calibration is under way, which these parameters do not need: add calibrate=False to end it."
        )
    if new.needs_calibration and not new.calibrate and not new.calib_load_path:
        _check_shaping(new, old, given, model_state(model).tables)
    use_params(model, new)


def _check_shaping(
    new: AttentionParams, old: AttentionParams, given: dict[str, Any], tables: CalibrationTables | None
) -> None:
    """Raise UsageError for a given option of a calibration that the tables in use, or those of the
    calibration that this call ends, were not calibrated with."""
    if tables is None and not old.calibrate:
        return  # which is refused
    meta = {} if tables is None or old.calibrate else tables.meta
    for name in (one for one in SHAPING if one in given):
        value, in_force = getattr(new, name), getattr(old, name)
        made_with = option_value(name, UNSHAPED[name], meta[name]) if name in meta else in_force
        if value not in (in_force, made_with):
            raise UsageError(
                f"{name} {value} takes effect when calibrating, and the tables were calibrated with "
                f"{made_with}: leave it out, or add calibrate=True to calibrate again."
            )


def tables_in(folder: str, config: Any, num_layers: int, name: str = "calib_load_path") -> CalibrationTables:
    """The tables in a folder, for a model of this config. Raises UsageError as `load_tables`."""
    longest = max(config.max_position_embeddings, MAX_FIT_LENGTH)
    return load_tables(folder, num_layers, config.num_attention_heads, name, longest)


def use_params(model: nn.Module, params: AttentionParams) -> None:
    """`set_params` with all parameters at once. A UsageError leaves the model as it was, and a calibration
    under way."""
    check(params)
    layers = patched_layers(model)
    shared = model_state(model)
    k_per_layer = params.k_per_layer(len(layers))
    if params.test_layer not in (None, *range(len(layers))):
        raise UsageError(
            f"test_layer is {params.test_layer!r}, but the model has layers 0 to {len(layers) - 1}."
        )
    tables = shared.tables
    if params.calibrate:
        begin_calibration(model, params)
    else:
        if params.calib_load_path:
            tables = tables_in(params.calib_load_path, layers[0].config, len(layers))
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


def _install(
    layers: list[Any],
    params: AttentionParams,
    k_per_layer: tuple[int, ...],
    tables: CalibrationTables | None,
) -> None:
    """Give every layer its spec and look-up tables. Raises UsageError, without any change, if tables do not
    fit."""
    sparse = sparse_layers(layers, params, k_per_layer)
    check_tables(sparse, params, k_per_layer, tables)
    values = _value_norms(layers, sparse, tables) if params.method.needs_values else {}
    specs = [params.layer(k) if i in sparse else LayerSpec() for i, k in enumerate(k_per_layer)]
    thetas, sdc_tables = dict[int, Tensor](), dict[int, Tensor]()
    for i in sparse if tables else ():
        assert tables is not None
        k, layer = specs[i].k, layers[i]
        if params.needs_thresholds:
            within = (0.0, 1.0) if params.placement == "post-softmax" else (-np.inf, np.inf)
            thetas[i] = _lookup(layer, tables.theta[i], k, params, NEG_INF, within)
        if params.needs_sdc_table:
            sdc_tables[i] = _lookup(layer, tables.sdc[i], k, params, 0.0, (0.0, np.inf))
    for i, layer in enumerate(layers):
        state = layer.toptheta
        state.spec, state.values = specs[i], values.get(i)
        _ = state.spec.kernel  # now: torch.compile cannot trace the first use of a cached_property
        state.theta, state.sdc_table = thetas.get(i), sdc_tables.get(i)


def check_tables(
    sparse: list[int],
    params: AttentionParams,
    k_per_layer: tuple[int, ...],
    tables: CalibrationTables | None,
) -> None:
    """Raise UsageError unless `tables` are what `params` need in the layers `sparse`."""
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
        weighed = "value_aware" in tables.meta.get("method", "")
        if kind == "theta" and weighed and not params.method.needs_values:
            raise UsageError(
                "the thresholds were calibrated with value_aware, for weights times value norms: use "
                "value_aware, or calibrate again."
            )
    if params.method.needs_values and tables is not None and set(sparse) - tables.values.keys():
        raise UsageError(
            "value_aware needs thresholds that were calibrated with it, which th.txt alone does not "
            "contain: calibrate with it, or load a folder with the calibration.safetensors of such a run."
        )


def _value_norms(
    layers: list[Any], sparse: Sequence[int], tables: CalibrationTables | None
) -> dict[int, ValueNorms]:
    """By layer."""
    found = {}
    for i in sparse if tables is not None else ():
        assert tables is not None
        layer = layers[i]
        refuse(layer.toptheta.mesh, "value_aware", "use thresholds without it")
        parts = (torch.from_numpy(part) for part in (tables.values[i].mean, tables.values[i].scale))
        found[i] = ValueNorms(value_gram(layer), *(part.to(execution_device(layer)) for part in parts))
    return found


def _lookup(
    layer: Any,
    table: LayerTable,
    k: int,
    params: AttentionParams,
    below: float,
    within: tuple[float, float],
) -> Tensor:
    """`[H, L]` float32 by row length, on the layer's device."""
    table_of_all = lookup_table(
        table.values,
        table.samples,
        k,
        below,
        params.calib_interp,
        params.calib_smooth,
        layer.config.max_position_embeddings,
        within,
    )
    return torch.from_numpy(table_of_all[layer.toptheta.heads]).to(execution_device(layer))


def record_statistics(model: nn.Module, recorder: Recorder | None) -> None:
    """Collect counts of kept elements and V rows in `recorder` from now on; None stops counting."""
    if recorder is not None:
        refuse(patched_layers(model)[0].toptheta.mesh, "record_statistics", "measure in one process")
    model_state(model).recorder = recorder
    choose_implementation(patched_layers(model))
