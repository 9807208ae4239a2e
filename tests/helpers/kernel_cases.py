"""Inputs for which every kernel must keep exactly what plain PyTorch keeps.

Queries and keys are small multiples of powers of two, so that scores are exact in float32 whatever the
order of summation: what is kept must then be equal.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.helpers.calls import layer_spec
from toptheta.attention.call import per_row
from toptheta.attention.reference import sparse_weights
from toptheta.attention.rows import Rows, rows_of
from toptheta.kernels.cpu import library
from toptheta.methods.base import Block, RowTables
from toptheta.methods.params import LayerSpec
from toptheta.models.interface import toptheta_mask

K, SCALE = 12, 0.125
SDC = [("none", 1.0), ("exact", 1.0), ("exact", 0.5), ("exp-threshold", 0.7), ("offline-calibrated", 1.3)]
SPECS = [layer_spec()] + [
    layer_spec(mode, placement, K, sdc, sdc_scale, vmc, capk)
    for mode, placement, (sdc, sdc_scale), vmc, capk in itertools.product(
        (0, 1), ("pre-softmax", "post-softmax"), SDC, (False, True), (False, True)
    )
    if not (placement == "post-softmax" and sdc != "none")
    and not (mode == 1 and (capk or sdc == "exp-threshold"))
]
needs_kernel = pytest.mark.skipif(isinstance(library.load(), str), reason=f"no CPU kernel: {library.load()}")


def lattice(*shape: int, unit: float) -> Tensor:
    """Roughly normal numbers, multiples of `unit`."""
    return (torch.randint(-256, 257, (6, *shape)).sum(dim=0) * unit).float()


def inputs(batch: int, heads: tuple[int, int, int], q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v laid out as a model hands them over: q and v are views of `[B, Q, H, D]`."""
    num_heads, num_kv_heads, head_dim = heads
    q = lattice(batch, q_len, num_heads, head_dim, unit=2**-8).transpose(1, 2)
    k = lattice(batch, num_kv_heads, kv_len, head_dim, unit=2**-9)
    return q, k, torch.randn(batch, kv_len, num_kv_heads, head_dim).transpose(1, 2)


def tables(spec: LayerSpec, num_heads: int, length: int) -> tuple[Tensor, Tensor]:
    """Thresholds that keep a tenth or so (in every 7th length nothing), and calibrated R."""
    steps = torch.randint(0, 32, (num_heads, length))
    if spec.placement == "post-softmax":
        theta = (steps + 4) / 12 / torch.arange(length).clamp_min(1)
    else:
        theta = 2.0 + steps / 16
    theta[:, ::7] = 1000.0
    table = torch.rand(num_heads, length)
    theta[:, : spec.k + 1], table[:, : spec.k + 1] = -math.inf, 0.0
    return theta.float(), table


def case(kind: str) -> tuple[Rows, int, int, int]:
    """Rows, batch, Q and N of one kind of call."""
    cpu_device = torch.device("cpu")
    left = torch.ones(2, 75, dtype=torch.bool)
    left[1, :23] = False
    masks = {
        "chunk": (1, 70, 203, 133, None),
        "few rows": (2, 3, 150, 147, None),
        "left padding": (2, 75, 75, 0, left),
        "right padding": (2, 75, 75, 0, left.flip(1)),
        "padded chunk": (2, 25, 75, 50, left),
        "padded decode": (2, 1, 75, 74, left),
        "static cache": (2, 20, 96, 31, None),
        "static decode": (2, 1, 96, 51, None),
    }
    if kind == "prefill":
        return rows_of(None, 101, 101, cpu_device), 2, 101, 101
    if kind == "decode":
        return rows_of(None, 1, 1101, cpu_device), 1, 1, 1101
    if kind == "any mask":  # no rule; rows that see nothing, rows that see fewer than K
        mask = torch.rand(2, 1, 50, 77) < torch.linspace(0, 1, 50)[:, None]
        return rows_of(mask, 50, 77, cpu_device), 2, 50, 77
    batch, q_len, kv_len, offset, attention_mask = masks[kind]
    mask = toptheta_mask(batch, q_len, kv_len, q_offset=offset, attention_mask=attention_mask)
    return rows_of(mask, q_len, kv_len, cpu_device), batch, q_len, kv_len


KINDS = [
    "prefill", "decode", "chunk", "few rows", "left padding", "right padding", "padded chunk",
    "padded decode", "static cache", "static decode", "any mask",
]  # fmt: skip


def in_float64(q, k, v, rows: Rows, spec: LayerSpec, theta: Tensor, table: Tensor) -> Tensor:
    """The output in float64, without blocks."""
    group, (q_len, kv_len) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    end = rows.end(q_len, kv_len)
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q.double() * SCALE) @ k[:, :, :end].transpose(2, 3)
    visible = rows.visible(0, q_len, kv_len)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    at_n = RowTables(*(per_row(x, rows.n).double() for x in (theta, table)))
    block = Block(scores, scores.amax(dim=-1, keepdim=True), rows.n, rows.real, 0, spec.k)
    weights, _ = sparse_weights(block, spec, at_n)
    out = weights @ v[:, :, :end]
    if spec.vmc:
        lost = (1 - weights.sum(dim=-1)) * (rows.n > spec.k)[:, None]
        visible = torch.ones(1, 1, 1, end, dtype=torch.bool) if visible is None else visible
        out += lost[..., None] * (visible.double() @ v[:, :, :end] / rows.n.clamp_min(1)[:, None, :, None])
    return out
