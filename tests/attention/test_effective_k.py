"""Effective K: single rows counted by every path, histograms against raw counts."""

import numpy as np
import pytest
import torch

from tests.helpers import reference
from tests.helpers.calls import call, layer_spec
from tests.helpers.effective_k import histogram_of
from tests.helpers.kernel_cases import KINDS, K, case, inputs, needs_kernel, tables
from toptheta.attention import effective_k as effective
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import Rows
from toptheta.kernels.cpu import backend as cpu
from toptheta.methods.params import LayerSpec
from toptheta.models.recorder import Recorder

HEADS, SCALE = (4, 2, 16), 0.25


def slow_counts(q, k, v, rows: Rows, spec: LayerSpec, theta) -> torch.Tensor:
    """`[B, H, Q]` kept elements by the loops of tests/helpers/reference.py, 0 in padding rows."""
    batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2]
    end = rows.end(q_len, kv_len)
    visible = rows.visible(0, q_len, kv_len)
    seen = torch.zeros(batch, q_len, kv_len, dtype=torch.bool)
    seen[:, :, :end] = True if visible is None else visible[:, 0]
    kept = reference.attention(q, k, v, seen, spec, SCALE, theta)[1].sum(dim=-1)
    return kept if rows.real is None else kept * rows.real[:, None]


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_counted_alike_by_kernel_plain_path_and_loops(kind: str) -> None:
    torch.manual_seed(0)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = inputs(batch, HEADS, q_len, kv_len)
    capped = layer_spec(0, "pre-softmax", K, "exact", vmc=True, capk=True)
    for spec in (layer_spec(0, "pre-softmax", K), layer_spec(0, "post-softmax", K), capped):
        theta = (0.5 * tables(spec, HEADS[0], kv_len)[0]).clamp(max=50.0)  # the loops compute exp(theta)
        plain = sparse_attention(call(q, k, v, rows, spec, SCALE, theta, count=True, count_rows=True))[1]
        fast = cpu.run(call(q, k, v, rows, spec, SCALE, theta, count=True, count_rows=True))[1]
        slow = slow_counts(q, k, v, rows, spec, theta)
        assert slow.max() > 1 and plain.row.dtype == fast.row.dtype == torch.int32
        assert torch.equal(plain.row.long(), slow) and torch.equal(fast.row.long(), slow), spec
        assert torch.equal(slow.sum(dim=-1), plain.attn)
        for attend in (sparse_attention, cpu.run):
            assert attend(call(q, k, v, rows, spec, SCALE, theta, count=True))[1].row is None

        recorder = Recorder(effective_k=True)
        recorder.add(0, rows, K, plain, (batch, *HEADS[:2], kv_len))
        histogram = recorder.drain()[0][0].histogram
        n = rows.n if rows.real is None else rows.n * rows.real
        n = n.expand(batch, -1)[:, None].expand_as(slow)
        raw = [(int(a), int(b)) for a, b in zip(n.flatten(), slow.flatten()) if a > K]
        expected = np.zeros_like(histogram)
        for length, kept in raw:
            i = max(i for i, edge in enumerate(effective.LENGTH_EDGES) if edge <= length)
            j = max(j for j, edge in enumerate(effective.KEPT_EDGES) if edge <= kept)
            expected[i, j] += 1
            expected[i, -1] += kept
        assert raw and (histogram == expected).all()


@pytest.mark.parametrize("scale", [20, 64, 900, 100_000])
def test_percentiles_are_within_the_stated_error(scale: int) -> None:
    rng = np.random.default_rng(scale)
    kept = rng.lognormal(np.log(scale), 0.7, size=7001).astype(np.int64).clip(1, 2**20)
    n = kept + rng.integers(0, 3 * scale, size=len(kept))
    histogram = histogram_of(kept, n)
    for low, high, part in [
        (0, effective.LONGEST, histogram.sum(axis=0)),
        *zip(effective.LENGTH_EDGES, [*effective.LENGTH_EDGES[1:], effective.LONGEST], histogram),
    ]:
        raw = kept[(n >= low) & (n < high)]
        if not len(raw):
            assert not part.any()
            continue
        found = effective.summary(part)
        assert found["rows"] == len(raw) and found["mean"] == raw.sum() / len(raw)
        for percent in effective.PERCENTS:
            exact = np.percentile(raw, percent, method="inverted_cdf")
            error = abs(found[f"p{percent}"] - exact)
            assert error <= (exact * effective.RELATIVE_ERROR if exact >= 64 else 0.0)


def test_every_count_has_a_bin_within_the_stated_error() -> None:
    counts = np.concatenate([np.arange(1, 70_000), [2**20 - 1]])
    for kept in np.array_split(counts, 500):
        found = effective.summary(histogram_of(kept, kept).sum(axis=0))
        assert found["rows"] == len(kept)
    at = np.searchsorted(effective.KEPT_EDGES, counts, side="right") - 1
    assert (np.abs(effective._MIDDLES[at] - counts)[:-1] <= counts[:-1] / 64).all()
    assert (effective._MIDDLES[at][counts < 64] == counts[counts < 64]).all()
