"""The two-tier K (toptheta/kernels/int8_keys.py): what is kept must be what all of K keeps, always."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.calls import call, layer_spec
from tests.helpers.kernel_cases import SCALE, K, case, tables
from tests.kernels.triton.helpers import DEVICE, draw, here, on_device
from toptheta.attention.rows import Rows, rows_of
from toptheta.kernels import int8_keys as two_tier
from toptheta.kernels.triton import backend as gpu
from toptheta.methods.params import LayerSpec


@pytest.fixture(autouse=True)
def products_of_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter NumPy adds a score's terms in an order that depends on the tile's shape and on the
    processor: other than on a GPU, two kernels may round it to two numbers. In float64 it is one."""
    if not gpu.INTERPRETED:
        return
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if d.data.dtype != np.float32:
            return plain(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def both_tiers(q, k, v, rows: Rows, spec: LayerSpec, theta: Tensor, table: Tensor | None = None):
    """Output and counts from all of K, and from its int8 copy."""
    q, k, v, theta = (x.to(DEVICE) for x in (q, k, v, theta))
    arguments = (q, k, v, on_device(rows), spec, SCALE, theta, None if table is None else table.to(DEVICE))
    int8 = two_tier.quantized(k)
    one, two = gpu.run(call(*arguments, count=True)), gpu.run(call(*arguments, count=True, int8=int8))
    return *one, *two


@here
@pytest.mark.parametrize("sdc", ["none", "exact", "exp-threshold", "offline-calibrated"])
@pytest.mark.parametrize(
    "kind, head_dim", [("padded decode", 16), pytest.param("static decode", 40, marks=pytest.mark.long)]
)
def test_two_tiers_keep_the_same(kind, head_dim, sdc):
    """The selection is the same as from all of K, though most of K is not read, also in rows without a score
    above their threshold. The output is the same too, except with SDC 'exact', where it equals the
    reference's."""
    torch.manual_seed(5)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = draw(batch, (4, 2, head_dim), q_len, kv_len)
    k = k + 3 * torch.randn(2, 1, head_dim)  # like real keys, whose channels have large means
    int8 = two_tier.quantized(k)
    spec = layer_spec(0, "pre-softmax", K, sdc)
    _, table = tables(spec, 4, kv_len)
    estimated, _ = two_tier.estimates(q, int8, SCALE)
    theta = torch.full((4, kv_len), -math.inf)
    largest = estimated.masked_fill(~rows.mask[:, :, 0], -math.inf).topk(9, dim=-1).values
    theta[:, K + 1 :] = largest[0, :, -1:]
    theta[0, K + 1 :] = 1000.0  # a head that keeps its largest score only, so that its group reads all of K
    read = two_tier.candidate_keys(q, int8, theta, rows, SCALE)[0, 1].sum()
    out, counts, out8, counts8 = both_tiers(q, k, v, rows, spec, theta, table)
    assert torch.equal(counts.attn, counts8.attn) and torch.equal(counts.vrow, counts8.vrow)
    torch.testing.assert_close(out8, out, rtol=1e-5 if sdc != "exact" else 5e-3, atol=1e-5)
    assert counts.attn[0, 0] == 1 and 8 <= (counts.vrow[0, 1] > 0).sum() <= read < 30
    expected, keep = two_tier.two_tier_attention(call(q, k, v, rows, spec, SCALE, theta, table, int8=int8))
    torch.testing.assert_close(out8.cpu(), expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(keep.sum(dim=-1), counts.attn.cpu())


@here
@pytest.mark.parametrize(
    "keys, dtype",
    [
        *(
            (keys, torch.float32)
            for keys in ("normal", "a loud channel", "a loud query", "pairs", "any size", "lattice")
        ),
        *((keys, torch.float16) for keys in ("normal", "a loud channel")),
    ],
    ids=str,
)
def test_two_tiers_miss_nothing(keys, dtype):
    """Keys that int8 represents badly or exactly, and thresholds at scores, one float below and one above:
    with a bound that is one rounding too low, some key would fall on the wrong side."""
    torch.manual_seed(6)
    heads, kv_len = (4, 1, 16), 90
    q, k, v = draw(1, heads, 1, kv_len)
    if keys != "lattice":
        q, k = torch.randn(q.shape), torch.randn(k.shape)
    if keys == "a loud channel":
        k[..., 3] *= 300
    elif keys == "a loud query":  # its codes represent the other channels badly
        q[..., 5] *= 3000
        k[..., 5] /= 3000
    elif keys == "pairs":
        k[:, :, 45:] = k[:, :, :45]
    elif keys == "any size":
        k *= 10.0 ** torch.randint(-4, 4, (1, 1, kv_len, 1))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    rows = rows_of(None, 1, kv_len, torch.device("cpu"))
    scores = (q[0, :, 0].double() @ k[0, 0].double().T).float() * SCALE
    ranked = scores.sort(dim=-1, descending=True).values
    at = ranked.gather(1, torch.tensor([1, 2, K, 60])[:, None])[:, 0]
    below, above = torch.full((4,), -math.inf), torch.full((4,), math.inf)
    kept = set()
    for theta in (at, torch.nextafter(at, below), torch.nextafter(at, above)):
        table = theta[:, None].expand(4, kv_len + 1).contiguous()
        out, counts, out8, counts8 = both_tiers(q, k, v, rows, layer_spec(0, "pre-softmax", K), table)
        assert torch.equal(counts.attn, counts8.attn) and torch.equal(counts.vrow, counts8.vrow)
        torch.testing.assert_close(out8, out, rtol=1e-3, atol=1e-4)
        kept.add(tuple(counts.attn[0].tolist()))
    assert len(kept) > 1  # the thresholds do fall on both sides of scores


def test_int8_copy_bounds_every_score():
    """Estimates are off by at most max_error, which is small for ordinary keys."""
    torch.manual_seed(7)
    q, k = torch.randn(2, 6, 1, 64), torch.randn(2, 3, 200, 64) + 4 * torch.randn(3, 1, 64)
    keys = two_tier.extended(two_tier.quantized(k[:, :, :150]), k[:, :, 150:])
    assert keys.codes.shape == k.shape and keys.codes.dtype == torch.int8
    estimated, max_error = two_tier.estimates(q, keys, SCALE)
    exact = (q.double().view(2, 3, 2, 64) @ k.double().transpose(2, 3) * SCALE).view(2, 6, 200)
    off = (estimated - exact).abs()
    assert (off <= max_error).all()
    assert off.max() > 0.05 * max_error.max() and max_error.max() < 0.05 * (exact - exact.mean()).abs().max()
