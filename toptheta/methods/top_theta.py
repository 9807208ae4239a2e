"""Top-theta: what is strictly greater than a calibrated threshold (arXiv 2502.08363, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toptheta.methods.base import NEG_INF, Block, KernelSpec, Method, RowTables, Selection, register
from toptheta.methods.top_k import TopK


@register
@dataclass(frozen=True)
class TopTheta(Method):
    """capk: of what passes the threshold, keep the K most recent only."""

    capk: bool = False

    name = "top_theta"
    title = "Top-theta"
    source = "Top-Theta Attention, arXiv 2502.08363"
    mode = 0
    needs_thresholds = True
    aims_at_k = True

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        assert tables.theta is not None
        keep = keep_above(block.x, tables.theta, block.row_max)
        return keep_recent(keep, block.budget) if self.capk else keep

    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(Selection.THRESHOLD, capk=self.capk)

    def while_calibrating(self, tac: bool) -> Method:
        return TopK() if tac else super().while_calibrating(tac)

    def for_sdc_samples(self) -> Method:
        return TopTheta()  # as the published project: no cap while calibrating


def keep_above(x: Tensor, theta: Tensor, row_max: Tensor) -> Tensor:
    """Keep what is strictly greater than theta; where nothing is, keep the row's largest (all of them on a
    tie).

    x: `[..., R, E]` scores or weights, theta and row_max: `[..., R, 1]`. theta of -inf keeps every visible
    key.
    """
    below_max = torch.nextafter(row_max, torch.full_like(row_max, NEG_INF))
    return x > torch.minimum(theta, below_max)


def keep_recent(keep: Tensor, k: int) -> Tensor:
    """Of the kept keys `[..., R, E]` keep only the k most recent."""
    newer = keep.sum(dim=-1, keepdim=True) - keep.cumsum(dim=-1)
    return keep & (newer < k)
