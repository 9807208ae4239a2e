"""Effective K: how many elements individual rows keep, as histograms by row length.

Covers counting rows on the device, and the statistics derived from the counts. A histogram is an int64 array
`[LENGTHS, KEPT + 1]`: the number of rows by bin of lengths and bin of kept elements; the last column is the
exact sum of kept elements. Its size is fixed, and histograms of one layer and phase can be added.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# First length of each bin, four bins an octave from 16 on; the last bin is open.
LENGTH_EDGES = np.array([0, *(round(2 ** (i / 4)) for i in range(16, 81))])
# First count of each bin: whole numbers below 64, then 32 bins an octave up to 2^20. The middle of a bin is
# at most 1/64 of any count in it away from that count.
KEPT_EDGES = np.concatenate([np.arange(64), *(np.arange(32, 64) << shift for shift in range(1, 15))])
RELATIVE_ERROR = 1 / 64
LENGTHS, KEPT = len(LENGTH_EDGES), len(KEPT_EDGES)
LONGEST = 2**31 - 1  # the end of the last bin of lengths, which is open
PERCENTS = (5, 50, 95)
COLUMNS = ("layer", "phase", "n_low", "n_high", "k", "rows", "mean", "p5", "p50", "p95")

_MIDDLES = np.append((KEPT_EDGES[:-1] + KEPT_EDGES[1:] - 1) / 2, KEPT_EDGES[-1])


def empty_histogram(device: torch.device | str = "cpu") -> Tensor:
    return torch.zeros(LENGTHS, KEPT + 1, dtype=torch.int64, device=device)


@cache
def _edges(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(LENGTH_EDGES, device=device), torch.tensor(KEPT_EDGES, device=device)


def count_rows(histogram: Tensor, kept: Tensor, n: Tensor, used: Tensor) -> None:
    """Add rows to `histogram`, in place and without a device synchronisation.

    kept: `[B, H, Q]` elements that each row keeps; n: `[B or 1, Q]` row lengths; used: `[B or 1, Q]` bool,
    the rows that count.
    """
    length_edges, kept_edges = _edges(histogram.device)
    kept = kept.long()
    at = torch.bucketize(n.contiguous(), length_edges, right=True) - 1
    index = at[:, None] * (KEPT + 1) + torch.bucketize(kept.contiguous(), kept_edges, right=True) - 1
    histogram.view(-1).index_add_(0, index.flatten(), used[:, None].expand_as(index).flatten().long())
    sums = kept.sum(dim=1) * used
    histogram[:, -1].index_add_(0, at.expand_as(sums).flatten(), sums.flatten())


def summary(counts: np.ndarray) -> dict[str, Any]:
    """rows, and mean (exact), p5, p50 and p95 of the kept elements, from the counts `[KEPT + 1]` of at least
    one row.

    Percentile p is the smallest number such that p % of the rows keep no more than it; it is exact below 64,
    and within RELATIVE_ERROR above.
    """
    total = int(counts[:-1].sum())
    below = counts[:-1].cumsum()
    values: dict[str, Any] = {"rows": total, "mean": float(counts[-1] / total)}
    for percent in PERCENTS:
        rank = -(-percent * total // 100)
        values[f"p{percent}"] = float(_MIDDLES[np.searchsorted(below, rank)])
    return values


def by_length(histogram: np.ndarray, layer: int, phase: str, k: int) -> list[dict[str, Any]]:
    """A row of COLUMNS for each bin of row lengths that occurred; n_low and n_high are inclusive."""
    ends = np.append(LENGTH_EDGES[1:] - 1, LONGEST)
    return [
        {
            "layer": layer,
            "phase": phase,
            "n_low": max(int(LENGTH_EDGES[i]), k + 1),
            "n_high": int(ends[i]),
            "k": k,
        }
        | summary(histogram[i])
        for i in np.flatnonzero(histogram[:, :-1].any(axis=1))
    ]


def overall(histograms: dict[int, np.ndarray], phase: str, ks: tuple[int, ...]) -> list[dict[str, Any]]:
    """For each K: phase, k, the summary over all its layers and lengths, and `layers`, the summary of each
    layer.

    histograms: by layer; ks: K of every layer.
    """
    records = []
    for k in sorted({ks[layer] for layer in histograms}):
        counts = {i: h.sum(axis=0) for i, h in sorted(histograms.items()) if ks[i] == k and h.any()}
        if counts:
            layers = [{"layer": layer} | summary(own) for layer, own in counts.items()]
            whole = summary(np.sum(list(counts.values()), axis=0))
            records.append({"phase": phase, "k": k} | whole | {"layers": layers})
    return records
