"""The drop-in for Hugging Face's LlamaAttention: patching a model, steering it, and taking the patch off again.

`LlamaAttention.forward` is not copied: our attention function and mask function are registered with transformers under
the name 'toptheta', and the stock forward calls them with the layer's module.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from toptheta.attention import NEG_INF, LayerSpec, sparse_attention
from toptheta.calibration import LayerCalibration, nearest_lookup
from toptheta.errors import UsageError
from toptheta.params import TOP_K, TOP_THETA, AttentionParams, check
from toptheta.rows import rows_of, toptheta_mask
from toptheta.statistics import Recorder
from toptheta.tables import CalibrationTables, LayerTable, check_fit, load_tables

IMPLEMENTATION = "toptheta"


class TopK_LLamaAttention(LlamaAttention):
    """LlamaAttention that computes Top-theta (mode 0), Top-k (mode 1) or dense attention, as `set_params` says.

    theta, sdc_table: non-persistent float32 buffers `[H, L]` by row length n, looked up at min(n, L - 1).
    """

    theta: Tensor | None
    sdc_table: Tensor | None

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.spec = LayerSpec()
        self.base_implementation = "sdpa"
        self.calibration: LayerCalibration | None = None
        self.recorder: Recorder | None = None
        self.calls = 0  # of our attention function, to prove that a patched model runs it
        self.register_buffer("theta", None, persistent=False)
        self.register_buffer("sdc_table", None, persistent=False)

    @classmethod
    def replacing(cls, attention: LlamaAttention, base_implementation: str) -> "TopK_LLamaAttention":
        """A module that takes over the projections of `attention`, whatever their device, offloading or wrapping."""
        with torch.device("meta"):  # the new projections are thrown away: they must cost no memory
            new = cls(attention.config, attention.layer_idx)
        new._modules = attention._modules
        new._forward_hooks = attention._forward_hooks  # transformers' capture of output_attentions lives there
        new.train(attention.training)
        new.base_implementation = base_implementation
        object.__setattr__(new, "_original", attention)  # not a submodule: its children are ours already
        return new

    def _apply(self, fn, recurse: bool = True):
        """Move with the model, but stay float32: rounding a threshold to 16 bits would change what it keeps."""
        tables = {name: self._buffers.pop(name) for name in ("theta", "sdc_table")}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if table is not None:
                table = table.to(fn(table[:0]).device)
            self.register_buffer(name, table, persistent=False)
        return self


def toptheta_attention_forward(
    module: TopK_LLamaAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' AttentionInterface.

    query: `[B, H, Q, D]`; key, value: `[B, H_kv, N, D]`. Returns `[B, Q, H, D]` and no weights (the dense layers of an
    'eager' model return theirs).
    """
    module.calls += 1
    batch, num_heads, q_len, _ = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    spec, calibration, recorder = module.spec, module.calibration, module.recorder
    if not spec.sparse and calibration is None:
        if recorder is not None:
            rows = rows_of(attention_mask, q_len, kv_len, query.device)
            recorder.add(module.layer_idx, rows, 0, None, (batch, num_heads, num_kv_heads, kv_len))
        if module.base_implementation == "eager":
            mask = _additive(attention_mask, query, kv_len)
            return eager_attention_forward(module, query, key, value, mask, scaling, dropout, **kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)

    rows = rows_of(attention_mask, q_len, kv_len, query.device)
    for name in ("theta", "sdc_table"):
        table = getattr(module, name)
        if table is not None and table.device != query.device:  # an offloaded layer computes elsewhere than it rests
            setattr(module, name, table.to(query.device))
    if calibration is not None:
        calibration.start_call(rows.n, rows.real, batch, kv_len)
    out, counts = sparse_attention(
        query,
        key,
        value,
        rows,
        spec,
        module.scaling if scaling is None else scaling,
        module.theta,
        module.sdc_table,
        calibration,
        count=recorder is not None,
    )
    if recorder is not None:
        recorder.add(module.layer_idx, rows, spec.k, counts, (batch, num_heads, num_kv_heads, kv_len))
    return out.transpose(1, 2).contiguous(), None


def _additive(mask: Tensor | None, query: Tensor, kv_len: int) -> Tensor:
    """The mask as stock eager attention wants it: 0 where visible, the type's lowest number elsewhere."""
    if mask is None:
        q_len = query.shape[2]
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
        mask = (mask.tril() if q_len > 1 else mask)[None, None]
    if mask.dtype != torch.bool:
        return mask
    zero = torch.tensor(0.0, device=query.device, dtype=query.dtype)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


AttentionInterface.register(IMPLEMENTATION, toptheta_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, toptheta_mask)


def update_model(model: nn.Module, *_ignored, **_ignored_too) -> nn.Module:
    """Put TopK_LLamaAttention in place of every LlamaAttention of `model`, in place; also returns `model`.

    Dense until `set_params` says otherwise. Doing it twice changes nothing. Further arguments of the published project
    (`reduce_gpu_mem`, `products_dir_path`) are accepted and have no effect. Raises UsageError when the model has no
    LlamaAttention.
    """
    patched = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, LlamaAttention):
                continue
            patched += 1
            if isinstance(child, TopK_LLamaAttention):
                continue
            base = child.config._attn_implementation or "sdpa"
            new = TopK_LLamaAttention.replacing(child, "sdpa" if base == IMPLEMENTATION else base)
            hook = getattr(child, "_hf_hook", None)
            setattr(parent, name, new)
            if hook is not None:  # accelerate's, when a device map names the attention modules themselves
                from accelerate.hooks import add_hook_to_module, remove_hook_from_module

                remove_hook_from_module(child)
                add_hook_to_module(new, hook)
    if patched == 0:
        raise UsageError(
            f"{type(model).__name__} has no LlamaAttention layer, so there is nothing to patch: use a model of the "
            "Llama family (architecture LlamaForCausalLM)."
        )
    return model


def restore_model(model: nn.Module) -> nn.Module:
    """Put the stock LlamaAttention back, in place; the inverse of `update_model`. Also returns `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TopK_LLamaAttention):
                original = child._original
                original._modules, original._forward_hooks = child._modules, child._forward_hooks
                original.train(child.training)
                _set_implementation(child, child.base_implementation)
                hook = getattr(child, "_hf_hook", None)
                setattr(parent, name, original)
                if hook is not None:
                    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

                    remove_hook_from_module(child)
                    add_hook_to_module(original, hook)
    return model


def patched_layers(model: nn.Module) -> list[TopK_LLamaAttention]:
    """The model's patched attention layers in order. Raises UsageError when it has none."""
    layers = [module for module in model.modules() if isinstance(module, TopK_LLamaAttention)]
    if not layers:
        raise UsageError("the model is not patched: call update_model(model) first.")
    return sorted(layers, key=lambda layer: layer.layer_idx)


def get_params(model: nn.Module) -> AttentionParams:
    """The parameters that the model computes with now."""
    return getattr(patched_layers(model)[0], "params", AttentionParams())


def set_params(model: nn.Module, **params) -> None:
    """Steer a patched model; parameters that are not given stay as they are (fields of AttentionParams).

    calibrate=True starts calibration of what the other parameters need; the prompts then run through the model are its
    samples; calibrate=False ends it and puts the tables to use. calib_load_path loads tables from a folder instead.
    Raises UsageError for an unknown name, a combination that makes no sense, or tables that are missing or do not fit.
    """
    known = [field.name for field in fields(AttentionParams)]
    for name in params:
        if name not in known:
            raise UsageError(f"set_params knows no parameter {name!r}: choose from {', '.join(known)}.")
    layers = patched_layers(model)
    old = get_params(model)
    new = check(replace(old, **({"calib_load_path": ""} | params)))
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
    tables: CalibrationTables | None = getattr(layers[0], "tables", None)
    if not new.calibrate:
        for layer in layers:
            layer.calibration = None
        _install(layers, new, k_per_layer, tables)
    for layer in layers:
        layer.params = new
    _choose_implementation(layers)


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
        if needed and tables is None:
            raise UsageError(
                f"{'mode 0' if kind == 'theta' else 'sdc offline-calibrated'} needs calibrated tables: call set_params "
                "with calibrate=True, run some prompts, then calibrate=False; or load them with calib_load_path."
            )
        if needed:
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
        device = layer.q_proj.weight.device
        device = torch.device("cpu") if device.type == "meta" else device  # offloaded: the first call moves them
        if params.needs_thresholds:
            layer.theta = torch.from_numpy(nearest_lookup(tables.theta[i].values, k_per_layer[i], NEG_INF)).to(device)
        if params.needs_sdc_table:
            layer.sdc_table = torch.from_numpy(nearest_lookup(tables.sdc[i].values, k_per_layer[i], 0.0)).to(device)


def begin_calibration(model: nn.Module, params: AttentionParams, ks: list[int] | None = None, seed: int = 0) -> None:
    """Start calibrating what `params` will need. ks: several K to serve in one pass (without calib_tac), else params.K."""
    layers = patched_layers(model)
    k_per_layer = params.k_per_layer(len(layers))
    if not params.needs_calibration:
        raise UsageError("calibrate=True has nothing to calibrate: it serves mode 0 and sdc offline-calibrated.")
    if ks is not None and len(ks) > 1 and params.calib_tac:
        raise UsageError("calib_tac computes with one K, so it calibrates one K at a time.")
    sparse = _sparse_layers(replace(params, test_layer=None), k_per_layer)
    for i, layer in enumerate(layers):
        layer.theta = layer.sdc_table = layer.calibration = None
        layer.spec = LayerSpec()
        if i not in sparse:
            continue
        tac = params.calib_tac and params.mode == TOP_THETA
        # Top-k's weights lack mass only when they are dropped after the softmax: only there VMC has something to do.
        layer.spec = LayerSpec(
            mode=TOP_K if tac else 3,
            placement=params.placement,
            k=k_per_layer[i],
            vmc=params.vmc and tac and params.placement == "post-softmax",
        )
        device = layer.q_proj.weight.device
        layer.calibration = LayerCalibration(
            ks=ks or [k_per_layer[i]],
            num_heads=layer.config.num_attention_heads,
            mode=params.mode,
            with_sdc=params.needs_sdc_table,
            add_sigma=params.calib_add_sigma,
            sample_frac=params.calib_sample_frac,
            seed=seed,
            device=_execution_device(layer, device),
        )
    for layer in layers:
        layer.params = replace(params, calibrate=True)
    _choose_implementation(layers)


def calibrated_tables(model: nn.Module, k: int | None = None) -> CalibrationTables:
    """Tables from the samples so far. k: which of several K calibrated at once.

    Raises UsageError when no row was longer than K, with the lengths seen.
    """
    layers = patched_layers(model)
    params = get_params(model)
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
        layer_k = k if k is not None else calibration.ks[0]
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
                    f"calibration found no row longer than K={layer_k} in layer {i}: the calibration prompts had up to "
                    f"{calibration.longest} tokens. Lower K, or calibrate on longer prompts (more shots)."
                )
            target[i] = LayerTable(value(sums).cpu().numpy(), samples)
    return tables


def use_tables(model: nn.Module, tables: CalibrationTables) -> None:
    """Hand tables to the model; the next `set_params` checks that they fit and puts them to use."""
    patched_layers(model)[0].tables = tables


def record_statistics(model: nn.Module, recorder: Recorder | None) -> None:
    """Collect counts of kept elements and V rows into `recorder` from now on; None stops it and costs nothing."""
    layers = patched_layers(model)
    for layer in layers:
        layer.recorder = recorder
    _choose_implementation(layers)


def _choose_implementation(layers: list[TopK_LLamaAttention]) -> None:
    """Plainly dense models run the stock attention by its own name; all others run ours."""
    for layer in layers:
        ours = any(
            other.spec.sparse or other.calibration is not None or other.recorder is not None for other in layers
        )
        _set_implementation(layer, IMPLEMENTATION if ours else layer.base_implementation)


def _set_implementation(layer: TopK_LLamaAttention, name: str) -> None:
    # The internal name: the public setter would also rewrite the configs of submodels.
    layer.config._attn_implementation_internal = name


def _execution_device(layer: TopK_LLamaAttention, device: torch.device) -> torch.device:
    """Where the layer computes: an offloaded layer's weights rest on 'meta' until its hook brings them."""
    if device.type != "meta":
        return device
    hook = getattr(layer.q_proj, "_hf_hook", None)
    where = getattr(hook, "execution_device", None)
    return torch.device("cpu" if where is None else where)


def model_device(model: PreTrainedModel) -> torch.device:
    """The device that inputs go to."""
    return model.get_input_embeddings().weight.device if model.device.type == "meta" else model.device
