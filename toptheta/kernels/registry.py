"""The one place that chooses how sparse attention is computed: a kernel where one fits, else plain PyTorch.

TOPTHETA_KERNEL=reference|cpu|triton in the environment forces one; it is read when this module is imported.
"""

import os

from torch import Tensor

from toptheta.attention.reference import Counts, LayerSpec, sparse_attention
from toptheta.attention.rows import Rows
from toptheta.calibration.sampler import LayerCalibration
from toptheta.kernels.cpu import backend as cpu
from toptheta.kernels.int8_keys import Int8Keys
from toptheta.kernels.triton import backend as gpu
from toptheta.methods.params import TOP_THETA
from toptheta.util.errors import UsageError

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
    count: bool = False,
    v_sum: Tensor | None = None,
    int8: Int8Keys | None = None,
    count_rows: bool = False,
) -> tuple[Tensor, Counts | None]:
    """`sparse_attention` of attention/reference.py by the path that fits: the same arguments and results.

    v_sum: `[B, H_kv, D]` float32, sum of V over the visible keys of the only query row, if known; it spares
    the kernels reading all of V. int8: the copy of k, which spares the Triton kernels reading all of K; the
    others have no use for it. Raises UsageError when TOPTHETA_KERNEL asks for what cannot be.
    """
    path = _path(q, k, v, rows, spec, count_rows)
    if path == "cpu":
        return cpu.attend(q, k, v, rows, spec, scale, theta, table, count, v_sum, count_rows)
    if path == "triton":
        return gpu.attend(q, k, v, rows, spec, scale, theta, table, count, v_sum, int8)
    return sparse_attention(q, k, v, rows, spec, scale, theta, table, count=count, count_rows=count_rows)


def calibrate(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, spec: LayerSpec, scale: float, calibration: LayerCalibration
) -> Tensor:
    """Attention of `spec` (dense or Top-k), `[B, H, Q, D]`, while `calibration` takes its samples.

    The Triton kernels rank no row for its sample: on a GPU this is plain PyTorch, whatever TOPTHETA_KERNEL
    says."""
    calibration.start_call(rows.n, rows.real, q.shape[0], k.shape[2])
    if FORCED == "triton" or _path(q, k, v, rows, spec) != "cpu":
        return sparse_attention(q, k, v, rows, spec, scale, calibrator=calibration)[0]
    ks, chosen = calibration.ks, calibration.chosen
    assert chosen is not None
    output = spec if spec.sparse else cpu.DENSE_SPEC
    # Top-k's R is known in the same pass; that of thresholds only once this prompt's samples are in them.
    topk_missing = calibration.with_sdc and calibration.mode != TOP_THETA
    got = cpu.calibrate(q, k, v, rows, scale, ks, spec.placement, output, topk_missing, chosen=chosen)
    calibration.take(got.values, got.missing, rows.n)
    if calibration.with_sdc and not topk_missing:
        thetas = [calibration.running_threshold(k_) for k_ in ks]
        second = cpu.calibrate(q, k, v, rows, scale, ks, spec.placement, None, True, thetas, chosen)
        calibration.take(None, second.missing, rows.n)
    assert got.out is not None
    return got.out


def _path(q: Tensor, k: Tensor, v: Tensor, rows: Rows, spec: LayerSpec, count_rows: bool = False) -> str:
    """Which of CHOICES computes this call. Raises UsageError when TOPTHETA_KERNEL cannot be obeyed."""
    if FORCED is None:
        if q.is_cuda:
            return "triton" if gpu.unsupported(q, k, v, rows, spec, count_rows) is None else "reference"
        return "cpu" if cpu.supports(q, k, v, rows, spec) else "reference"
    if FORCED not in CHOICES:
        raise UsageError(
            f"TOPTHETA_KERNEL={FORCED} is none of {', '.join(CHOICES)}: set one of them, or unset it."
        )
    why = None
    if FORCED == "triton":
        why = gpu.unsupported(q, k, v, rows, spec, count_rows)
    elif FORCED == "cpu":
        why = cpu.unsupported(q, k, v, rows, spec)
        if why is None and isinstance(missing := cpu.load(), str):
            why = missing
    if why is not None:
        raise UsageError(
            f"TOPTHETA_KERNEL={FORCED} cannot be obeyed, because {why}: unset it, or set it to reference."
        )
    return FORCED
