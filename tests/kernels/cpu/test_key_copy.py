"""Decode steps with a copy of K in few bits by the CPU kernel, against plain PyTorch: outputs, what is kept,
and which K rows are read."""

import math
import platform
from dataclasses import replace

import pytest
import torch

from tests.helpers.calls import call
from tests.helpers.kernel_cases import SCALE, K, inputs, needs_kernel
from tests.helpers.key_copy import SPECS, share_read, step
from toptheta.attention.call import AttentionCall
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.kernels import registry
from toptheta.kernels.cpu import backend as cpu
from toptheta.kernels.cpu import library
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.methods.top_theta import TopTheta

pytestmark = needs_kernel
CPU = torch.device("cpu")
HEADS = [(9, 3, 64), (4, 4, 128), (8, 2, 96), (40, 2, 64)]  # the last: a group of more rows than "few"


def check(asked: AttentionCall, dtype: torch.dtype = torch.float32) -> float:
    """Assert that the kernel computes what the reference does; returns the share of K rows that are read."""
    one, two = (
        replace(asked, q=asked.q.to(dtype), k=asked.k.to(dtype), v=asked.v.to(dtype), state=State())
        for _ in range(2)
    )
    assert cpu.unsupported(one) is None
    expected, counts = sparse_attention(two)
    for _ in range(2):  # behind the same state, too
        out, ours = cpu.run(one)
        assert torch.equal(ours.keys, counts.keys), asked.spec
        assert torch.equal(ours.attn, counts.attn) and torch.equal(ours.vrow, counts.vrow), asked.spec
        for name in ("row", "row_vrows"):
            assert (getattr(ours, name) is None) == (getattr(counts, name) is None)
            assert getattr(ours, name) is None or torch.equal(getattr(ours, name), getattr(counts, name))
        assert out.dtype == dtype
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(out, expected, **tolerance)
    uncounted, none = cpu.run(replace(one, count=False))
    assert none is None and torch.equal(uncounted, out)
    return share_read(asked, ours.keys)


@pytest.mark.parametrize("copy", ["int8", "int4"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", ["decode", "padded decode", "static decode"])
def test_equals_the_reference(kind: str, heads: tuple[int, int, int], copy: str) -> None:
    torch.manual_seed(0)
    shares = [check(step(kind, heads, spec, copy)) for spec in SPECS]
    if kind == "decode" and heads[0] < 40:
        assert min(shares) < 0.5 and all(share < 1.0 for share in shares)


@pytest.mark.parametrize("copy", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["few rows", "chunk", "padded chunk", "static cache", "any mask"])
def test_several_steps_at_once(kind: str, copy: str) -> None:
    """As the predictions for a known text are computed."""
    torch.manual_seed(5)
    for spec in SPECS:
        asked = step(kind, HEADS[0], spec, copy)
        assert asked.count_steps
        check(replace(asked, count_rows=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("copy", ["int8", "int4"])
def test_low_precision(copy: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for kind in ("decode", "padded decode"):
        for spec in SPECS:
            check(step(kind, HEADS[0], spec, copy), dtype)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("level", ["x86-64", "haswell"])
def test_lesser_instruction_sets(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if level == "haswell" and not {"avx2", "fma"} <= set(open("/proc/cpuinfo").read().split()):
        pytest.skip("this CPU has no AVX2")
    flags = [f"-march={level}" if flag == "-march=native" else flag for flag in library.FLAGS]
    built = library.open_library(library.build(flags=flags))
    monkeypatch.setattr(library, "load", lambda: built)
    torch.manual_seed(2)
    for copy in ("int8", "int4"):
        for spec in SPECS:
            check(step("decode", HEADS[1], spec, copy))


@pytest.mark.parametrize("copy", ["int8", "int4"])
def test_rows_that_see_no_key_or_few(copy: str) -> None:
    """A row that sees nothing gives zeros and reads nothing; one with n <= K reads all that it sees."""
    torch.manual_seed(3)
    mask = torch.zeros(3, 1, 1, 77, dtype=torch.bool)
    mask[1, ..., 5 : 5 + K] = True
    mask[2, ..., ::2] = True
    asked = step("padded decode", (4, 2, 64), SPECS[0], copy)
    q, k, v = inputs(3, (4, 2, 64), 1, 77)
    asked = replace(asked, q=q, k=k, v=v, rows=rows_of(mask, 1, 77, CPU))
    asked.rows.real = None
    check(asked)
    out, counts = cpu.run(replace(asked, state=State()))
    assert counts.keys[:2, :, 0].tolist() == [[0, 0], [K, K]] and not out[0].any()
    assert counts.keys[2].max() <= 39


def test_steps_by_kernel_and_reference_share_a_state() -> None:
    """Steps that the kernel and the reference take in turns, behind a crop, are those of either alone."""
    torch.manual_seed(4)
    q, k, v = inputs(2, (4, 2, 64), 40, 140)
    spec = LayerSpec(TopTheta(key_copy="int4"), "post-softmax", K, vmc=True)
    theta = torch.full((4, 141), 0.02)
    theta[:, : K + 1] = -math.inf
    turns, alone = State(), State()
    for number, end in enumerate([*range(101, 121), *range(110, 141)]):
        if end < turns.key_codes.length if turns.key_codes else False:
            turns.crop(end - 1), alone.crop(end - 1)
        rows = rows_of(None, 1, end, CPU)
        one = call(
            q[:, :, end - 101 : end - 100], k[:, :, :end], v[:, :, :end], rows, spec, SCALE, theta,
            count=True, decode=True, state=turns,
        )  # fmt: skip
        out, counts = (cpu.run if number % 3 else sparse_attention)(one)
        expected, of_reference = sparse_attention(replace(one, state=alone))
        assert torch.equal(counts.keys, of_reference.keys) and torch.equal(counts.attn, of_reference.attn)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_which_calls_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FORCED", None)

    def chosen(kind: str, heads: tuple[int, int, int], copy: str, **changes) -> str | None:
        backend = registry.choose(replace(step(kind, heads, SPECS[0], copy), count=False, **changes))
        return None if backend is None else backend.name

    assert chosen("decode", HEADS[0], "int4") == chosen("decode", (8, 2, 80), "int8") == "cpu"
    assert chosen("decode", (8, 2, 80), "int4") is None  # no multiple of 32
    assert chosen("few rows", HEADS[0], "int8") == "cpu"  # several steps at once
    assert chosen("prefill", HEADS[0], "int4", decode=False) == "cpu"
    assert chosen("decode", HEADS[0], "int4", softcap=20.0) is None
