"""The one place that chooses how sparse attention is computed: a kernel where one fits, else plain PyTorch.

TOPTHETA_KERNEL=reference|cpu|triton in the environment forces one; it is read when this module is imported.
"""

import os

from torch import Tensor

from toptheta.attention import Calibrator, Counts, LayerSpec, sparse_attention
from toptheta.errors import UsageError
from toptheta.kernels import cpu
from toptheta.rows import Rows

CHOICES = ("reference", "cpu", "triton")
FORCED = os.environ.get("TOPTHETA_KERNEL") or None


def attend(
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
    v_sum: Tensor | None = None,
) -> tuple[Tensor, Counts | None]:
    """`sparse_attention` of toptheta/attention.py by the path that fits: the same arguments and results.

    v_sum: `[B, H_kv, D]` float32, sum of V over the visible keys of the only query row, if known; it spares
    the kernels reading all of V. Raises UsageError when TOPTHETA_KERNEL asks for what cannot be.
    """
    if FORCED is None and calibrator is None and cpu.supports(q, k, v, rows, spec):
        return cpu.attend(q, k, v, rows, spec, scale, theta, table, count, v_sum)
    if FORCED not in (None, "reference"):
        _check_forced(q, k, v, rows, spec, calibrator)
        return cpu.attend(q, k, v, rows, spec, scale, theta, table, count, v_sum)
    return sparse_attention(q, k, v, rows, spec, scale, theta, table, calibrator, count)


def _check_forced(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, spec: LayerSpec, calibrator: Calibrator | None
) -> None:
    """Raise UsageError unless the kernel that TOPTHETA_KERNEL names can take this call."""
    if FORCED not in CHOICES:
        raise UsageError(
            f"TOPTHETA_KERNEL={FORCED} is none of {', '.join(CHOICES)}: set one of them, or unset it."
        )
    if FORCED == "triton":
        raise UsageError("TOPTHETA_KERNEL=triton is not there yet: unset it, or set it to reference.")
    why = cpu.unsupported(q, k, v, rows, spec)
    if why is None and calibrator is not None:
        why = "a Calibrator wants to see the scores"
    if why is None and isinstance(missing := cpu.load(), str):
        why = missing
    if why is not None:
        raise UsageError(
            f"TOPTHETA_KERNEL=cpu cannot be obeyed, because {why}: unset it, or set it to reference."
        )
