"""Sparse attention over blocks of query rows: selection, compensation and counts in one pass (DESIGN sections
2-3).

Pure tensor functions: they know nothing of modules, files or flags. Scores are float32 whatever the model's
type. Shapes: B sequences, H query heads, H_kv key/value heads, G = H / H_kv heads of a group, Q query rows, N
keys, D head_dim. A head's group is `head // G`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from toptheta.attention.rows import Rows
from toptheta.methods.params import TOP_K, TOP_THETA

NEG_INF = float("-inf")
# Elements of one block of scores. On CPU it should stay within a core's share of cache; on a GPU it bounds
# memory.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


@dataclass(frozen=True)
class LayerSpec:
    """What one layer computes: the resolved parameters of DESIGN sections 2-3. k <= 0 leaves every row
    dense."""

    mode: int = 3
    placement: str = "none"
    k: int = 0
    sdc: str = "none"
    sdc_scale: float = 1.0
    vmc: bool = False
    capk: bool = False

    @property
    def sparse(self) -> bool:
        return self.mode in (TOP_THETA, TOP_K) and self.placement != "none" and self.k > 0


class Calibrator(Protocol):
    """Sees the scores (or weights) of every block while a layer is calibrated; see
    toptheta/calibration/sampler.py."""

    def observe(self, block: "Block") -> None: ...


@dataclass
class Counts:
    """What selection kept. attn: `[B, H]` kept elements. vrow: `[B, H_kv, N]` how many (row, head) pairs keep
    a V row. row: `[B, H, Q]` int32 kept elements of each row, or None (not asked for). Rows that are padding
    count nowhere, and have 0 in `row`."""

    attn: Tensor
    vrow: Tensor
    row: Tensor | None = None


@dataclass
class Block:
    """Rows start..stop of one attention call. scores: `[B, H, R, E]` over the first E keys, -inf where not
    visible; n: `[B or 1, R]`; real: `[B or 1, R]` or None (all real); k of the layer."""

    scores: Tensor
    n: Tensor
    real: Tensor | None
    start: int
    k: int


def top_theta_keep(x: Tensor, theta: Tensor, peak: Tensor) -> Tensor:
    """Keep what is strictly greater than theta; where nothing is, keep the row's largest (all of them on a
    tie).

    x: `[..., R, E]` scores or weights, theta and peak (the row's maximum): `[..., R, 1]`. theta of -inf keeps
    every visible key.
    """
    below_peak = torch.nextafter(peak, torch.full_like(peak, NEG_INF))
    return x > torch.minimum(theta, below_peak)


def top_k_keep(x: Tensor, k: int) -> Tensor:
    """Keep the k largest of `x` `[..., R, E]`; exactly k, also on ties. -inf (not visible) is never kept."""
    if k >= x.shape[-1]:
        return x > NEG_INF
    index = x.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, index, True) & (x > NEG_INF)


def cap_recent(keep: Tensor, k: int, sparse: Tensor) -> Tensor:
    """Of the kept keys keep only the k most recent, in the rows where `sparse` `[..., R, 1]` holds."""
    newer = keep.sum(dim=-1, keepdim=True) - keep.cumsum(dim=-1)
    return keep & ((newer < k) | ~sparse)


def missing_denominator(
    spec: LayerSpec,
    exps: Tensor,
    keep: Tensor,
    peak: Tensor,
    n: Tensor,
    theta: Tensor | None,
    table: Tensor | None,
) -> Tensor:
    """R of softmax denominator compensation, `[B, H, R, 1]` (DESIGN section 3).

    exps: exp(scores - peak) over visible keys. table: calibrated R of each row. Rows with n <= K get 0: there
    theta is -inf, the table is 0, and nothing was dropped.
    """
    if spec.sdc == "exact":
        return exps.masked_fill(keep, 0.0).sum(dim=-1, keepdim=True)
    if spec.sdc == "exp-threshold":
        assert theta is not None
        dropped = n[:, None, :, None] - keep.sum(dim=-1, keepdim=True)
        return dropped * torch.exp(theta - peak)
    if spec.sdc == "offline-calibrated":
        assert table is not None
        return table.expand(exps.shape[0], -1, -1, -1)
    raise ValueError(f"no such SDC: {spec.sdc}")


def sparse_weights(
    block: Block, spec: LayerSpec, theta: Tensor | None, table: Tensor | None, calibrator: Calibrator | None
) -> tuple[Tensor, Tensor]:
    """Final attention weights and what was kept, both `[B, H, R, E]`, of one block of rows.

    theta, table: `[B or 1, H, R, 1]` threshold and calibrated R of each row, -inf and 0 where n <= K.
    """
    scores, n = block.scores, block.n
    peak = scores.amax(dim=-1, keepdim=True).clamp_min(
        torch.finfo(scores.dtype).min
    )  # finite on fully masked rows
    sparse = (n > spec.k)[:, None, :, None]

    if spec.placement == "pre-softmax":
        if calibrator is not None:
            calibrator.observe(block)
        keep = select(scores, peak, spec, theta, sparse)
        exps = scores.sub_(peak).exp_()
        denominator = exps.masked_fill(~keep, 0.0).sum(dim=-1, keepdim=True)
        if spec.sdc != "none":
            missing = missing_denominator(spec, exps, keep, peak, n, theta, table)
            denominator = denominator + spec.sdc_scale * missing
        weights = exps.masked_fill_(~keep, 0.0)
        return weights.div_(denominator.clamp_min(torch.finfo(weights.dtype).tiny)), keep

    visible = scores > NEG_INF
    exps = scores.sub_(peak).exp_()
    denominator = exps.sum(dim=-1, keepdim=True)
    weights = exps.div_(denominator.clamp_min(torch.finfo(exps.dtype).tiny))
    if calibrator is not None:
        block.scores = weights
        calibrator.observe(block)
    # Weights of keys that are not visible are 0, which must not pass a threshold of -inf or fill up the K
    # largest.
    ranked = weights.masked_fill(~visible, NEG_INF)
    keep = select(ranked, ranked.amax(dim=-1, keepdim=True), spec, theta, sparse)
    return weights.masked_fill_(~keep, 0.0), keep


def select(x: Tensor, peak: Tensor, spec: LayerSpec, theta: Tensor | None, sparse: Tensor) -> Tensor:
    """What `spec` keeps of `x` `[B, H, R, E]` (scores or weights, -inf where not visible), as bool."""
    if not spec.sparse:
        return x > NEG_INF
    if spec.mode == TOP_K:
        keep = top_k_keep(x, spec.k)
        return keep | (~sparse & (x > NEG_INF))
    assert theta is not None
    keep = top_theta_keep(x, theta, peak)
    return cap_recent(keep, spec.k, sparse) if spec.capk else keep


def mean_of_visible(v: Tensor, rows: Rows) -> Tensor:
    """Mean of V over each row's visible keys, `[B, H_kv, Q, D]` float32; 0 for a row that sees nothing.

    For causal rows one running sum serves all rows; any other mask costs a matrix product.
    """
    q_len, kv_len = rows.n.shape[1], v.shape[2]
    n = rows.n.clamp_min(1)[:, None, :, None]
    v = v.float()
    if rows.first is not None:
        if rows.key_real is not None:
            v = v * rows.key_real[:, None, :, None]
        before = v[:, :, : rows.first].sum(dim=2, keepdim=True)
        own = v[:, :, rows.first : rows.first + q_len].cumsum(dim=2)
        return (before + own) / n
    visible = rows.mask.float() if rows.mask is not None else torch.ones(1, 1, q_len, kv_len, device=v.device)
    return visible @ v / n


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    spec: LayerSpec,
    scale: float,
    theta: Tensor | None = None,
    table: Tensor | None = None,
    calibrator: Calibrator | None = None,
    count: bool = False,
    count_rows: bool = False,
) -> tuple[Tensor, Counts | None]:
    """Attention of `spec`, and what it kept if `count`; by row too if also `count_rows`.

    q: `[B, H, Q, D]`; k, v: `[B, H_kv, N, D]`; theta, table: `[H, L]` by row length, looked up at min(n, L -
    1), with -inf and 0 for lengths up to K. Returns `[B, H, Q, D]` in q's type. A row that sees no key gives
    zeros. Memory is that of a few blocks of scores, never `[B, H, Q, N]`.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    q_grouped = (q.float() * scale).view(batch, num_kv_heads, group, q_len, head_dim)
    k_t = k.float().transpose(2, 3)
    out = torch.empty(batch, num_heads, q_len, head_dim, dtype=q.dtype, device=q.device)
    v_mean = mean_of_visible(v, rows) if spec.vmc else None
    counts = None
    if count:
        counts = Counts(
            attn=torch.zeros(batch, num_heads, dtype=torch.int64, device=q.device),
            vrow=torch.zeros(batch, num_kv_heads, kv_len, dtype=torch.int32, device=q.device),
        )
        if count_rows:
            counts.row = torch.empty(batch, num_heads, q_len, dtype=torch.int32, device=q.device)

    step = block_rows(batch * num_heads * kv_len, q_len, q.device.type)
    for start in range(0, q_len, step):
        stop = min(start + step, q_len)
        end = rows.end(stop, kv_len)
        q_block = q_grouped[:, :, :, start:stop].reshape(batch, num_kv_heads, -1, head_dim)
        scores = (q_block @ k_t[..., :end]).view(batch, num_heads, stop - start, end)
        visible = rows.visible(start, stop, kv_len)
        if visible is not None:
            scores.masked_fill_(~visible, NEG_INF)
        n = rows.n[:, start:stop]
        real = None if rows.real is None else rows.real[:, start:stop]
        weights, keep = sparse_weights(
            Block(scores, n, real, start, spec.k),
            spec,
            None if theta is None else per_row(theta, n),
            None if table is None else per_row(table, n),
            calibrator,
        )
        grouped = weights.view(batch, num_kv_heads, -1, end)
        block_out = (grouped.to(v.dtype) @ v[:, :, :end]).view(batch, num_heads, stop - start, head_dim)
        if v_mean is not None:
            lost = (1.0 - weights.sum(dim=-1)) * (n > spec.k)[:, None]
            mean = v_mean[:, :, start:stop].repeat_interleave(group, dim=1)
            block_out = block_out.float() + lost.unsqueeze(-1) * mean
        out[:, :, start:stop] = block_out
        if counts is not None:
            add_counts(counts, keep, real, start)
    return out, counts


def add_counts(counts: Counts, keep: Tensor, real: Tensor | None, start: int) -> None:
    """Add the kept elements of the block from row `start` on; rows where `real` is False count nowhere."""
    if real is not None:
        keep = keep & real[:, None, :, None]
    batch, num_heads, _, end = keep.shape
    num_kv_heads = counts.vrow.shape[1]
    per_key = keep.sum(dim=2, dtype=torch.int32)
    counts.attn += per_key.sum(dim=-1)
    counts.vrow[:, :, :end] += per_key.view(batch, num_kv_heads, -1, end).sum(dim=2)
    if counts.row is not None:
        counts.row[:, :, start : start + keep.shape[2]] = keep.sum(dim=-1)


def per_row(table: Tensor, n: Tensor) -> Tensor:
    """`[B or 1, H, R, 1]` values of a `[H, L]` table at the row lengths `n` `[B or 1, R]`."""
    return table[:, n.clamp(max=table.shape[1] - 1)].transpose(0, 1).unsqueeze(-1)


def block_rows(elements_per_row: int, q_len: int, device: str) -> int:
    """How many query rows one block holds, so that its scores stay within BLOCK_ELEMENTS."""
    budget = BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cpu"])
    return max(1, min(q_len, budget // max(1, elements_per_row)))
