"""Value-aware thresholds for the kernels: inputs, and the comparison with the reference."""

import math
from collections.abc import Callable
from typing import Any

import torch

from tests.helpers.calls import call
from tests.helpers.kernel_cases import SCALE, K, case, inputs
from toptheta.attention.call import AttentionCall
from toptheta.attention.reference import sparse_attention
from toptheta.methods.base import ValueNorms
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.methods.top_theta import TopTheta


def weighed_call(
    kind: str, heads: tuple[int, int, int], louder: float, vmc: bool, **options: Any
) -> AttentionCall:
    """A call of one kind of rows. Some values equal the mean, so that their factor is 0; no row of head 1
    passes its threshold. louder: a factor on q, which spreads the scores."""
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = inputs(batch, heads, q_len, kv_len)
    num_heads, num_kv_heads, head_dim = heads
    w_o, mean = torch.randn(num_heads, 20, head_dim), torch.randn(num_kv_heads, head_dim)
    v[:, :, 3::11] = mean[:, None]
    values = ValueNorms(w_o.transpose(1, 2) @ w_o, mean, torch.rand(num_heads) + 20.0)
    theta = torch.rand(num_heads, kv_len + 1) * 0.01 + 0.005
    theta[1] = 10.0
    theta[:, : K + 1] = -math.inf
    spec = LayerSpec(TopTheta(value_aware=True, **options), "post-softmax", K, vmc=vmc)
    return call(q * louder, k, v, rows, spec, SCALE, theta, values=values, state=State(), count=True)


def check_weighed(asked: AttentionCall, run: Callable[[AttentionCall], tuple]) -> None:
    """A kernel keeps what the reference keeps, with the same output; twice, behind the same state too."""
    expected, counts = sparse_attention(asked)
    assert counts is not None
    full = int(asked.rows.n.expand(asked.q.shape[0], -1).sum()) * asked.q.shape[1]
    assert 0.005 * full < counts.attn.sum() < 0.8 * full
    asked.state = State()
    for _ in range(2):
        out, ours = run(asked)
        assert torch.equal(ours.attn, counts.attn) and torch.equal(ours.vrow, counts.vrow)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
