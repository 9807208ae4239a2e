"""What a decode step writes to a TopThetaCache (its key and value, their int8 code, the sum of V), as PyTorch
operators. The kernels are in append.py; like backend.py this module can be imported without Triton.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from toptheta.attention.call import Int8Keys
from toptheta.kernels.triton.backend import (
    DTYPES,
    HAS_TRITON,
    INTERPRETED,
    MAX_HEAD_DIM,
    on_device_of,
    too_old_here,
)


def appends(k: Tensor, v: Tensor) -> bool:
    """Whether `append` and `add_value` take the rows of a decode step, `[B, H_kv, 1, D]`. Compiled models
    fuse what takes their place."""
    device = k.device
    if not HAS_TRITON or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        return False
    on_gpu = device.type == "cuda"
    if too_old_here(device) is not None if on_gpu else not INTERPRETED:
        return False
    fits = k.shape == v.shape and k.shape[2] == 1 and k.shape[3] <= MAX_HEAD_DIM
    if not (fits and k.dtype == v.dtype and k.dtype in DTYPES):
        return False
    return not on_gpu or _append_works(device, k.dtype, k.shape[3])


_append_tried: dict[tuple[torch.device, torch.dtype, int], bool] = {}


def _append_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Try `append` and `add_value` on a small cache, once for each kind; warns if they fail. While a CUDA
    graph is captured nothing can be built, and what was not tried before is assumed to work."""
    key = (device, dtype, head_dim)
    if key not in _append_tried:
        if torch.cuda.is_current_stream_capturing():
            return True
        options: dict[str, Any] = {"device": device}
        keys = torch.zeros(1, 1, 2, head_dim, dtype=dtype, **options)
        end = torch.zeros((), dtype=torch.int64, **options)
        finished = torch.zeros(1, dtype=torch.int32, **options)
        row = torch.zeros(1, 1, 2, **options)
        mean = torch.zeros(1, 1, head_dim, **options)
        try:
            append(
                keys[:, :, :1], keys[:, :, :1], keys, keys.clone(), end, finished, keys.char(), row, row, mean
            )
            add_value(keys, end, None, mean.double())
            _append_tried[key] = True
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton raises whatever its passes raise
            _append_tried[key] = False
            name = torch.cuda.get_device_name(device)
            warnings.warn(
                f"toptheta updates its cache by several small kernels on {name}, as its own does not build "
                f"there: {str(error).strip() or repr(error)}",
                stacklevel=2,
            )
    return _append_tried[key]


@torch.library.custom_op(
    "toptheta::append", mutates_args=("keys", "values", "end", "finished", "codes", "steps", "slacks")
)
def append(
    new_k: Tensor,
    new_v: Tensor,
    keys: Tensor,
    values: Tensor,
    end: Tensor,
    finished: Tensor,
    codes: Tensor | None,
    steps: Tensor | None,
    slacks: Tensor | None,
    k_mean: Tensor | None,
) -> None:
    """`append` of append.py as an operator."""
    from toptheta.kernels.triton import append as triton_append

    int8 = None
    if codes is not None:
        assert steps is not None and slacks is not None and k_mean is not None
        int8 = Int8Keys(codes, steps, slacks, k_mean)
    new_k, new_v = (x if x.stride(3) == 1 else x.contiguous() for x in (new_k, new_v))
    with on_device_of(keys):
        triton_append.append(new_k, new_v, keys, values, end, finished, int8)


@torch.library.custom_op("toptheta::add_value", mutates_args=("total",))
def add_value(values: Tensor, end: Tensor, mask: Tensor | None, total: Tensor) -> Tensor:
    """`add_value` of append.py as an operator."""
    from toptheta.kernels.triton import append as triton_append

    mask = mask if mask is None or mask.stride(3) == 1 else mask.contiguous()
    with on_device_of(values):
        return triton_append.add_value(values, end, mask, total)


@append.register_fake
def _(new_k, new_v, keys, values, end, finished, codes, steps, slacks, k_mean):
    return None


@add_value.register_fake
def _(values, end, mask, total):
    return total.new_empty(total.shape, dtype=torch.float32)
