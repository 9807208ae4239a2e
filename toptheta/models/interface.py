"""Our attention and mask functions, as transformers calls them. Registered under the name 'top_theta'."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from toptheta.attention.call import AttentionCall, Counts
from toptheta.attention.kv_bytes import dense_bytes, kv_bytes, price_of
from toptheta.attention.missed import missed_keys
from toptheta.attention.rows import Rows, remember, rows_of
from toptheta.kernels import registry
from toptheta.kernels.dense import dense_attention
from toptheta.methods.params import LayerSpec
from toptheta.models.families import MODEL_TYPES, check_arguments, eager_of, family_of
from toptheta.models.layer_state import LayerState
from toptheta.models.recorder import Recorder
from toptheta.models.when_slower import SCORES, is_dense
from toptheta.util.errors import UsageError

IMPLEMENTATION = "top_theta"


def toptheta_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' AttentionInterface, for all supported families.

    query: `[B, H, Q, D]`; key, value: `[B, H_kv, N, D]`; softcap, and s_aux, the sinks: see AttentionCall.
    Returns `[B, Q, H, D]` and no weights (the dense layers of an 'eager' model do return weights). A module
    without a LayerState is dense. Raises UsageError for a call that a sparse layer cannot compute, and for a
    module of another family.
    """
    special: dict[str, Any] = {"softcap": softcap, "s_aux": s_aux}
    state: LayerState | None = getattr(module, "toptheta", None)
    if state is None:
        if not torch.compiler.is_compiling() and family_of(module) is None:
            raise UsageError(
                f"{type(module).__name__} is an attention layer of no supported family: use another "
                f"attn_implementation, or a model of {', '.join(MODEL_TYPES)}."
            )
        return _dense(module, "sdpa", query, key, value, attention_mask, scaling, dropout, special | kwargs)
    state.now.due = False
    if not torch.compiler.is_compiling():  # a number that changes would compile every call anew
        state.now.calls += 1
    q_len, kv_len = query.shape[2], key.shape[2]
    spec, recorder = state.spec, state.recorder
    if not spec.sparse and state.calibration is None:
        if recorder is not None:
            rows = rows_of(attention_mask, q_len, kv_len, query.device)
            decode = state.shared.is_decode(q_len, kv_len, rows.first)
            _record_dense(recorder, state.layer_idx, rows, query, key, decode)
        return _dense(
            module, state.base, query, key, value, attention_mask, scaling, dropout, special | kwargs
        )

    check_arguments(kwargs)
    if kwargs.get("output_attentions") and not torch.compiler.is_compiling():
        _warn_of_weights()
    if dropout > 0.0:
        raise UsageError(
            f"attention_dropout is {dropout} while training, which sparse attention does not support: load "
            "the model with attention_dropout=0.0, or call model.eval()."
        )
    rows = rows_of(attention_mask, q_len, kv_len, query.device)
    scale: float = module.scaling if scaling is None else scaling  # type: ignore[assignment]
    if state.shared.extremes is not None:
        new = key[:, :, -q_len:]
        state.shared.extremes.append((scale, *query.detach().aminmax(), *new.detach().aminmax()))
    call = AttentionCall(query, key, value, rows, spec, scale, softcap=softcap, sinks=s_aux)
    if state.calibration is not None:
        out = registry.calibrate(call, state.calibration)
        return out.transpose(1, 2).contiguous(), None
    call.decode = decode = state.shared.is_decode(q_len, kv_len, rows.first)
    state.complete(call)
    way = state.way(call)
    if way is not None and is_dense(way):
        if recorder is not None:
            _record_dense(recorder, state.layer_idx, rows, query, key, decode)
        return dense_attention(call, way).transpose(1, 2).contiguous(), None
    if way == SCORES:
        call.int8 = None
    wanted = way is not None and not torch.compiler.is_compiling() and state.now.chooser.count
    call.count = recorder is not None or wanted
    call.count_rows = recorder is not None and recorder.effective_k and q_len > 1
    out, counts = registry.attend(call)
    if wanted:
        assert counts is not None
        state.now.chooser.counted(counts, rows.n)
    if recorder is not None:
        assert counts is not None
        _record(recorder, state.layer_idx, call, counts)
    return out.transpose(1, 2).contiguous(), None


def _record(recorder: Recorder, layer: int, call: AttentionCall, counts: Counts) -> None:
    """Hand the counts of a sparse call to the recorder."""
    k = call.spec.k if call.spec.method.uses_k else 0
    shape = (call.q.shape[0], call.q.shape[1], call.k.shape[1], call.k.shape[2])
    if call.decode:
        keys_read = registry.keys_read(call)
        price = price_of(call.spec, call.k, keys_read is not None)
        missed = missed_keys(call) if call.key_bits and not torch.compiler.is_compiling() else None
        recorder.add_steps(layer, call.rows, k, counts, shape, price, keys_read, missed)
    else:
        kv = kv_bytes(call, counts, before=recorder.prefix_of(layer))
        recorder.add(layer, call.rows, k, counts, shape, kv)


def _record_dense(
    recorder: Recorder, layer: int, rows: Rows, query: Tensor, key: Tensor, decode: bool
) -> None:
    """The same for a call that is computed dense."""
    shape = (query.shape[0], query.shape[1], key.shape[1], key.shape[2])
    if decode:
        recorder.add_steps(layer, rows, 0, None, shape, price_of(LayerSpec(), key))
    else:
        recorder.add(layer, rows, 0, None, shape, dense_bytes(rows, key, before=recorder.prefix_of(layer)))


def _dense(
    module: nn.Module,
    base: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Stock attention: eager if the model selects it, or needs something that sdpa does not support."""
    arguments = {"scaling": scaling, "dropout": dropout} | arguments
    if base == "eager" or any(arguments[name] is not None for name in ("softcap", "s_aux")):
        mask = _additive(mask, query, key.shape[2])
        return eager_of(module)(module, query, key, value, mask, **arguments)
    return sdpa_attention_forward(module, query, key, value, mask, **arguments)


@cache
def _warn_of_weights() -> None:
    warnings.warn(
        "output_attentions has no effect on sparse layers, which return no attention weights: those of dense "
        "attention are returned with attn_implementation='eager' and mode=3.",
        stacklevel=3,
    )


def _additive(mask: Tensor | None, query: Tensor, kv_len: int) -> Tensor:
    """The mask in the form of stock eager attention: 0 where visible, the type's lowest number elsewhere."""
    if mask is None:
        q_len = query.shape[2]
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
        mask = (mask.tril() if q_len > 1 else mask)[None, None]
    if mask.dtype != torch.bool:
        return mask
    zero = torch.tensor(0.0, device=query.device, dtype=query.dtype)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


def toptheta_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """Mask function for transformers' AttentionMaskInterface: bool `[B, 1, Q, KV]`, True = attend, or None.

    None is returned only where `rows_of(None, ...)` means the same: stock `sdpa_mask` also skips the mask for
    one query over a static cache, where the unused tail must stay hidden, and for rows that see everything,
    later keys too.
    """
    q_offset = _on_host(q_offset)
    offset_known = isinstance(q_offset, int)
    same = (
        offset_known
        and kv_offset == 0
        and (
            q_offset == 0
            and q_length > 1
            or q_length == kv_length
            or q_length == 1
            and q_offset + 1 == kv_length
        )
    )
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and same,
        **kwargs | {"allow_is_bidirectional_skip": False},
    )
    if mask is None or torch.compiler.is_compiling():
        return mask
    mask = mask.contiguous()  # generate makes it so for static caches, and its Rows would be lost
    rows = _rows_of_mask(mask, q_offset, kv_offset, mask_function is causal_mask_function, attention_mask)
    remember(mask, rows)
    return mask


def _on_host(q_offset: int | Tensor) -> int | Tensor:
    """The offset as a number. That of a static cache stays a tensor on a GPU, where reading it would wait for
    the device, and in a compiled model."""
    known = isinstance(q_offset, int) or q_offset.device.type == "cpu" and not torch.compiler.is_compiling()
    return int(q_offset) if known else q_offset


def _rows_of_mask(
    mask: Tensor, q_offset: int | Tensor, kv_offset: int, causal: bool, attention_mask: Tensor | None
) -> Rows:
    """The Rows of a mask `[B, 1, Q, KV]`, derived without synchronising with the device. q_offset: a tensor
    for a static cache on a GPU."""
    q_length, kv_length = mask.shape[2:]
    rows = Rows(n=mask.sum(dim=-1)[:, 0], mask=mask, causal=causal, offset=kv_offset)
    if causal:
        if isinstance(q_offset, int):
            rows.first = q_offset - kv_offset
        else:
            rows.first_on_device = (q_offset - kv_offset).reshape(1).long()
        if attention_mask is not None:
            key_real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
            if key_real.shape[1] < kv_length:  # a static cache's unused tail
                key_real = torch.nn.functional.pad(key_real, (0, kv_length - key_real.shape[1]))
            rows.key_real = key_real
            if rows.first is not None:
                rows.real = key_real[:, rows.first : rows.first + q_length]
    if rows.first is None:
        at = torch.arange(q_length, device=mask.device) + (q_offset - kv_offset)
        at = at.clamp(max=kv_length - 1)[None, :, None].expand(mask.shape[0], -1, 1)
        rows.real = mask[:, 0].gather(-1, at)[..., 0]  # a row of a sequence sees itself
    return rows


AttentionInterface.register(IMPLEMENTATION, toptheta_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, toptheta_mask)
