"""Sparse attention as one function of tensors, for callers that have neither a model nor a registry: what the
package for the kernels hub exports (hub/build.py)."""

from torch import Tensor

from toptheta.attention.call import AttentionCall
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.kernels.triton import backend, probe
from toptheta.methods.params import AttentionParams, LayerSpec, check
from toptheta.methods.top_k import TopK
from toptheta.methods.top_theta import TopTheta


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    budget: int,
    *,
    theta: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    placement: str = "pre-softmax",
    sdc: str = "none",
    sdc_table: Tensor | None = None,
    sdc_scale: float = 1.0,
    vmc: bool = False,
) -> Tensor:
    """Attention of rows that keep the keys above a threshold, or without thresholds the `budget` largest.

    q: `[B, H, Q, D]`; k, v: `[B, H_kv, N, D]`, H a multiple of H_kv. budget: rows with as many visible keys
    or fewer are dense. theta: `[H, L]` float32 thresholds by row length, -inf for lengths up to the budget,
    looked up at min(length, L - 1); on scores (placement 'pre-softmax') or on weights ('post-softmax'). mask:
    bool `[B, 1, Q, N]`, True is visible; None: causal from the first key on, and a single row sees all keys.
    scale: of q k^T, by default D^-0.5. sdc: what is put back into the softmax's denominator, 'none', 'exact',
    'exp-threshold' or 'offline-calibrated' (by sdc_table, of theta's shape), times sdc_scale. vmc: the lost
    weight goes to the mean of V. Returns `[B, H, Q, D]`.

    Computed by Triton kernels where `unsupported` has no objection, else by plain PyTorch. Raises ValueError
    for options or shapes that do not fit. Source: arXiv 2502.08363, section 3.
    """
    method = TopK() if theta is None else TopTheta()
    check(AttentionParams(placement, sdc, sdc_scale, vmc, K=budget, method=method))
    call = AttentionCall(
        q,
        k,
        v,
        rows_of(mask, q.shape[2], k.shape[2], q.device),
        LayerSpec(method, placement, budget, sdc, sdc_scale, vmc),
        q.shape[3] ** -0.5 if scale is None else scale,
        theta,
        sdc_table,
    )
    call.check_shapes()
    ours = backend.unsupported(call) is None and probe.ready(call) is None
    return (backend.run if ours else sparse_attention)(call)[0]
