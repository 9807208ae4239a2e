"""Decode steps with a copy of K in few bits, for the kernels."""

from dataclasses import replace

import torch

from tests.helpers.calls import call
from tests.helpers.kernel_cases import SCALE, K, case, inputs, tables
from toptheta.attention.call import AttentionCall
from toptheta.methods.base import ValueNorms
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.methods.top_theta import TopTheta

SPECS = [
    LayerSpec(TopTheta(), "post-softmax", K, vmc=True),
    LayerSpec(TopTheta(value_aware=True), "post-softmax", K, vmc=True),
    LayerSpec(TopTheta(capk=True), "post-softmax", K),
    LayerSpec(TopTheta(), "pre-softmax", K, "exact", vmc=True),
    LayerSpec(TopTheta(capk=True), "pre-softmax", K, "exact", 0.5),
    LayerSpec(TopTheta(), "pre-softmax", K, "exp-threshold", 0.7, vmc=True),
    LayerSpec(TopTheta(), "pre-softmax", K, "offline-calibrated", 1.3),
]


def step(
    kind: str, heads: tuple[int, int, int], spec: LayerSpec, copy: str, louder: float = 1.0
) -> AttentionCall:
    """A decode step of one kind of rows. louder: a factor on q, which spreads the scores."""
    rows, batch, q_len, kv_len = case(kind)
    num_heads, _, head_dim = heads
    q, k, v = inputs(batch, heads, q_len, kv_len)
    theta, table = tables(spec, num_heads, kv_len)
    gram = torch.eye(head_dim).expand(num_heads, -1, -1)
    values = ValueNorms(gram, v.mean(dim=(0, 2)), torch.full((num_heads,), head_dim**0.5))
    spec = replace(spec, method=replace(spec.method, key_copy=copy))
    more = {"count": True, "decode": True, "state": State(), "values": values}
    return call(q * louder, k, v, rows, spec, SCALE, theta, table, **more)


def share_read(asked: AttentionCall, keys: torch.Tensor) -> float:
    """The share of the visible K rows that is read. keys: as in `Counts`."""
    visible = asked.rows.n.expand(keys.shape[0], -1)[:, None]
    return float(keys.sum() / visible.expand_as(keys).sum())
