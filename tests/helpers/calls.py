"""Specs by the published numbers, and calls from positional arguments."""

from torch import Tensor

from toptheta.attention.call import AttentionCall
from toptheta.attention.rows import Rows
from toptheta.methods.base import of_mode
from toptheta.methods.params import AttentionParams, LayerSpec


def layer_spec(
    mode: int = 3,
    placement: str = "none",
    k: int = 0,
    sdc: str = "none",
    sdc_scale: float = 1.0,
    vmc: bool = False,
    capk: bool = False,
) -> LayerSpec:
    """What a layer computes in the published project's mode 0, 1 or 3."""
    method = AttentionParams(method=of_mode(mode)).changed({"capk": capk} if capk else {}).method
    return LayerSpec(method, placement, k, sdc, sdc_scale, vmc)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    spec: LayerSpec,
    scale: float,
    theta: Tensor | None = None,
    table: Tensor | None = None,
    **more,
) -> AttentionCall:
    return AttentionCall(q, k, v, rows, spec, scale, theta, table, **more)
