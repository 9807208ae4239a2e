"""Where the Triton kernels can run here, and inputs for them.

On a GPU the tests run as they are. Without one they run in Triton's interpreter, which has to be chosen
before Triton is imported (transformers does that): test_interpreter.py runs them in a process of its own.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.calls import layer_spec
from tests.helpers.kernel_cases import K, inputs
from toptheta.attention.rows import Rows
from toptheta.kernels.triton import backend as gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = gpu.INTERPRETED or DEVICE.type == "cuda"
HAS_TRITON = importlib.util.find_spec("triton") is not None

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
here = pytest.mark.skipif(
    not (HAS_TRITON and HERE), reason="needs a GPU or TRITON_INTERPRET=1: see test_in_the_interpreter"
)

if HAS_TRITON and gpu.INTERPRETED:
    import triton.runtime.interpreter as interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def with_an_index(tensor, scope):
        """Triton 3.6 takes int() of arrays of one element as loop bounds, which NumPy 2.4 refuses."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_an_index


def on_device(rows: Rows) -> Rows:
    def move(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(DEVICE)

    return replace(
        rows,
        n=rows.n.to(DEVICE),
        real=move(rows.real),
        mask=move(rows.mask),
        key_real=move(rows.key_real),
        first_on_device=move(rows.first_on_device),
    )


def draw(batch: int, heads: tuple[int, int, int], q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """`inputs` with scores of standard deviation 2: at these head_dims the thresholds would drop all."""
    q, k, v = inputs(batch, heads, q_len, kv_len)
    return q * 4, k, v


FEW = [
    layer_spec(0, "pre-softmax", K, "exact", vmc=True),
    layer_spec(0, "pre-softmax", K, "offline-calibrated", 1.3, vmc=True),
    layer_spec(0, "post-softmax", K, vmc=True),
]
