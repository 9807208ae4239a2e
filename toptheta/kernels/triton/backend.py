"""The GPU path: what the Triton kernels take, and calling them as PyTorch operators.

The operators have shapes without data (`register_fake`), so torch.compile and CUDA graphs go through them:
nothing here waits for the device. The kernels are in triton_decode.py and triton_prefill.py, which are
imported on first use: without Triton this module still imports. TRITON_INTERPRET=1 runs them on the CPU.
"""

import importlib.util
import os

import torch
from torch import Tensor

from toptheta.attention.reference import Counts, LayerSpec, mean_of_visible
from toptheta.attention.rows import Rows
from toptheta.kernels.int8_keys import Int8Keys
from toptheta.methods.params import TOP_K, TOP_THETA

MAX_HEAD_DIM, MAX_GROUP = 256, 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself asks, at import


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, spec: LayerSpec, count_rows: bool = False
) -> str | None:
    """Why the kernels cannot take this call, or None if they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    kinds = {x.device.type for x in (q, k, v)}
    if kinds != {"cuda"} and not (INTERPRETED and kinds == {"cpu"}):
        return "the tensors are not on a GPU"
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        return f"the kernels do float32, float16 and bfloat16, the same in q, k and v, not {q.dtype}"
    if INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "the kernels have no backward pass"
    head_dim = q.shape[3]
    if head_dim > MAX_HEAD_DIM or head_dim % 8 or v.shape[3] != head_dim:
        return f"head_dim is {head_dim}, and the kernels do multiples of 8 up to {MAX_HEAD_DIM}"
    if q.shape[1] > MAX_GROUP * k.shape[1]:
        return f"more than {MAX_GROUP} query heads share a KV head"
    if spec.sparse and spec.capk:
        return "the kernels have no capk"
    if spec.sparse and spec.mode == TOP_K and q.shape[2] > 1:
        return "Top-k of many rows has no kernel"
    if count_rows:
        return "the kernels do not count what single rows keep"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    spec: LayerSpec,
    scale: float,
    theta: Tensor | None = None,
    table: Tensor | None = None,
    count: bool = False,
    v_sum: Tensor | None = None,
    int8: Int8Keys | None = None,
) -> tuple[Tensor, Counts | None]:
    """`sparse_attention` of attention/reference.py, computed by the kernels; the same arguments and results.

    The output is a view of a `[B, Q, H, D]` tensor. v_sum: `[B, H_kv, D]` float32, sum of V over the visible
    keys of the only query row (Q = 1), if the caller has it: with VMC, V is then read only where it is kept.
    int8: the copy of k (see two_tier.py), used for one row and thresholds on scores, else ignored. Raises
    ValueError where shapes do not fit.
    """
    num_heads, q_len = q.shape[1], q.shape[2]
    if v.shape != k.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or num_heads % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    for name, at, needed in (
        ("theta", theta, spec.sparse and (spec.mode == TOP_THETA or spec.sdc == "exp-threshold")),
        ("table", table, spec.sparse and spec.sdc == "offline-calibrated"),
    ):
        if needed and (at is None or at.shape[0] != num_heads):
            raise ValueError(f"{spec} needs a {name} of shape [{num_heads}, L]")
    if theta is None or not spec.sparse or spec.mode != TOP_THETA:
        theta = torch.full((1, 1), float("-inf"), device=q.device)
    if not spec.sparse or spec.sdc != "offline-calibrated":
        table = None
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    theta = theta.float().contiguous()
    table = None if table is None else table.float().contiguous()
    settings = (
        scale, spec.mode, spec.placement, spec.k, spec.sdc, spec.sdc_scale, count,
    )  # fmt: skip
    vmc = spec.vmc
    if q_len == 1:
        if not vmc:
            v_sum = None
        elif v_sum is None:
            seen = v if rows.mask is None else torch.where(rows.mask[:, :, 0, :, None], v, 0.0)
            v_sum = seen.sum(dim=2, dtype=torch.float32)
        mask, span = None, rows.span()
        if rows.mask is not None:
            mask = rows.mask[:, 0, 0].contiguous()
            assert span is not None
            span = span.expand(q.shape[0], 2).contiguous()
        v_sum = None if v_sum is None else v_sum.float().contiguous()
        tiers: tuple[Tensor | None, ...] = (None, None, None, None)
        if int8 is not None and spec.sparse and (spec.mode, spec.placement) == (TOP_THETA, "pre-softmax"):
            if int8.codes.shape != k.shape:
                raise ValueError(f"the int8 copy {tuple(int8.codes.shape)} is not of k {tuple(k.shape)}")
            tiers = (int8.codes, int8.steps, int8.slacks, int8.mean)
        out, keep = _decode(q, k, v, rows.n, mask, span, theta, table, v_sum, *tiers, *settings)
        return out, _counts(keep, rows.real, k.shape[1]) if count else None
    first, mask = rows.first, None
    if first is None and rows.mask is None:
        first = 0
    if first is None:
        assert rows.mask is not None
        mask = rows.mask[:, 0].contiguous()
    real = None if rows.real is None else rows.real.contiguous()
    key_real = None if rows.key_real is None else rows.key_real.contiguous()
    v_mean = mean_of_visible(v, rows).contiguous() if vmc else None
    out, attn, vrow = _prefill(
        q, k, v, rows.n.contiguous(), first, mask, key_real, real, theta, table, v_mean, *settings
    )
    return out.transpose(1, 2), Counts(attn, vrow) if count else None


def _counts(keep: Tensor, real: Tensor | None, num_kv_heads: int) -> Counts:
    """Counts of `keep` `[B, H, N]` bool, the only row of each sequence."""
    if real is not None:
        keep = keep & real[:, :, None]
    batch, num_heads, kv_len = keep.shape
    vrow = keep.view(batch, num_kv_heads, -1, kv_len).sum(dim=2, dtype=torch.int32)
    return Counts(attn=keep.sum(dim=-1), vrow=vrow)


def _spec(mode: int, placement: str, k: int, sdc: str, sdc_scale: float) -> LayerSpec:
    return LayerSpec(mode, placement, k, sdc, sdc_scale)


@torch.library.custom_op("toptheta::triton_decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: Tensor,
    mask: Tensor | None,
    span: Tensor | None,
    theta: Tensor,
    table: Tensor | None,
    v_sum: Tensor | None,
    codes: Tensor | None,
    steps: Tensor | None,
    slacks: Tensor | None,
    k_mean: Tensor | None,
    scale: float,
    mode: int,
    placement: str,
    k_keep: int,
    sdc: str,
    sdc_scale: float,
    count: bool,
) -> tuple[Tensor, Tensor]:
    """`triton_decode.decode`; what was kept is empty unless `count`."""
    from toptheta.kernels.triton import (
        decode as triton_decode,  # Triton may be missing, which is no error before this
    )

    spec = _spec(mode, placement, k_keep, sdc, sdc_scale)
    int8 = None
    if codes is not None:
        assert steps is not None and slacks is not None and k_mean is not None
        int8 = Int8Keys(codes, steps, slacks, k_mean)
    out, keep = triton_decode.decode(q, k, v, n, mask, span, theta, table, v_sum, spec, scale, count, int8)
    return out, q.new_empty(0, dtype=torch.bool) if keep is None else keep


@_decode.register_fake
def _(
    q, k, v, n, mask, span, theta, table, v_sum, codes, steps, slacks, k_mean,
    scale, mode, placement, k_keep, sdc, sdc_scale, count,
):  # fmt: skip
    shape = (q.shape[0], q.shape[1], k.shape[2]) if count else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.bool)


@torch.library.custom_op("toptheta::triton_prefill", mutates_args=())
def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n: Tensor,
    first: int | None,
    mask: Tensor | None,
    key_real: Tensor | None,
    real: Tensor | None,
    theta: Tensor,
    table: Tensor | None,
    v_mean: Tensor | None,
    scale: float,
    mode: int,
    placement: str,
    k_keep: int,
    sdc: str,
    sdc_scale: float,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`triton_prefill.prefill`, its output as `[B, Q, H, D]`; counts are empty unless `count`."""
    from toptheta.kernels.triton import prefill as triton_prefill

    spec = _spec(mode, placement, k_keep, sdc, sdc_scale)
    out, counts = triton_prefill.prefill(
        q, k, v, n, first, mask, key_real, real, theta, table, v_mean, spec, scale, count
    )
    if counts is None:
        return out, n.new_empty(0), n.new_empty(0, dtype=torch.int32)
    return out, counts.attn, counts.vrow


@_prefill.register_fake
def _(
    q, k, v, n, first, mask, key_real, real, theta, table, v_mean,
    scale, mode, placement, k_keep, sdc, sdc_scale, count,
):  # fmt: skip
    batch, num_heads, q_len, head_dim = q.shape
    attn = (batch, num_heads) if count else (0,)
    vrow = (batch, k.shape[1], k.shape[2]) if count else (0,)
    return (
        q.new_empty(batch, q_len, num_heads, head_dim),
        n.new_empty(attn, dtype=torch.int64),
        n.new_empty(vrow, dtype=torch.int32),
    )
