"""Random queries, keys and values for timing attention, and the calls that compute it.

Scores are normal with standard deviation SCORE_SPREAD; the query heads of a group share a part SHARED of
their variance, like heads of a model. In decode, keys and values must come from memory: a call goes through
enough copies of them to exceed the L2 cache several times.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall, Int8Keys
from toptheta.attention.rows import Rows, rows_of
from toptheta.kernels.dense import dense_attention
from toptheta.kernels.int8_keys import quantized
from toptheta.kernels.timing import Call
from toptheta.kernels.triton import backend as gpu
from toptheta.methods.params import LayerSpec

SCORE_SPREAD = 1.5
SHARED = 0.8
COLD_BYTES = 400 << 20  # several times the L2 cache of any GPU so far


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call: B sequences of N keys, `phase` decode (one row) or prefill (N rows)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    phase: str
    batch: int
    kv_len: int

    @property
    def q_len(self) -> int:
        return self.kv_len if self.phase == "prefill" else 1

    @property
    def bytes_k(self) -> int:
        return self.dtype.itemsize * self.batch * self.num_kv_heads * self.kv_len * self.head_dim


def draw_queries(sizes: Sizes, device: torch.device) -> Tensor:
    """q `[B, H, Q, D]`; the heads of a group are correlated."""
    group_size = sizes.num_heads // sizes.num_kv_heads
    shape = (sizes.batch, sizes.q_len, sizes.num_kv_heads)
    own = torch.randn(*shape, group_size, sizes.head_dim, device=device, dtype=sizes.dtype)
    group = torch.randn(*shape, 1, sizes.head_dim, device=device, dtype=sizes.dtype)
    q = SCORE_SPREAD * (math.sqrt(SHARED) * group + math.sqrt(1 - SHARED) * own)
    return q.flatten(2, 3).transpose(1, 2)


def int8_copy(k: Tensor) -> Int8Keys:
    """The int8 copy of `k` `[B, H_kv, N, D]`, made one sequence at a time to save memory."""
    parts = [quantized(one) for one in k.split(1)]
    fields = ("codes", "steps", "slacks", "mean")
    return Int8Keys(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def threshold(fraction: float, placement: str, kv_len: int) -> float:
    """The threshold that about this share of a row of `kv_len` scores, or of their weights, exceeds."""
    quantile = float(torch.distributions.Normal(0.0, SCORE_SPREAD).icdf(torch.tensor(1.0 - fraction)))
    if placement == "pre-softmax" or quantile == -math.inf:
        return quantile
    return math.exp(quantile - SCORE_SPREAD**2 / 2) / kv_len


class Drawn:
    """The tensors of one case, and calls on them: each goes through all copies of keys and values."""

    def __init__(self, sizes: Sizes, device: torch.device, cold_bytes: int = COLD_BYTES):
        self.sizes, self.device, self.scale = sizes, device, 1 / math.sqrt(sizes.head_dim)
        copies = 1 if sizes.phase == "prefill" else 1 + cold_bytes // (2 * sizes.bytes_k)
        shape = (copies, sizes.batch, sizes.num_kv_heads, sizes.kv_len, sizes.head_dim)
        self.k, self.v = (torch.randn(shape, device=device, dtype=sizes.dtype) for _ in range(2))
        self.q = draw_queries(sizes, device)
        self.rows = rows_of(None, sizes.q_len, sizes.kv_len, device)

    @cached_property
    def int8(self) -> list[Int8Keys]:
        return [int8_copy(k) for k in self.k]

    @cached_property
    def v_sums(self) -> Tensor:
        """The sum of V, which the model stores with its cache for VMC in decode."""
        return self.v.sum(dim=3, dtype=torch.float32)

    @cached_property
    def masked_rows(self) -> Rows:
        """The rows with a mask that hides nothing, as behind a full static cache."""
        shape = (self.sizes.batch, 1, self.sizes.q_len, self.sizes.kv_len)
        mask = torch.ones(shape, dtype=torch.bool, device=self.device)
        return Rows(n=mask.sum(dim=-1)[:, 0], mask=mask, causal=True)

    def call(
        self,
        spec: LayerSpec,
        theta: Tensor | None,
        copy: int,
        two_tier: bool = False,
        masked: bool = False,
        **more: Any,
    ) -> AttentionCall:
        rows = self.masked_rows if masked else self.rows
        call = AttentionCall(self.q, self.k[copy], self.v[copy], rows, spec, self.scale, theta, **more)
        call.int8 = self.int8[copy] if two_tier else None
        call.v_sum = self.v_sums[copy] if self.sizes.phase == "decode" and spec.vmc else None
        return call

    def over_copies(self, one: Callable[[int], Tensor]) -> Call:
        return lambda: [one(copy) for copy in range(len(self.k))]

    def ours(
        self, spec: LayerSpec, theta: Tensor | None = None, two_tier: bool = False, masked: bool = False
    ) -> Call:
        return self.over_copies(lambda copy: gpu.run(self.call(spec, theta, copy, two_tier, masked))[0])

    def dense(self, way: str, masked: bool = False) -> Call:
        """Dense attention by one of the implementations of dense.py."""
        spec = LayerSpec()
        return self.over_copies(lambda copy: dense_attention(self.call(spec, None, copy, masked=masked), way))
