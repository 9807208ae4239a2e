"""Calibration samples of the CPU kernel, drawn in the pass that computes attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall
from toptheta.calibration.sampler import LayerCalibration
from toptheta.kernels.cpu.prepared import Prepared, inputs
from toptheta.methods.base import KernelSpec


def calibrate(call: AttentionCall, calibration: LayerCalibration) -> Tensor:
    """Attention of `call`, dense or Top-k, `[B, H, Q, D]`, while `calibration` takes its samples."""
    ks, chosen = calibration.ks, calibration.chosen
    assert chosen is not None
    # The missing denominator R of Top-k is computed in the same pass. R of thresholds needs a second pass,
    # after this call's samples have entered the thresholds.
    at_once = calibration.with_sdc and not calibration.thresholds
    got = sample(call, ks, calibration.placement, True, at_once, chosen=chosen)
    calibration.take(got.values, got.missing, call.rows.n)
    if calibration.with_sdc and not at_once:
        thetas = [calibration.running_threshold(k) for k in ks]
        second = sample(call, ks, calibration.placement, False, True, thetas, chosen)
        calibration.take(None, second.missing, call.rows.n)
    assert got.out is not None
    return got.out


@dataclass
class Samples:
    """What a calibration pass returns. values: `[len(ks), B, H, Q]` float32, the (K+1)-th largest score or
    weight of each row; missing: R of SDC 'exact', of the same shape, or None. Both are 0 where n <= K or the
    row was not chosen. out: `[B, H, Q, D]`, or None."""

    values: Tensor
    missing: Tensor | None
    out: Tensor | None


def sample(
    call: AttentionCall,
    ks: Sequence[int],
    placement: str,
    output: bool = True,
    missing: bool = False,
    missing_theta: Sequence[Tensor] | None = None,
    chosen: Tensor | None = None,
) -> Samples:
    """The calibration samples of every row (DESIGN section 4) and, in the same pass, attention.

    call: the attention to compute if `output`: dense, or Top-k with its placement and VMC. missing: also
    compute R of the keys that Top-k would drop or, with missing_theta (a `[H, L]` table for each K), that
    those thresholds would drop. chosen: `[B or 1, Q]` bool, the rows to sample; None: all.
    """
    spec = call.kernel if output else KernelSpec()
    assert spec is not None
    if spec.sparse and spec.placement != placement:
        raise ValueError(f"the output is {spec.placement}, but the samples are {placement}")
    prepared = Prepared(spec, call.scale, *inputs(call, spec))
    args, shape = prepared.args, (len(ks), *call.q.shape[:3])
    args.post_softmax = placement == "post-softmax"
    out = prepared.output() if output else None
    args.ks, args.num_ks = prepared.keep(torch.tensor(tuple(ks))).data_ptr(), len(ks)
    values = torch.zeros(shape, dtype=torch.float32)
    args.samples = values.data_ptr()
    missing_sums = torch.zeros(shape, dtype=torch.float32) if missing else None
    if missing_sums is not None:
        args.missing = missing_sums.data_ptr()
        if missing_theta is not None:
            tables = prepared.keep(torch.stack(tuple(missing_theta)).float().contiguous())
            args.missing_theta, args.missing_len = tables.data_ptr(), tables.shape[2]
    if chosen is not None:
        chosen = prepared.keep(chosen.contiguous())
        args.chosen, args.chosen_batch = chosen.data_ptr(), chosen.stride(0) if chosen.shape[0] > 1 else 0
    prepared.run()
    return Samples(values, missing_sums, None if out is None else out.to(call.q.dtype))
