"""The drop-in for Hugging Face's LlamaAttention: patching a model, steering it, and taking the patch off
again.

`LlamaAttention.forward` is not copied: our attention function and mask function are registered with
transformers under the name 'toptheta', and the stock forward calls them with the layer's module.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from toptheta.attention.reference import LayerSpec
from toptheta.attention.rows import rows_of, toptheta_mask
from toptheta.calibration.sampler import LayerCalibration
from toptheta.calibration.tables import CalibrationTables
from toptheta.kernels import registry as kernels
from toptheta.methods.params import AttentionParams
from toptheta.models.cache import TopThetaLayer, beside
from toptheta.models.recorder import Recorder
from toptheta.models.value_sum import VSum
from toptheta.util.errors import UsageError

IMPLEMENTATION = "toptheta"


class TopK_LLamaAttention(LlamaAttention):
    """LlamaAttention that computes Top-theta (mode 0), Top-k (mode 1) or dense attention, as `set_params`
    says.

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
        self.beside: VSum | TopThetaLayer | None = None  # what the cache keeps beside K and V; during a call
        self.params = AttentionParams()  # the whole model's, as set_params left them
        self.tables: CalibrationTables | None = None  # likewise; the first layer holds them
        self.calls = 0  # of our attention function, to prove that a patched model runs it
        self.register_buffer("theta", None, persistent=False)
        self.register_buffer("sdc_table", None, persistent=False)

    @classmethod
    def replacing(cls, attention: LlamaAttention, base_implementation: str) -> "TopK_LLamaAttention":
        """A module that takes over the projections of `attention`, whatever their device, offloading or
        wrapping."""
        with torch.device("meta"):  # the new projections are thrown away: they must cost no memory
            new = cls(attention.config, attention.layer_idx)
        new._modules = attention._modules
        new._forward_hooks = (
            attention._forward_hooks
        )  # transformers' capture of output_attentions lives there
        new.train(attention.training)
        new.base_implementation = base_implementation
        object.__setattr__(new, "_original", attention)  # not a submodule: its children are ours already
        return new

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As LlamaAttention's; the cache is looked at before it is updated, see value_sum.py."""
        vmc = self.spec.sparse and self.spec.vmc and self.calibration is None
        self.beside = beside(past_key_values, self.layer_idx, vmc)
        try:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        finally:
            self.beside = None  # the cache must not outlive its owner

    def _apply(self, fn, recurse: bool = True):
        """Move with the model, but stay float32: rounding a threshold to 16 bits would change what it
        keeps."""
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

    query: `[B, H, Q, D]`; key, value: `[B, H_kv, N, D]`. Returns `[B, Q, H, D]` and no weights (the dense
    layers of an 'eager' model return theirs).
    """
    if not torch.compiler.is_compiling():  # a number that changes would compile every call anew
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
        if (
            table is not None and table.device != query.device
        ):  # an offloaded layer computes elsewhere than it rests
            setattr(module, name, table.to(query.device))
    scale = module.scaling if scaling is None else scaling
    if calibration is not None:
        out = kernels.calibrate(query, key, value, rows, spec, scale, calibration)
        return out.transpose(1, 2).contiguous(), None
    kept_beside = module.beside
    v_sum = kept_beside.at(value, rows) if kept_beside is not None and spec.vmc else None
    out, counts = kernels.attend(
        query,
        key,
        value,
        rows,
        spec,
        scale,
        module.theta,
        module.sdc_table,
        count=recorder is not None,
        v_sum=v_sum,
        int8=None if kept_beside is None else kept_beside.int8,
        count_rows=recorder is not None and recorder.effective_k and q_len > 1,
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

    Dense until `set_params` says otherwise. Doing it twice changes nothing. Further arguments of the
    published project (`reduce_gpu_mem`, `products_dir_path`) are accepted and have no effect. Raises
    UsageError when the model has no LlamaAttention.
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
            f"{type(model).__name__} has no LlamaAttention layer, so there is nothing to patch: use a "
            "model of the "
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


def choose_implementation(layers: list[TopK_LLamaAttention]) -> None:
    """Plainly dense models run the stock attention by its own name; all others run ours."""
    for layer in layers:
        ours = any(
            other.spec.sparse or other.calibration is not None or other.recorder is not None
            for other in layers
        )
        _set_implementation(layer, IMPLEMENTATION if ours else layer.base_implementation)


def _set_implementation(layer: TopK_LLamaAttention, name: str) -> None:
    # The internal name: the public setter would also rewrite the configs of submodels.
    layer.config._attn_implementation_internal = name


def model_device(model: PreTrainedModel) -> torch.device:
    """The device that inputs go to."""
    return model.get_input_embeddings().weight.device if model.device.type == "meta" else model.device
