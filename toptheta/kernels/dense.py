"""Dense attention for a call instead of sparse attention, in several implementations."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from toptheta.attention.call import AttentionCall
from toptheta.kernels.triton import backend as triton
from toptheta.methods.params import LayerSpec

# torch's scaled_dot_product_attention with its own choice, its FlashAttention, our kernel without selection
DENSE_WAYS = ("sdpa", "flash", "kernel")
PLAIN = LayerSpec()


def dense_ways(masked: bool) -> tuple[str, ...]:
    """The implementations for a call with a mask, or without: FlashAttention does not take a mask."""
    return tuple(way for way in DENSE_WAYS if way != "flash" or not masked)


def dense_attention(call: AttentionCall, way: str) -> Tensor:
    """`[B, H, Q, D]`: dense attention of `call`, ignoring its spec. way: one of `dense_ways`."""
    if way == "kernel":
        return triton.run(AttentionCall(call.q, call.k, call.v, call.rows, PLAIN, call.scale))[0]
    if way == "flash":
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return _sdpa(call)
    return _sdpa(call)


def _sdpa(call: AttentionCall) -> Tensor:
    mask = call.rows.mask
    return torch.nn.functional.scaled_dot_product_attention(
        call.q,
        call.k,
        call.v,
        attn_mask=mask,
        is_causal=mask is None and call.q.shape[2] > 1,
        scale=call.scale,
        enable_gqa=True,
    )
