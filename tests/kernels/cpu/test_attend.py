"""The CPU kernel against plain PyTorch (attention/reference.py): outputs, counts, calibration samples and
building.

Queries and keys are small multiples of powers of two, so that scores are exact in float32 whatever the
order of summation: what is kept must then be equal. The tolerance is flash-attention's: an error against
float64 of at most twice that of plain float32, plus two roundings.
"""

import itertools
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from toptheta.attention.reference import (
    Block,
    LayerSpec,
    mean_of_visible,
    per_row,
    sparse_attention,
    sparse_weights,
)
from toptheta.attention.rows import Rows, rows_of, toptheta_mask
from toptheta.calibration.sampler import LayerCalibration
from toptheta.kernels import registry as kernels
from toptheta.kernels.cpu import backend as cpu
from toptheta.util.errors import UsageError

K, SCALE = 12, 0.125
SDC = [("none", 1.0), ("exact", 1.0), ("exact", 0.5), ("exp-threshold", 0.7), ("offline-calibrated", 1.3)]
SPECS = [LayerSpec()] + [
    LayerSpec(mode, placement, K, sdc, sdc_scale, vmc, capk)
    for mode, placement, (sdc, sdc_scale), vmc, capk in itertools.product(
        (0, 1), ("pre-softmax", "post-softmax"), SDC, (False, True), (False, True)
    )
    if not (placement == "post-softmax" and sdc != "none")
    and not (mode == 1 and (capk or sdc == "exp-threshold"))
]
HEADS = [(9, 3, 64), (4, 4, 128), (8, 2, 80)]

needs_kernel = pytest.mark.skipif(isinstance(cpu.load(), str), reason=f"no CPU kernel: {cpu.load()}")


def lattice(*shape: int, unit: float) -> Tensor:
    """Roughly normal numbers, multiples of `unit`."""
    return (torch.randint(-256, 257, (6, *shape)).sum(dim=0) * unit).float()


def inputs(batch: int, heads: tuple[int, int, int], q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v laid out as a model hands them over: q and v are views of `[B, Q, H, D]`."""
    num_heads, num_kv_heads, head_dim = heads
    q = lattice(batch, q_len, num_heads, head_dim, unit=2**-8).transpose(1, 2)
    k = lattice(batch, num_kv_heads, kv_len, head_dim, unit=2**-9)
    return q, k, torch.randn(batch, kv_len, num_kv_heads, head_dim).transpose(1, 2)


def tables(spec: LayerSpec, num_heads: int, length: int) -> tuple[Tensor, Tensor]:
    """Thresholds that keep a tenth or so (in every 7th length nothing), and calibrated R."""
    steps = torch.randint(0, 32, (num_heads, length))
    if spec.placement == "post-softmax":
        theta = (steps + 4) / 12 / torch.arange(length).clamp_min(1)
    else:
        theta = 2.0 + steps / 16
    theta[:, ::7] = 1000.0
    table = torch.rand(num_heads, length)
    theta[:, : spec.k + 1], table[:, : spec.k + 1] = -math.inf, 0.0
    return theta.float(), table


def case(kind: str) -> tuple[Rows, int, int, int]:
    """Rows, batch, Q and N of one kind of call."""
    cpu_device = torch.device("cpu")
    left = torch.ones(2, 75, dtype=torch.bool)
    left[1, :23] = False
    masks = {
        "chunk": (1, 70, 203, 133, None),
        "few rows": (2, 3, 150, 147, None),
        "left padding": (2, 75, 75, 0, left),
        "right padding": (2, 75, 75, 0, left.flip(1)),
        "padded chunk": (2, 25, 75, 50, left),
        "padded decode": (2, 1, 75, 74, left),
        "static cache": (2, 20, 96, 31, None),
        "static decode": (2, 1, 96, 51, None),
    }
    if kind == "prefill":
        return rows_of(None, 101, 101, cpu_device), 2, 101, 101
    if kind == "decode":
        return rows_of(None, 1, 1101, cpu_device), 1, 1, 1101
    if kind == "any mask":  # no rule; rows that see nothing, rows that see fewer than K
        mask = torch.rand(2, 1, 50, 77) < torch.linspace(0, 1, 50)[:, None]
        return rows_of(mask, 50, 77, cpu_device), 2, 50, 77
    batch, q_len, kv_len, offset, attention_mask = masks[kind]
    mask = toptheta_mask(batch, q_len, kv_len, q_offset=offset, attention_mask=attention_mask)
    return rows_of(mask, q_len, kv_len, cpu_device), batch, q_len, kv_len


KINDS = [
    "prefill", "decode", "chunk", "few rows", "left padding", "right padding", "padded chunk",
    "padded decode", "static cache", "static decode", "any mask",
]  # fmt: skip


def in_float64(q, k, v, rows: Rows, spec: LayerSpec, theta: Tensor, table: Tensor) -> Tensor:
    """The output in float64, without blocks."""
    group, (q_len, kv_len) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    end = rows.end(q_len, kv_len)
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q.double() * SCALE) @ k[:, :, :end].transpose(2, 3)
    visible = rows.visible(0, q_len, kv_len)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    at_n = [per_row(x, rows.n).double() for x in (theta, table)]
    weights, _ = sparse_weights(Block(scores, rows.n, rows.real, 0, spec.k), spec, *at_n, None)
    out = weights @ v[:, :, :end]
    if spec.vmc:
        lost = (1 - weights.sum(dim=-1)) * (rows.n > spec.k)[:, None]
        visible = torch.ones(1, 1, 1, end, dtype=torch.bool) if visible is None else visible
        out += lost[..., None] * (visible.double() @ v[:, :, :end] / rows.n.clamp_min(1)[:, None, :, None])
    return out


def check(q, k, v, rows: Rows, specs: Sequence[LayerSpec], **more) -> None:
    worst = torch.zeros(3)  # our error, plain PyTorch's, rounding
    for spec in specs:
        theta, table = tables(
            spec, q.shape[1], k.shape[2]
        )  # one short: the last length is looked up at the end
        plain, expected = sparse_attention(q, k, v, rows, spec, SCALE, theta, table, count=True)
        out, counts = cpu.attend(q, k, v, rows, spec, SCALE, theta, table, count=True, **more)
        assert torch.equal(counts.attn, expected.attn), spec
        assert torch.equal(counts.vrow, expected.vrow), spec
        exact = in_float64(q, k, v, rows, spec, theta, table)
        errors = torch.stack([(x - exact).abs().max() for x in (out, plain)])
        assert errors[0] < 2e-5, spec  # and below, over all of them, tightly
        worst = worst.maximum(torch.cat([errors, (out + 0.3 - 0.3 - out).abs().max()[None]]))
        uncounted, none = cpu.attend(q, k, v, rows, spec, SCALE, theta, table, **more)
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
@pytest.mark.parametrize("k", [1, 64, 300, 700, 5000])
def test_long_rows_and_other_k(k):
    torch.manual_seed(10)  # a seed with which no row has a tie at place K
    rows = rows_of(None, 1030, 1030, torch.device("cpu"))
    q, keys, v = inputs(1, (2, 1, 64), 1030, 1030)
    both = ("pre-softmax", "post-softmax")
    check(q, keys, v, rows, [LayerSpec(mode, at, k, vmc=at == both[1]) for mode in (0, 1) for at in both])


@needs_kernel
def test_any_strides():
    """Slices of a larger cache, and K and V whose head_dim is not contiguous."""
    torch.manual_seed(2)
    rows, batch, q_len, kv_len = case("prefill")
    spec = LayerSpec(0, "pre-softmax", K, "exact", vmc=True)
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
    """All keys alike: Top-k keeps exactly K of each row, Top-theta, where nothing passes, all that tie for
    the peak."""
    q, k, v = torch.ones(1, 3, q_len, 64), torch.ones(1, 1, 60, 64), torch.randn(1, 1, 60, 64)
    rows = rows_of(None, q_len, 60, torch.device("cpu"))
    out, counts = cpu.attend(q, k, v, rows, LayerSpec(1, placement, K, "none"), SCALE, count=True)
    assert counts.attn.tolist() == [[rows.n.clamp(max=K).sum().item()] * 3]
    if placement == "pre-softmax":  # equal weights: each output is a mean of K of the first n rows of V
        assert torch.allclose(out[:, :, 0], v[:, :, :1].expand(1, 3, 1, 64)[:, :, 0]) or q_len == 1
    theta = torch.full((3, 61), 1e9)
    _, counts = cpu.attend(q, k, v, rows, LayerSpec(0, placement, K), SCALE, theta, count=True)
    assert counts.attn.tolist() == [[rows.n.sum().item()] * 3]
    _, counts = cpu.attend(q, k, v, rows, LayerSpec(0, placement, K, capk=True), SCALE, theta, count=True)
    assert counts.attn.tolist() == [[rows.n.clamp(max=K).sum().item()] * 3]


@needs_kernel
@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
def test_thresholds_are_strict(placement):
    """A threshold equal to a row's own sample, its (K+1)-th largest, keeps exactly K."""
    torch.manual_seed(11)
    rows = rows_of(None, 101, 101, torch.device("cpu"))
    q, k, v = inputs(1, (9, 3, 64), 101, 101)
    theta = torch.full((9, 102), -math.inf)
    theta[:, K + 1 :] = cpu.calibrate(q, k, v, rows, SCALE, [K], placement, None).values[0, 0, :, K:]
    _, counts = cpu.attend(q, k, v, rows, LayerSpec(0, placement, K), SCALE, theta, count=True)
    assert counts.attn.tolist() == [[rows.n.clamp(max=K).sum().item()] * 9]


@needs_kernel
def test_tied_missing_denominator():
    """Top-k with ties at place K: what is dropped of the tied counts in R of SDC 'exact'."""
    torch.manual_seed(3)
    q, k, v = torch.ones(1, 1, 80, 64), torch.ones(1, 1, 80, 64), torch.ones(1, 1, 80, 64)
    rows = rows_of(None, 80, 80, torch.device("cpu"))
    out, _ = cpu.attend(q, k, v, rows, LayerSpec(1, "pre-softmax", K, "exact"), SCALE)
    assert torch.allclose(out[0, 0, :, 0], K / rows.n[0].clamp_min(K).float())


@needs_kernel
def test_distant_scores():
    """Scores 200 apart: exp of the far ones is 0 or denormal, nothing is NaN, and no row is empty."""
    torch.manual_seed(4)
    q, k, v = inputs(1, (2, 2, 64), 60, 60)
    rows = rows_of(None, 60, 60, torch.device("cpu"))
    free = ("post-softmax", 1)  # weights of 0 tie: which are kept is free
    check(q * 32, k, v, rows, [spec for spec in SPECS if (spec.placement, spec.mode) != free])


@needs_kernel
def test_v_sum_replaces_reading_v():
    torch.manual_seed(5)
    rows, batch, q_len, kv_len = case("static decode")
    q, k, v = inputs(batch, (8, 2, 80), q_len, kv_len)
    total = mean_of_visible(v, rows)[:, :, 0] * rows.n[..., None]
    specs = [LayerSpec(0, "pre-softmax", K, "exact", vmc=True), LayerSpec(1, "post-softmax", K, vmc=True)]
    check(q, k, v, rows, specs, v_sum=total)


@needs_kernel
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("level", ["x86-64", "haswell"])
def test_lesser_instruction_sets(level, monkeypatch):
    """The same file compiled for older CPUs."""
    if level == "haswell" and not {"avx2", "fma"} <= set(open("/proc/cpuinfo").read().split()):
        pytest.skip("this CPU has no AVX2")
    flags = [f"-march={level}" if flag == "-march=native" else flag for flag in cpu.FLAGS]
    library = cpu.open_library(cpu.build(flags=flags))
    monkeypatch.setattr(cpu, "load", lambda: library)
    torch.manual_seed(12)
    for kind, heads in (("chunk", HEADS[0]), ("decode", HEADS[1]), ("left padding", HEADS[2])):
        rows, batch, q_len, kv_len = case(kind)
        q, k, v = inputs(batch, heads, q_len, kv_len)
        check(q, k, v, rows, SPECS)


# ---- Calibration ----


@needs_kernel
@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
@pytest.mark.parametrize("kind", ["prefill", "decode", "left padding", "few rows", "any mask"])
def test_samples_are_the_next_largest(kind, placement):
    torch.manual_seed(7)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = inputs(batch, (8, 2, 80), q_len, kv_len)
    ks = (5, K, 40)
    chosen = torch.rand(batch, q_len) < 0.7
    for output in (LayerSpec(), LayerSpec(1, placement, K, vmc=placement == "post-softmax"), None):
        got = cpu.calibrate(q, k, v, rows, SCALE, ks, placement, output, chosen=chosen)
        seen = _Seen()
        plain = LayerSpec(3, placement) if output is None or not output.sparse else output
        expected, _ = sparse_attention(q, k, v, rows, plain, SCALE, calibrator=seen)
        x = torch.nn.functional.pad(torch.cat(seen.blocks, dim=2), (0, max(ks)), value=-math.inf)
        largest = x.topk(max(ks) + 1, dim=-1).values
        for which, k_ in enumerate(ks):
            sampled = ((rows.n > k_) & chosen)[:, None].expand(batch, 8, q_len)
            assert torch.allclose(got.values[which][sampled], largest[..., k_][sampled], rtol=1e-5, atol=1e-9)
            assert (got.values[which][~sampled] == 0).all()
        assert (got.out is None) == (output is None)
        if got.out is not None:
            torch.testing.assert_close(got.out, expected, rtol=1e-5, atol=2e-6)


class _Seen:
    """A Calibrator that keeps every block."""

    def __init__(self):
        self.blocks: list[Tensor] = []

    def observe(self, block: Block) -> None:
        width = block.scores.shape[-1]
        if self.blocks and width > self.blocks[0].shape[-1]:
            grow = width - self.blocks[0].shape[-1]
            self.blocks = [torch.nn.functional.pad(b, (0, grow), value=-math.inf) for b in self.blocks]
        self.blocks.append(block.scores.clone())


@needs_kernel
@pytest.mark.parametrize("mode", [0, 1])
def test_missing_denominators(mode):
    """R of what would be dropped equals LayerCalibration's, for several K."""
    torch.manual_seed(8)
    rows, batch, q_len, kv_len = case("left padding")
    q, k, v = inputs(batch, (8, 2, 80), q_len, kv_len)
    ks = (K, 5)
    plain = LayerCalibration(ks, 8, mode=mode, with_sdc=True)
    plain.start_call(rows.n, rows.real, batch, kv_len)
    sparse_attention(q, k, v, rows, LayerSpec(3, "pre-softmax"), SCALE, calibrator=plain)
    thresholds = [plain.thresholds[k_].threshold(0.0).float() for k_ in ks] if mode == 0 else None
    got = cpu.calibrate(q, k, v, rows, SCALE, ks, "pre-softmax", None, True, thresholds, chosen=rows.real)
    for which, k_ in enumerate(ks):
        mine = LayerCalibration((k_,), 8, mode=mode, with_sdc=True).missing[k_]
        mine.reserve(kv_len)
        sampled = rows.real & (rows.n > k_)
        mine.add(got.missing[which], rows.n, sampled)
        assert torch.equal(mine.count, plain.missing[k_].count)
        assert torch.allclose(mine.mean(), plain.missing[k_].mean(), rtol=1e-5, equal_nan=True)


# ---- Choosing and building ----


def small_call(head_dim: int = 64, dtype: torch.dtype = torch.float32):
    q = torch.randn(1, 2, 5, head_dim).to(dtype)
    return q, q, q, rows_of(None, 5, 5, torch.device("cpu")), LayerSpec(1, "pre-softmax", 2), 0.1


@needs_kernel
def test_chooses_the_kernel_where_it_fits(monkeypatch):
    calls = []
    real = cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(kernels, "FORCED", None)
    kernels.attend(*small_call())
    assert len(calls) == 1
    kernels.attend(*small_call(head_dim=20))
    kernels.attend(*small_call(dtype=torch.bfloat16))
    with torch.enable_grad():
        q, k, v, *rest = small_call()
        assert not cpu.supports(q.requires_grad_(), k, v, *rest[:2])
    assert len(calls) == 1
    monkeypatch.setattr(kernels, "FORCED", "reference")
    kernels.attend(*small_call())
    assert len(calls) == 1
    monkeypatch.setattr(kernels, "FORCED", "cpu")
    kernels.attend(*small_call())
    assert len(calls) == 2


@pytest.mark.parametrize(
    "forced, changes, says",
    [
        ("cpu", {"dtype": torch.bfloat16}, "float32 only"),
        ("cpu", {"head_dim": 20}, "head_dim is 20"),
        ("triton", {}, "because (the tensors are not on a GPU|Triton is not installed)"),
        ("gpu", {}, "none of reference, cpu, triton"),
    ],
)
def test_forcing_what_cannot_be(forced, changes, says, monkeypatch):
    monkeypatch.setattr(kernels, "FORCED", forced)
    with pytest.raises(UsageError, match=says):
        kernels.attend(*small_call(**changes))


def test_no_compiler_is_said_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "FORCED", None)
    monkeypatch.setattr(cpu, "load", cpu.load.__wrapped__)
    cpu._warn_once.cache_clear()
    args = small_call()
    with pytest.warns(UserWarning, match="no C.. compiler") as said:
        out, _ = kernels.attend(*args)
        kernels.attend(*args)
    assert len(said) == 1
    assert torch.equal(out, sparse_attention(*args)[0])
    monkeypatch.setattr(kernels, "FORCED", "cpu")
    with pytest.raises(UsageError, match="no C.. compiler"):
        kernels.attend(*args)


def test_failing_compiler_names_the_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match="failed"):
        cpu.build(compiler=["false"])
    assert not list(tmp_path.glob("*.so"))


@needs_kernel
def test_two_processes_build_once(tmp_path):
    script = "from toptheta.kernels.cpu import backend as b; assert not isinstance(b.load(), str), b.load()"
    env = os.environ | {"TOPTHETA_CACHE": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "".join(said).count("compiling") == 1
    assert len(list(tmp_path.glob("*.so"))) == 1


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
        one = cpu.attend(q, k, v, rows, spec, SCALE, theta, table, count=True)
        torch.set_num_threads(3)
        three = cpu.attend(q, k, v, rows, spec, SCALE, theta, table, count=True)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], three[0]) and torch.equal(one[1].vrow, three[1].vrow)
