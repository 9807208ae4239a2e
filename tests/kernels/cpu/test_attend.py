"""The CPU kernel against plain PyTorch (toptheta/attention/reference.py): outputs and counts.

The tolerance is flash-attention's: an error against float64 of at most twice that of plain PyTorch in the
same type, plus two roundings.
"""

import math
import platform
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.helpers.calls import call, layer_spec
from tests.helpers.kernel_cases import KINDS, SCALE, SPECS, K, case, in_float64, inputs, needs_kernel, tables
from toptheta.attention.reference import mean_of_visible, sparse_attention
from toptheta.attention.rows import Rows, rows_of
from toptheta.kernels.cpu import backend as cpu
from toptheta.kernels.cpu import library, samples
from toptheta.methods.params import LayerSpec

HEADS = [(9, 3, 64), (4, 4, 128), (8, 2, 80)]


def check(
    q, k, v, rows: Rows, specs: Sequence[LayerSpec], dtype: torch.dtype = torch.float32, **more
) -> None:
    q, k, v = (x.to(dtype) for x in (q, k, v))
    worst = torch.zeros(3)  # our error, plain PyTorch's, rounding
    for spec in specs:
        theta, table = tables(
            spec, q.shape[1], k.shape[2]
        )  # one short: the last length is looked up at the end
        plain, expected = sparse_attention(call(q, k, v, rows, spec, SCALE, theta, table, count=True))
        out, counts = cpu.run(call(q, k, v, rows, spec, SCALE, theta, table, count=True, **more))
        assert torch.equal(counts.attn, expected.attn), spec
        assert torch.equal(counts.vrow, expected.vrow), spec
        assert out.dtype == dtype
        exact = in_float64(q, k, v, rows, spec, theta, table)
        errors = torch.stack([(x - exact).abs().max().float() for x in (out, plain)])
        assert errors[0] < (2e-5 if dtype == torch.float32 else 2e-2), spec  # and below, tightly
        worst = worst.maximum(torch.cat([errors, (out + 0.3 - 0.3 - out).abs().max()[None].float()]))
        uncounted, none = cpu.run(call(q, k, v, rows, spec, SCALE, theta, table, **more))
        assert none is None and torch.equal(uncounted, out)
    ours, theirs, rounding = worst.tolist()
    assert ours <= 2 * theirs + 2 * rounding


@needs_kernel
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_pytorch(kind, heads):
    torch.manual_seed(0)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = inputs(batch, heads, q_len, kv_len)
    check(q, k, v, rows, SPECS)


@needs_kernel
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 32), (14, 2, 32), (32, 2, 16), (20, 1, 16)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if case(kind)[2] > 1])
def test_decode_steps_are_counted_one_by_one(kind, heads):
    """Also where a tile of rows ends between the heads of a group, and by several threads."""
    torch.manual_seed(0)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = inputs(batch, heads, q_len, kv_len)
    for spec in (*SPECS[1::7], layer_spec()):
        theta, table = tables(spec, heads[0], kv_len)
        asked = call(q, k, v, rows, spec, SCALE, theta, table, count=True, decode=True)
        assert asked.count_steps
        expected, counts = sparse_attention(asked)[1], cpu.run(asked)[1]
        for name in ("attn", "vrow", "row", "row_vrows"):
            one, other = getattr(counts, name), getattr(expected, name)
            assert torch.equal(one, other) and one.dtype == other.dtype, (name, spec)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["prefill", "decode", "padded chunk", "any mask"])
def test_low_precision(kind, dtype):
    torch.manual_seed(1)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = inputs(batch, HEADS[2], q_len, kv_len)
    check(q, k, v, rows, SPECS, dtype)


@needs_kernel
@pytest.mark.parametrize(
    "flags", [library.FLAGS, [f for f in library.FLAGS if f != "-march=native"]], ids=["native", "plain"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_widened(dtype, flags, monkeypatch):
    """Dense attention with one key returns V: all finite numbers, denormal and infinite ones come through."""
    built = library.open_library(library.build(flags=flags))
    monkeypatch.setattr(library, "load", lambda: built)
    v = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, -1, 64)
    v = v.transpose(1, 2)  # 1,024 heads with one key
    q = torch.zeros_like(v)
    out, _ = cpu.run(call(q, q, v, rows_of(None, 1, 1, torch.device("cpu")), layer_spec(), SCALE))
    assert torch.equal(out[~v.isnan()], v[~v.isnan()]) and bool(out[v.isnan()].isnan().all())


@needs_kernel
@pytest.mark.parametrize("k", [1, 64, 300, 700, 5000])
def test_long_rows_and_other_k(k):
    torch.manual_seed(10)  # a seed with which no row has a tie at place K
    rows = rows_of(None, 1030, 1030, torch.device("cpu"))
    q, keys, v = inputs(1, (2, 1, 64), 1030, 1030)
    both = ("pre-softmax", "post-softmax")
    check(q, keys, v, rows, [layer_spec(mode, at, k, vmc=at == both[1]) for mode in (0, 1) for at in both])


@needs_kernel
def test_any_strides():
    """Slices of a larger cache, and K and V whose head_dim is not contiguous."""
    torch.manual_seed(2)
    rows, batch, q_len, kv_len = case("prefill")
    spec = layer_spec(0, "pre-softmax", K, "exact", vmc=True)
    q, k, v = inputs(batch, (4, 2, 64), q_len, kv_len)
    wide_k, wide_v = torch.full((2, batch, 3, kv_len + 9, 96), math.nan)
    wide_k[:, :2, 5 : 5 + kv_len, 16:80], wide_v[:, :2, 5 : 5 + kv_len, 16:80] = k, v
    check(q, wide_k[:, :2, 5 : 5 + kv_len, 16:80], wide_v[:, :2, 5 : 5 + kv_len, 16:80], rows, [spec])
    check(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, rows, [spec])
    decode = rows_of(None, 1, kv_len, torch.device("cpu"))
    check(q[:, :, -1:], wide_k[:, :2, 5 : 5 + kv_len, 16:80], v, decode, [spec])


@needs_kernel
@pytest.mark.parametrize("q_len", [1, 60])
@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
def test_ties(placement, q_len):
    """All keys are equal: Top-k keeps exactly K of each row, and Top-theta, with no score above the
    threshold, all that tie for the row's largest."""
    q, k, v = torch.ones(1, 3, q_len, 64), torch.ones(1, 1, 60, 64), torch.randn(1, 1, 60, 64)
    rows = rows_of(None, q_len, 60, torch.device("cpu"))
    out, counts = cpu.run(call(q, k, v, rows, layer_spec(1, placement, K, "none"), SCALE, count=True))
    assert counts.attn.tolist() == [[rows.n.clamp(max=K).sum().item()] * 3]
    if placement == "pre-softmax":  # equal weights: each output is a mean of K of the first n rows of V
        assert torch.allclose(out[:, :, 0], v[:, :, :1].expand(1, 3, 1, 64)[:, :, 0]) or q_len == 1
    theta = torch.full((3, 61), 1e9)
    _, counts = cpu.run(call(q, k, v, rows, layer_spec(0, placement, K), SCALE, theta, count=True))
    assert counts.attn.tolist() == [[rows.n.sum().item()] * 3]
    _, counts = cpu.run(call(q, k, v, rows, layer_spec(0, placement, K, capk=True), SCALE, theta, count=True))
    assert counts.attn.tolist() == [[rows.n.clamp(max=K).sum().item()] * 3]


@needs_kernel
@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
def test_thresholds_are_strict(placement):
    """A threshold equal to a row's own sample, its (K+1)-th largest, keeps exactly K."""
    torch.manual_seed(11)
    rows = rows_of(None, 101, 101, torch.device("cpu"))
    q, k, v = inputs(1, (9, 3, 64), 101, 101)
    theta = torch.full((9, 102), -math.inf)
    dense = call(q, k, v, rows, layer_spec(), SCALE)
    theta[:, K + 1 :] = samples.sample(dense, [K], placement, output=False).values[0, 0, :, K:]
    _, counts = cpu.run(call(q, k, v, rows, layer_spec(0, placement, K), SCALE, theta, count=True))
    assert counts.attn.tolist() == [[rows.n.clamp(max=K).sum().item()] * 9]


@needs_kernel
def test_tied_missing_denominator():
    """Top-k with ties at place K: what is dropped of the tied counts in R of SDC 'exact'."""
    torch.manual_seed(3)
    q, k, v = torch.ones(1, 1, 80, 64), torch.ones(1, 1, 80, 64), torch.ones(1, 1, 80, 64)
    rows = rows_of(None, 80, 80, torch.device("cpu"))
    out, _ = cpu.run(call(q, k, v, rows, layer_spec(1, "pre-softmax", K, "exact"), SCALE))
    assert torch.allclose(out[0, 0, :, 0], K / rows.n[0].clamp_min(K).float())


@needs_kernel
def test_distant_scores():
    """Scores 200 apart: exp of the far ones is 0 or denormal, nothing is NaN, and no row is empty."""
    torch.manual_seed(4)
    q, k, v = inputs(1, (2, 2, 64), 60, 60)
    rows = rows_of(None, 60, 60, torch.device("cpu"))
    free = ("post-softmax", 1)  # weights of 0 tie: which are kept is free
    check(q * 32, k, v, rows, [spec for spec in SPECS if (spec.placement, spec.method.mode) != free])


@needs_kernel
def test_v_sum_replaces_reading_v():
    torch.manual_seed(5)
    rows, batch, q_len, kv_len = case("static decode")
    q, k, v = inputs(batch, (8, 2, 80), q_len, kv_len)
    total = mean_of_visible(v, rows)[:, :, 0] * rows.n[..., None]
    specs = [layer_spec(0, "pre-softmax", K, "exact", vmc=True), layer_spec(1, "post-softmax", K, vmc=True)]
    check(q, k, v, rows, specs, v_sum=total)


@needs_kernel
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("level", ["x86-64", "haswell"])
def test_lesser_instruction_sets(level, monkeypatch):
    """The same file compiled for older CPUs."""
    if level == "haswell" and not {"avx2", "fma"} <= set(open("/proc/cpuinfo").read().split()):
        pytest.skip("this CPU has no AVX2")
    flags = [f"-march={level}" if flag == "-march=native" else flag for flag in library.FLAGS]
    built = library.open_library(library.build(flags=flags))
    monkeypatch.setattr(library, "load", lambda: built)
    torch.manual_seed(12)
    for kind, heads in (("chunk", HEADS[0]), ("decode", HEADS[1]), ("left padding", HEADS[2])):
        rows, batch, q_len, kv_len = case(kind)
        q, k, v = inputs(batch, heads, q_len, kv_len)
        check(q, k, v, rows, SPECS)
        check(q, k, v, rows, SPECS[1::7], torch.float16)
        check(q, k, v, rows, SPECS[2::7], torch.bfloat16)


@needs_kernel
def test_threads_do_not_change_results():
    torch.manual_seed(9)
    rows, batch, q_len, kv_len = case("prefill")
    q, k, v = inputs(batch, (9, 3, 64), q_len, kv_len)
    spec = replace(SPECS[1], sdc="exact", vmc=True)
    theta, table = tables(spec, 9, kv_len)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu.run(call(q, k, v, rows, spec, SCALE, theta, table, count=True))
        torch.set_num_threads(3)
        three = cpu.run(call(q, k, v, rows, spec, SCALE, theta, table, count=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], three[0]) and torch.equal(one[1].vrow, three[1].vrow)
