"""Whether the Triton kernels build and run on this GPU: tried on small calls, once for each kind."""

import warnings
from typing import Any, NamedTuple

import torch

from toptheta.attention.call import AttentionCall
from toptheta.attention.rows import Rows, rows_of
from toptheta.kernels.int8_keys import quantized, serves
from toptheta.kernels.triton import backend
from toptheta.methods.base import Method, Selection
from toptheta.methods.dense import Dense
from toptheta.methods.params import LayerSpec
from toptheta.methods.top_k import TopK
from toptheta.methods.top_theta import TopTheta

SMALL = 128  # keys, and rows of a prompt
K = 8
# Which keys rows see: all before them; except padding; or by a mask that may be of any kind.
CAUSAL, PADDED, MASKED = "causal", "padded", "masked"


class Kind(NamedTuple):
    """What decides how the kernels are built: the options that are constants of a kernel, and what a call has
    besides q, k and v. group: query heads of a KV head."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    group: int
    prompt: bool
    sees: str
    selection: int
    placement: str
    sdc: str
    vmc: bool
    weighed: bool
    key_bits: int
    int8: bool
    counts: bool

    def call(self) -> AttentionCall:
        """A small call of this kind."""
        q_len = SMALL if self.prompt else 1
        q = torch.zeros(1, self.group, q_len, self.head_dim, device=self.device, dtype=self.dtype)
        k = torch.zeros(1, 1, SMALL, self.head_dim, device=self.device, dtype=self.dtype)
        spec = LayerSpec(self._method(), self.placement, K, self.sdc, vmc=self.vmc)
        table = torch.zeros(self.group, 1, device=self.device)
        call = AttentionCall(q, k, k, self._rows(q_len), spec, 1.0, table, table, self.counts)
        call.decode = self.key_bits > 0
        if self.weighed:
            call.factor = torch.ones(1, self.group, SMALL, device=self.device)
        call.int8 = quantized(k) if self.int8 else None
        return call

    def _method(self) -> Method:
        if self.selection == Selection.LARGEST:
            return TopK()
        if self.selection == Selection.ALL:
            return Dense()
        copy = f"int{self.key_bits}" if self.key_bits else "none"
        return TopTheta(value_aware=self.weighed, key_copy=copy)

    def _rows(self, q_len: int) -> Rows:
        if self.sees == CAUSAL:
            return rows_of(None, q_len, SMALL, self.device)
        at = torch.arange(SMALL, device=self.device)
        mask = (at <= at[SMALL - q_len :, None])[None, None]
        mask = mask & (at > 0)  # the first key is padding
        rows = rows_of(mask, q_len, SMALL, self.device)
        if self.sees == PADDED:
            rows.first, rows.causal = SMALL - q_len, True
            rows.key_real = (at > 0)[None]
        return rows


def kind_of(call: AttentionCall) -> Kind:
    q, spec, rows, sees = call.q, call.kernel, call.rows, CAUSAL
    assert spec is not None
    if rows.mask is not None:
        sees = MASKED if rows.first is None and rows.first_on_device is None else PADDED
    return Kind(
        q.device,
        q.dtype,
        q.shape[3],
        q.shape[1] // call.k.shape[1],
        q.shape[2] > 1,
        sees,
        int(spec.selection),
        spec.placement,
        spec.sdc,
        spec.vmc,
        spec.weighed,
        call.key_bits,
        call.int8 is not None and q.shape[2] == 1 and serves(spec),
        call.count,
    )


def ready(call: AttentionCall) -> str | None:
    """Why the kernels do not build or run for calls of this kind on this GPU, or None: see `probe`. While a
    CUDA graph is captured nothing can be built, and what was not tried before is assumed to work."""
    if call.q.device.type != "cuda" or call.kernel is None:
        return None
    capturing = not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
    return probe(capturing, *kind_of(call))


_probed: dict[Kind, str | None] = {}


@torch.compiler.assume_constant_result
def probe(only_known: bool, *kind: Any) -> str | None:
    """Try the kernels on a small call, once for each Kind; returns None, or why they fail. Warns once if they
    do: a compiler may fail for a chip that nobody has tried, or a tile not fit its shared memory."""
    asked = Kind(*kind)
    if asked in _probed or only_known:
        return _probed.get(asked)
    try:
        backend.run(asked.call())
        _probed[asked] = None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton raises whatever its passes raise
        said = str(error).strip().splitlines()
        _probed[asked] = (
            f"the kernels do not build for this GPU ({type(error).__name__}: {said[0] if said else ''})"
        )
        device = asked.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
        warnings.warn(
            f"toptheta computes attention in plain PyTorch on {name} in {asked.dtype} with head_dim "
            f"{asked.head_dim}, slower and in more memory than by its kernels: "
            f"{said[0] if said else error!r}.",
            stacklevel=2,
        )
    return _probed[asked]
