"""Chooses how attention is computed: by a backend that supports the call, else by the reference.

The environment variable TOPTHETA_KERNEL=reference|cpu|triton forces a choice; it is read when this module is
imported. A backend is one line in BACKENDS.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall, Counts
from toptheta.attention.reference import sparse_attention
from toptheta.calibration.sampler import LayerCalibration, RowSampler
from toptheta.kernels.cpu import backend as cpu
from toptheta.kernels.cpu import samples
from toptheta.kernels.triton import backend as triton
from toptheta.kernels.triton import probe
from toptheta.kernels.tuned import use_tiles
from toptheta.methods.params import LayerSpec
from toptheta.methods.top_k import TopK
from toptheta.methods.top_theta import TopTheta
from toptheta.util.errors import UsageError


@dataclass(frozen=True)
class Backend:
    """How calls are computed on one type of device.

    unsupported: why it cannot compute a call, or None if it can. ready: why no call of this kind can be
    computed on this machine, or None; this may build and load the kernels, and warns once if that fails. run:
    computes `sparse_attention`. calibrate: computes attention and takes calibration samples; None if the
    backend cannot. keys_read: see the function below; None if it always reads all of K.
    """

    name: str
    device: str
    unsupported: Callable[[AttentionCall], str | None]
    run: Callable[[AttentionCall], tuple[Tensor, Counts | None]]
    calibrate: Callable[[AttentionCall, LayerCalibration], Tensor] | None = None
    ready: Callable[[AttentionCall], str | None] = lambda call: None
    keys_read: Callable[[AttentionCall], Tensor | None] | None = None


def _ready_on_gpu(call: AttentionCall) -> str | None:
    if call.q.device.type == "cuda":
        use_tiles(call.q.device)
    return probe.ready(call)


BACKENDS = (
    Backend("cpu", "cpu", cpu.unsupported, cpu.run, samples.calibrate, cpu.ready),
    Backend("triton", "cuda", triton.unsupported, triton.run, None, _ready_on_gpu, triton.keys_read),
)
CHOICES = ("reference", *(backend.name for backend in BACKENDS))
FORCED = os.environ.get("TOPTHETA_KERNEL") or None


def attend(call: AttentionCall) -> tuple[Tensor, Counts | None]:
    """`sparse_attention` of attention/reference.py, computed by the backend that `choose` selects. Raises
    UsageError if the backend set by TOPTHETA_KERNEL cannot compute this call."""
    seen = _prompt_rows(call)
    if seen is not None:
        return _dense_prompt(call, seen)
    backend = choose(call)
    return sparse_attention(call) if backend is None else backend.run(call)


def _dense_prompt(call: AttentionCall, seen: int) -> tuple[Tensor, Counts | None]:
    """A prompt that the method leaves dense, of which it sees the last `seen` rows in plain PyTorch."""
    if seen > 0:
        last = replace(call, q=call.q[:, :, -seen:], rows=call.rows.last(seen), count=False, count_rows=False)
        sparse_attention(last)
    return attend(replace(call, spec=LayerSpec(), state=None))


def _prompt_rows(call: AttentionCall) -> int | None:
    """Of a prompt that is dense, how many of the last rows the method has to see; None: the method computes
    the whole call."""
    spec, q_len, real = call.spec, call.q.shape[2], call.rows.real
    if FORCED is not None or torch.compiler.is_compiling() or call.decode:
        return None
    if not spec.sparse or not spec.method.decode_only:
        return None
    if spec.method.needs_prompt and call.q.device.type != "cpu":
        return None  # what follows would wait for the device in every layer
    seen = spec.method.prompt_rows(spec.k, call.state)
    if seen is None or seen >= q_len or seen > 0 and real is not None and not real[:, -seen:].all():
        return None
    return seen


def keys_read(call: AttentionCall) -> Tensor | None:
    """`[B, H_kv]`, the K rows that the call reads when the int8 copy of K replaces the others; None if the
    copy is not used. For statistics: computed separately, in plain PyTorch."""
    if call.int8 is None:
        return None
    backend = choose(call)
    return None if backend is None or backend.keys_read is None else backend.keys_read(call)


def calibrate(call: AttentionCall, calibration: RowSampler) -> Tensor:
    """Attention of `call` (dense or Top-k), `[B, H, Q, D]`, while `calibration` takes its samples.

    The Triton kernels cannot find a row's K-th largest score: on a GPU the reference computes this, even with
    TOPTHETA_KERNEL=triton, unless samples are drawn independently of the attention (`apart`)."""
    calibration.start_call(call.rows.n, call.rows.real, call.q.shape[0], call.k.shape[2])
    if calibration.apart:
        calibration.sample(call)
        return attend(call)[0]
    assert isinstance(calibration, LayerCalibration)
    backend = None if FORCED == "triton" else choose(call)
    largest = isinstance(calibration.method, (TopK, TopTheta))  # whose dropped keys backends know
    if backend is None or backend.calibrate is None or calibration.with_sdc and not largest:
        return sparse_attention(call, calibration)[0]
    return backend.calibrate(call, calibration)


def choose(call: AttentionCall) -> Backend | None:
    """The backend that computes this call, None for the reference, with a warning for each reason. Raises
    UsageError if TOPTHETA_KERNEL is invalid or its backend cannot compute the call."""
    if FORCED is None:
        for backend in BACKENDS:
            if backend.device == call.q.device.type:
                why = _unsupported(backend, call)
                if why is not None and not torch.compiler.is_compiling():
                    _warn_once(why)
                return backend if why is None and backend.ready(call) is None else None
        return None
    if FORCED not in CHOICES:
        raise UsageError(
            f"TOPTHETA_KERNEL={FORCED} is not one of {', '.join(CHOICES)}: set one of them, or unset it."
        )
    if FORCED == "reference":
        return None
    backend = next(backend for backend in BACKENDS if backend.name == FORCED)
    why = _unsupported(backend, call) or backend.ready(call)
    if why is not None:
        raise UsageError(
            f"TOPTHETA_KERNEL={FORCED} cannot be used, because {why}: unset it, or set it to reference."
        )
    return backend


def _unsupported(backend: Backend, call: AttentionCall) -> str | None:
    return call.reference_only or backend.unsupported(call)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"toptheta computes attention in plain PyTorch, slower than by a kernel, because {reason}.",
        stacklevel=3,
    )
