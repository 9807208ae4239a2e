"""The Triton kernels against plain PyTorch (toptheta/attention/reference.py): outputs and counts.

Inputs and tolerance are those of the CPU kernel's tests. Not every option is tested with every kind of rows,
because the interpreter is slow.
"""

import math
from dataclasses import replace

import pytest
import torch

from tests.helpers.calls import call, layer_spec
from tests.helpers.kernel_cases import SCALE, SPECS, K, case, in_float64, tables
from tests.kernels.triton.helpers import DEVICE, FEW, draw, here, on_device
from toptheta.attention.reference import mean_of_visible, sparse_attention
from toptheta.attention.rows import Rows, rows_of
from toptheta.kernels.triton import backend as gpu
from toptheta.methods.params import LayerSpec
from toptheta.models.interface import _rows_of_mask


def check(q, k, v, rows: Rows, specs, dtype: torch.dtype = torch.float32, **more) -> None:
    """Same counts, and an error against float64 of at most twice plain PyTorch's, plus two roundings."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    moved, device_rows = [x.to(DEVICE) for x in (q, k, v)], on_device(rows)
    worst = torch.zeros(3)
    for spec in specs:
        assert gpu.unsupported(call(*moved, device_rows, spec, SCALE)) is None, spec
        theta, table = tables(spec, q.shape[1], k.shape[2])
        plain, expected = sparse_attention(call(q, k, v, rows, spec, SCALE, theta, table, count=True))
        at = (theta.to(DEVICE), table.to(DEVICE))
        out, counts = gpu.run(call(*moved, device_rows, spec, SCALE, *at, count=True, **more))
        out = out.cpu()
        assert out.dtype == dtype
        assert torch.equal(counts.attn.cpu(), expected.attn), spec
        assert torch.equal(counts.vrow.cpu(), expected.vrow), spec
        exact = in_float64(q, k, v.double(), rows, spec, theta, table)
        errors = [(x.double() - exact).abs().max() for x in (out, plain)]
        rounding = (out + 0.3 - 0.3 - out).abs().max()
        worst = worst.maximum(torch.stack([*errors, rounding]).float())
    ours, theirs, rounding = worst.tolist()
    assert ours <= 2 * theirs + 2 * rounding, worst
    uncounted, none = gpu.run(call(*moved, device_rows, spec, SCALE, *at, **more))
    assert none is None and torch.equal(uncounted.cpu(), out)


def supported(q_len: int) -> list[LayerSpec]:
    return [s for s in SPECS if not (s.sparse and (s.kernel.capk or (s.method.mode == 1 and q_len > 1)))]


@here
@pytest.mark.parametrize("kind", ["padded decode", "padded chunk"])
def test_every_option(kind):
    torch.manual_seed(0)
    rows, batch, q_len, kv_len = case(kind)
    check(*draw(batch, (2, 1, 16), q_len, kv_len), rows, supported(q_len))


@here
@pytest.mark.parametrize(
    "kind, heads",
    [
        ("static decode", (8, 2, 24)),
        pytest.param("static decode", (3, 3, 16), marks=pytest.mark.long),
        pytest.param("static decode", (20, 1, 16), marks=pytest.mark.long),
        ("decode", (3, 1, 80)),  # many splits
        ("left padding", (2, 1, 24)),
        pytest.param("right padding", (2, 2, 16), marks=pytest.mark.long),
        ("prefill", (2, 1, 16)),
        ("any mask", (2, 1, 16)),
        pytest.param("static cache", (2, 2, 16), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_every_kind_of_rows(kind, heads):
    torch.manual_seed(1)
    rows, batch, q_len, kv_len = case(kind)
    more = [layer_spec(1, "pre-softmax", K, "exact", vmc=True)] if q_len == 1 else []
    check(*draw(batch, heads, q_len, kv_len), rows, FEW + more)


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["padded decode", pytest.param("padded chunk", marks=pytest.mark.long)])
def test_low_precision(kind, dtype):
    if gpu.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    torch.manual_seed(1)
    rows, batch, q_len, kv_len = case(kind)
    check(*draw(batch, (3, 1, 16), q_len, kv_len), rows, FEW, dtype)


@here
def test_any_strides():
    """Slices of a larger cache, and K and V whose head_dim is not contiguous."""
    torch.manual_seed(2)
    rows, batch, q_len, kv_len = case("padded decode")
    q, k, v = draw(batch, (4, 2, 16), q_len, kv_len)
    wide_k, wide_v = torch.full((2, batch, 3, kv_len + 9, 40), math.nan)
    inside = (slice(None), slice(0, 2), slice(5, 5 + kv_len), slice(8, 24))
    wide_k[inside], wide_v[inside] = k, v
    check(q, wide_k[inside], wide_v[inside], rows, FEW[:1])
    check(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, rows, FEW[:1])


@here
def test_other_k():
    """K below 1 and rows shorter than K are dense."""
    torch.manual_seed(2)
    rows = rows_of(None, 1, 70, torch.device("cpu"))
    q, k, v = draw(1, (2, 1, 16), 1, 70)
    check(
        q,
        k,
        v,
        rows,
        [layer_spec(1, "pre-softmax", 500, "exact", vmc=True), layer_spec(1, "post-softmax", 0)],
    )
    check(q, k, v, rows, [replace(FEW[0], k=70), replace(FEW[2], k=69), replace(FEW[0], k=0)])


@here
@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize(
    "spec", [layer_spec(), layer_spec(0, "pre-softmax", K, "exact")], ids=["dense", "theta"]
)
def test_threshold_of_minus_infinity_is_dense_bit_for_bit(q_len, spec):
    torch.manual_seed(3)
    q, k, v = (x.to(DEVICE) for x in draw(1, (3, 1, 16), q_len, 200))
    rows = on_device(rows_of(None, q_len, 200, torch.device("cpu")))
    theta = torch.full((3, 201), -math.inf, device=DEVICE)
    dense, _ = gpu.run(call(q, k, v, rows, layer_spec(), SCALE))
    assert torch.equal(gpu.run(call(q, k, v, rows, spec, SCALE, theta))[0], dense)


@here
@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
def test_ties(placement):
    """All keys are equal: Top-k keeps exactly K, and Top-theta, with no score above the threshold, all that
    tie for the row's largest."""
    q, k = torch.ones(1, 3, 1, 16, device=DEVICE), torch.ones(1, 1, 300, 16, device=DEVICE)
    v = torch.randn(1, 1, 300, 16).to(DEVICE)
    rows = on_device(rows_of(None, 1, 300, torch.device("cpu")))
    _, counts = gpu.run(call(q, k, v, rows, layer_spec(1, placement, K), SCALE, count=True))
    assert counts is not None and counts.attn.tolist() == [[K] * 3]
    theta = torch.full((3, 301), 1e9, device=DEVICE)
    out, counts = gpu.run(call(q, k, v, rows, layer_spec(0, placement, K), SCALE, theta, count=True))
    assert counts is not None and counts.attn.tolist() == [[300] * 3]
    torch.testing.assert_close(out[0, :, 0], v[0, 0].mean(dim=0).expand(3, 16), rtol=1e-5, atol=1e-5)


@here
@pytest.mark.parametrize("spec", FEW[:1] + FEW[2:], ids=["pre", "post"])
def test_mostly_empty_cache(spec):
    """A static cache that is nearly empty, with sequences of different lengths: splits have few keys, or
    none. Keys after the last visible one are not read."""
    torch.manual_seed(7)
    kv_len = 900
    q, k, v = draw(3, (4, 2, 16), 1, kv_len)
    at = torch.arange(kv_len)
    mask = torch.stack([(at >= 3) & (at < 150), at < 1, (at >= 400) & (at < 700)])[:, None, None]
    k[~mask.expand(-1, 2, -1, -1)[:, :, 0]] = 7.0  # would win every row
    rows = rows_of(mask, 1, kv_len, torch.device("cpu"))
    check(q, k, v, rows, [spec])
    k[:, :, 700:] = v[:, :, 700:] = math.nan
    theta, table = (x.to(DEVICE) for x in tables(spec, 4, kv_len))
    moved = [x.to(DEVICE) for x in (q, k, v)]
    v_sum = torch.zeros(3, 2, 16, device=DEVICE)
    out, _ = gpu.run(call(*moved, on_device(rows), spec, SCALE, theta, table, v_sum=v_sum))
    assert out.isfinite().all()


@here
def test_v_sum_replaces_reading_v():
    torch.manual_seed(4)
    rows, batch, q_len, kv_len = case("static decode")
    q, k, v = draw(batch, (4, 2, 16), q_len, kv_len)
    total = (mean_of_visible(v, rows)[:, :, 0] * rows.n[..., None]).to(DEVICE)
    check(q, k, v, rows, [layer_spec(0, "pre-softmax", K, "exact", vmc=True)], v_sum=total)


@here
@pytest.mark.parametrize(
    "kind, padded",
    [
        ("static cache", False),
        ("padded chunk", True),
        pytest.param("chunk", False, marks=pytest.mark.long),
    ],
)
def test_offset_on_the_device(kind, padded):
    """A static cache on a GPU knows the position of a prompt's first row as a tensor only: the mask is not
    read, which would cost twice the tiles, and VMC needs no float copy of it."""
    torch.manual_seed(6)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = draw(batch, (2, 1, 16), q_len, kv_len)
    k[:, :, rows.first + q_len :] = v[:, :, rows.first + q_len :] = 3.0  # in sight of no row
    mask = rows.mask
    if mask is None:
        mask = torch.ones(batch, 1, q_len, kv_len, dtype=torch.bool).tril_(rows.first)
    found = _rows_of_mask(
        mask.clone(), torch.tensor(rows.first), 0, True, None if rows.key_real is None else rows.key_real
    )
    assert (rows.key_real is not None) == padded == (found.key_real is not None)
    assert found.first is None and found.first_tensor().tolist() == [rows.first]
    found.mask = torch.zeros_like(mask)  # whoever reads it sees nothing
    device_rows = on_device(found)
    for spec in (*FEW, layer_spec()):
        theta, table = tables(spec, 2, kv_len)
        expected, counts = sparse_attention(call(q, k, v, rows, spec, SCALE, theta, table, count=True))
        moved = [x.to(DEVICE) for x in (q, k, v)]
        at = (theta.to(DEVICE), table.to(DEVICE))
        out, ours = gpu.run(call(*moved, device_rows, spec, SCALE, *at, count=True))
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.attn.cpu(), counts.attn) and torch.equal(ours.vrow.cpu(), counts.vrow)


@here
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_heads_further_apart_than_32_bits(kind):
    """Offsets of heads, of a very long cache."""
    torch.manual_seed(4)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = (x.to(torch.float16) for x in draw(batch, (3, 3, 16), q_len, kv_len))
    apart = 1 << 30  # elements, most of which are never touched
    memory = torch.empty(2 * apart + 3 * kv_len * 16, dtype=torch.float16, device=DEVICE)
    whole = [memory.as_strided((1, 3, kv_len, 16), (0, apart, 16, 1), place) for place in (0, kv_len * 16)]
    for there, one in zip(whole, (k, v)):
        there.copy_(one[:1])
    first = Rows(n=rows.n[:1], real=None, mask=None, first=rows.first, causal=rows.causal)
    check(q[:1], *whole, first, [FEW[0], FEW[2]], torch.float16)
