"""The Triton kernels as operators: torch.compile and CUDA graphs."""

import math

import pytest
import torch
from torch import Tensor

from tests.helpers.calls import call, layer_spec
from tests.helpers.kernel_cases import SCALE, K, tables
from tests.kernels.triton.helpers import DEVICE, FEW, draw, here, on_device
from toptheta.attention.rows import rows_of
from toptheta.kernels import int8_keys as two_tier
from toptheta.kernels.triton import backend as gpu
from toptheta.methods.key_codes import KeyCodes


@here
def test_operators_have_true_fakes():
    """The registered fakes have the shapes and types of the true outputs."""
    q, k, v = (x.to(DEVICE) for x in draw(2, (4, 2, 16), 1, 40))
    n, theta = torch.full((1, 1), 40, device=DEVICE), torch.full((1, 1), 0.5, device=DEVICE)
    settings = (SCALE, 0, "pre-softmax", K, "exact", 1.0, False, True)
    checks = ("test_schema", "test_faketensor")
    int8 = two_tier.quantized(k)
    for tiers in ((None,) * 4, (int8.codes, int8.steps, int8.slacks, int8.mean)):
        decode = (q, k, v, n, None, None, theta, None, None, *tiers, None, None, *settings, 0)
        torch.library.opcheck(gpu._decode, decode, test_utils=checks)
    copy = KeyCodes.around(k.mean(dim=2), 4)
    copy.put(k, 0)
    on_weights = (SCALE, 0, "post-softmax", K, "none", 1.0, False, True)
    decode = (
        q, k, v, n, None, None, theta, None, None, copy.codes, copy.steps, None, copy.mean, None, None,
        *on_weights, 4,
    )  # fmt: skip
    torch.library.opcheck(gpu._decode, decode, test_utils=checks)
    n = torch.arange(1, 2, device=DEVICE)[None]
    first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    prefill = (q, k, v, n, first, None, None, None, theta, None, None, None, *settings)
    torch.library.opcheck(gpu._prefill, prefill, test_utils=checks)


@here
@pytest.mark.parametrize("q_len", [1, 20])
def test_compiles_whole(q_len):
    """One graph without a break, which uses thresholds that were changed in place."""
    torch.manual_seed(8)
    q, k, v = (x.to(DEVICE) for x in draw(1, (2, 1, 16), q_len, 70 if q_len == 1 else q_len))
    rows = on_device(rows_of(None, q_len, k.shape[2], torch.device("cpu")))
    theta = torch.full((2, 71), -math.inf, device=DEVICE)
    compiled = torch.compile(
        lambda: gpu.run(call(q, k, v, rows, FEW[0], SCALE, theta))[0], fullgraph=True, backend="aot_eager"
    )
    for value in (-math.inf, 1.0, 2.0):
        theta[:, K + 1 :] = value
        expected = gpu.run(call(q, k, v, rows, FEW[0], SCALE, theta))[0]
        torch.testing.assert_close(compiled(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("spec", [*FEW, layer_spec(1, "pre-softmax", K, "exact")], ids=str)
def test_cuda_graph(spec):
    """Nothing waits for the device, and a replay uses the thresholds and queries of its own time."""
    torch.manual_seed(9)
    q, k, v = (x.to(DEVICE) for x in draw(2, (8, 2, 64), 1, 1000))
    rows = on_device(rows_of(None, 1, 1000, torch.device("cpu")))
    theta, table = (x.to(DEVICE) for x in tables(spec, 8, 1001))

    def once() -> Tensor:
        return gpu.run(call(q, k, v, rows, spec, SCALE, theta, table))[0]

    once()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = once()
    for _ in range(3):
        q.mul_(0.9)
        theta.mul_(0.8)
        graph.replay()
        assert torch.equal(out, once())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("q_len", [1, 20])
def test_tensors_on_another_device(q_len):
    """The layers of a model that is spread over several GPUs: the current device is another."""
    torch.manual_seed(11)
    got = []
    inputs = draw(1, (2, 1, 64), q_len, 70)
    theta, table = tables(FEW[0], 2, 71)
    for device in ("cuda:0", "cuda:1"):
        rows = rows_of(None, q_len, 70, torch.device(device))
        moved = [x.to(device) for x in (*inputs, theta, table)]
        out, _ = gpu.run(call(*moved[:3], rows, FEW[0], SCALE, *moved[3:]))
        got.append(out.cpu())
    assert torch.equal(*got)
