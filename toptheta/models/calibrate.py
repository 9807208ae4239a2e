"""Calibration of a patched model: which layers it concerns, its start and end, and its tables."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toptheta.calibration.budget import BudgetCalibration, budget_tables
from toptheta.calibration.plan import RowPlan
from toptheta.calibration.sampler import LayerCalibration, RowSampler
from toptheta.calibration.tables import CalibrationTables, LayerTable, LayerValues, no_long_row
from toptheta.methods.params import AttentionParams, LayerSpec
from toptheta.models.families import check_head, sliding_window
from toptheta.models.patch import choose_implementation, execution_device, model_state, patched_layers
from toptheta.models.sensitivity import keep_prompts, measure
from toptheta.models.tensor_parallel import of_all_heads, refuse
from toptheta.util.errors import UsageError


def calibrations(model: nn.Module) -> dict[int, RowSampler]:
    """The calibrations under way, by layer."""
    states = [layer.toptheta for layer in patched_layers(model)]
    return {i: state.calibration for i, state in enumerate(states) if state.calibration is not None}


def calibrates_in_order(model: nn.Module) -> bool:
    """Whether the calibration under way depends on the order of its prompts."""
    return bool(model_state(model).prompt_hooks) or any(one.in_order for one in calibrations(model).values())


def sparse_layers(layers: list[Any], params: AttentionParams, k_per_layer: tuple[int, ...]) -> list[int]:
    """The layers in which `params` leave any row sparse."""
    return [
        i
        for i, k in enumerate(k_per_layer)
        if params.layer(k).sparse
        and params.test_layer in (None, i)
        and not params.method.leaves_dense(i)
        # Where the window is not longer, no row sees more than K keys.
        and (not params.method.uses_k or k < (sliding_window(layers[i]) or k + 1))
    ]


def same_sparse_layers(model: nn.Module, params: AttentionParams, *ks: tuple[int, ...]) -> bool:
    """Whether the same layers are sparse with each of these K per layer: one calibration can serve them."""
    layers = patched_layers(model)
    return len({tuple(sparse_layers(layers, params, of_layers)) for of_layers in ks}) == 1


@torch.inference_mode(False)  # prompts may run in and out of it
@torch.no_grad()
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
        if params.calib_layers == "sensitivity":
            check_head(model, 'calib_layers="sensitivity"')
    if keep_samples:
        refuse(mesh, "calib_dump_samples", "leave it out")
    sparse = sparse_layers(layers, replace(params, test_layer=None), k_per_layer)
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
    shared.end_prompt_hooks()  # of a calibration before
    found = next(iter(calibrations(model).values()), None)
    if params.calib_layers == "sensitivity" and isinstance(found, BudgetCalibration):
        shared.prompt_hooks = keep_prompts(model, found)
    shared.recorder = None  # calibration prompts count in no statistic
    shared.params = replace(params, calibrate=True)
    choose_implementation(layers)


def calibrated_tables(model: nn.Module, k_per_layer: tuple[int, ...] | None = None) -> CalibrationTables:
    """Tables from the samples so far. k_per_layer: which K, if several are calibrated at once; None:
    params.K.

    Raises UsageError when no row was longer than K, with the lengths seen.
    """
    layers = patched_layers(model)
    params = model_state(model).params
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
        tables.meta["longest"] = str(max(one.longest for one in budgets.values()))  # the tables end at K + 1
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
    k_per_layer = k_per_layer or model_state(model).params.k_per_layer(len(patched_layers(model)))
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
    model_state(model).end_prompt_hooks()


@torch.no_grad()
def value_gram(layer: Any) -> Tensor:
    """`[H, D, D]` float32, W_o^T W_o of each head's part of a layer's output projection. Raises UsageError
    for weights that are offloaded."""
    projection = layer.o_proj
    weight = projection.weight
    if weight.device.type == "meta":
        raise UsageError("value_aware needs the output projections, which are offloaded: leave it out.")
    if type(projection) is not nn.Linear:  # an adapter, or a quantized weight: what it makes of unit vectors
        dtype = weight.dtype if weight.is_floating_point() else layer.config.dtype or torch.float32
        units = torch.eye(projection.in_features, dtype=dtype, device=weight.device)
        weight = (projection(units) - projection(torch.zeros_like(units[:1]))).T
    parts = weight.float().reshape(weight.shape[0], -1, layer.head_dim).transpose(0, 1)
    return parts.transpose(1, 2) @ parts
