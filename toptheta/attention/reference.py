"""Sparse attention over blocks of query rows in plain PyTorch: the reference for all kernels.

Pure tensor functions, independent of modules, files and flags. Scores are float32 for any model type. Shapes
as in call.py; a block has R rows and sees the first E keys.
"""

from dataclasses import replace

import torch
from torch import Tensor

from toptheta.attention.blocks import Blocks
from toptheta.attention.call import AttentionCall, Calibrator, Counts
from toptheta.attention.rows import Rows
from toptheta.methods.base import NEG_INF, Block, RowTables
from toptheta.methods.compensation import add_mean, missing_denominator
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State

# Elements of one block of scores. On CPU it should stay within a core's share of cache; on a GPU it bounds
# memory.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def sparse_attention(
    call: AttentionCall, calibrator: Calibrator | None = None
) -> tuple[Tensor, Counts | None]:
    """The attention output of `call`, `[B, H, Q, D]` in q's type, and the counts if `call.count`.

    calibrator: observes each block before selection. A row that sees no key gives zeros. Memory is that of a
    few blocks of scores, never `[B, H, Q, N]`, unless a gradient is needed: then autograd keeps all blocks.
    Selection acts as a constant mask: no gradient flows through it.
    """
    q, k, v, rows, spec = call.q, call.k, call.v, call.rows, call.spec
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    out = torch.empty(batch, num_heads, q_len, head_dim, dtype=q.dtype, device=q.device)
    v_mean = mean_of_visible(v, rows) if spec.vmc else None
    counts = Counts.zeros(call) if call.count else None
    if call.state is None and spec.method.has_state:
        call = replace(call, state=State())  # for this call only
    state = call.state
    if state is not None:
        state.belong_to(spec.method)
        state.grow(kv_len)
    if call.key_bits:
        call.key_codes()

    step = block_rows(batch * num_heads * kv_len, q_len, q.device.type)
    if spec.sparse:
        step = 1 if call.decode and not spec.method.by_row else spec.method.rows_of_block(step)
    blocks = Blocks(call)
    for start in range(0, q_len, step):
        stop = min(start + step, q_len)
        block = blocks.at(start, stop)
        n, tables, end = block.n, call.tables_of(block.n), block.x.shape[-1]
        if spec.sparse and call.decode:
            spec.method.estimate(block, tables, spec.placement)
        weights, keep = sparse_weights(block, spec, tables, calibrator)
        if spec.sparse:
            spec.method.after(block, weights.detach())
        grouped = weights.view(batch, num_kv_heads, -1, end)
        block_out = (grouped.to(v.dtype) @ v[:, :, :end]).view(batch, num_heads, stop - start, head_dim)
        if v_mean is not None:
            mean = v_mean[:, :, start:stop].repeat_interleave(group, dim=1)
            block_out = add_mean(block_out, weights, mean, spec.may_drop(n), block.share)
        out[:, :, start:stop] = block_out
        if counts is not None:
            counts.add(keep, block.real, start, block.read)
    return out, counts


def sparse_weights(
    block: Block, spec: LayerSpec, tables: RowTables, calibrator: Calibrator | None = None
) -> tuple[Tensor, Tensor]:
    """Final attention weights and the kept keys of one block of rows, both `[B, H, R, E]`.

    block: x contains the scores. Unless a gradient is needed they are overwritten: afterwards x contains the
    final weights with placement pre-softmax, and the weights before selection with post-softmax.
    """
    scores = block.x
    finite_max = block.row_max.clamp_min(torch.finfo(scores.dtype).min)  # finite on fully masked rows
    block.row_max = finite_max
    if spec.placement != "post-softmax":
        keep = select(block, spec, tables, calibrator)
        exps = _exps(scores, finite_max)
        denominator = exps.masked_fill(~keep, 0.0).sum(dim=-1, keepdim=True)
        if spec.sdc != "none":
            missing = missing_denominator(spec.sdc, exps, keep, finite_max, block.n, tables)
            denominator = denominator + spec.sdc_scale * missing
        return _divided(_only(exps, keep), _whole(block, denominator)), keep

    visible = scores > NEG_INF
    exps = _exps(scores, finite_max)
    weights = _divided(exps, _whole(block, exps.sum(dim=-1, keepdim=True)))
    # Weights of keys that are not visible are 0, which must not pass a threshold of -inf or fill up the K
    # largest.
    block.x, block.are_weights = weights.masked_fill(~visible, NEG_INF), True
    block.row_max = block.x.amax(dim=-1, keepdim=True)
    keep = select(block, spec, tables, calibrator)
    return _only(weights, keep), keep


def _exps(scores: Tensor, row_max: Tensor) -> Tensor:
    return (scores - row_max).exp() if scores.requires_grad else scores.sub_(row_max).exp_()


def _divided(weights: Tensor, denominator: Tensor) -> Tensor:
    denominator = denominator.clamp_min(torch.finfo(weights.dtype).tiny)
    return weights / denominator if weights.requires_grad else weights.div_(denominator)


def _only(weights: Tensor, keep: Tensor) -> Tensor:
    """The weights of kept keys, 0 elsewhere."""
    return weights.masked_fill(~keep, 0.0) if weights.requires_grad else weights.masked_fill_(~keep, 0.0)


def _whole(block: Block, denominator: Tensor) -> Tensor:
    """The denominator with the sink's part; stores the share without it in the block."""
    if block.sinks is None:
        return denominator
    whole = block.with_sink(denominator)
    block.share = denominator / whole
    return whole


@torch.no_grad()
def select(block: Block, spec: LayerSpec, tables: RowTables, calibrator: Calibrator | None = None) -> Tensor:
    """The keys that `spec` keeps in the block, `[B, H, R, E]` bool; rows with n <= K are left dense.
    calibrator: observes the block first."""
    if calibrator is not None:
        calibrator.observe(block)
    if not spec.sparse:
        return block.visible
    keep = spec.method.keep(block, tables)
    return keep | (~spec.may_drop(block.n)[:, None, :, None] & block.visible)


def mean_of_visible(v: Tensor, rows: Rows) -> Tensor:
    """The mean of V over each row's visible keys, `[B, H_kv, Q, D]` float32; 0 for a row that sees no key.

    Causal rows share one running sum; any other mask costs a matrix product.
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


def block_rows(elements_per_row: int, q_len: int, device: str) -> int:
    """The number of query rows of a block such that its scores stay within BLOCK_ELEMENTS."""
    budget = BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cpu"])
    return max(1, min(q_len, budget // max(1, elements_per_row)))
