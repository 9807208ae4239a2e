"""The Triton kernels against plain PyTorch (toptheta/attention.py), and whether they build for Hopper.

On a GPU the tests run as they are. Without one they run in Triton's interpreter, which has to be chosen
before Triton is imported (transformers does that): `test_in_the_interpreter` runs this file again in a
process of its own. Inputs and tolerance are those of test_kernels_cpu.py.
"""

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.test_kernels_cpu import SCALE, SPECS, K, case, in_float64, inputs, tables
from toptheta.attention import LayerSpec, mean_of_visible, sparse_attention
from toptheta.kernels import gpu
from toptheta.rows import Rows, rows_of

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


@needs_triton
@pytest.mark.skipif(HERE, reason="the tests run in this process")
def test_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def on_device(rows: Rows) -> Rows:
    def move(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(DEVICE)

    return replace(
        rows, n=rows.n.to(DEVICE), real=move(rows.real), mask=move(rows.mask), key_real=move(rows.key_real)
    )


def check(q, k, v, rows: Rows, specs, dtype: torch.dtype = torch.float32, **more) -> None:
    """Same counts, and an error against float64 of at most twice plain PyTorch's, plus two roundings."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    moved, device_rows = [x.to(DEVICE) for x in (q, k, v)], on_device(rows)
    worst = torch.zeros(3)
    for spec in specs:
        assert gpu.unsupported(*moved, device_rows, spec) is None, spec
        theta, table = tables(spec, q.shape[1], k.shape[2])
        plain, expected = sparse_attention(q, k, v, rows, spec, SCALE, theta, table, count=True)
        at = (theta.to(DEVICE), table.to(DEVICE))
        out, counts = gpu.attend(*moved, device_rows, spec, SCALE, *at, count=True, **more)
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


def supported(q_len: int) -> list[LayerSpec]:
    return [s for s in SPECS if not (s.sparse and (s.capk or (s.mode == 1 and q_len > 1)))]


@here
@pytest.mark.parametrize(
    "kind, heads",
    [
        ("padded decode", (3, 1, 16)),
        ("static decode", (8, 2, 24)),
        ("static decode", (3, 3, 16)),
        ("prefill", (3, 1, 16)),
        ("left padding", (4, 1, 24)),
        ("any mask", (3, 1, 16)),
        ("static cache", (2, 2, 16)),
    ],
    ids=str,
)
def test_equals_plain_pytorch(kind, heads):
    torch.manual_seed(0)
    rows, batch, q_len, kv_len = case(kind)
    specs = supported(q_len)
    if q_len > 1:  # without the interpreter's time for every pair: each option, with and without VMC
        specs = specs[:: 1 if DEVICE.type == "cuda" else 2] + [LayerSpec(0, "post-softmax", K, vmc=True)]
    check(*inputs(batch, heads, q_len, kv_len), rows, specs)


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["padded decode", "padded chunk"])
def test_low_precision(kind, dtype):
    if gpu.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    torch.manual_seed(1)
    rows, batch, q_len, kv_len = case(kind)
    check(*inputs(batch, (3, 1, 16), q_len, kv_len), rows, supported(q_len)[::3], dtype)


@here
def test_many_splits():
    torch.manual_seed(2)
    rows, batch, q_len, kv_len = case("decode")
    specs = [
        LayerSpec(0, "pre-softmax", K, "exact", vmc=True),
        LayerSpec(0, "post-softmax", K, vmc=True),
        LayerSpec(1, "pre-softmax", K, "exact"),
    ]
    check(*inputs(batch, (9, 3, 16), q_len, kv_len), rows, specs)


@here
@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize(
    "spec", [LayerSpec(), LayerSpec(0, "pre-softmax", K, "exact")], ids=["dense", "theta"]
)
def test_threshold_of_minus_infinity_is_dense_bit_for_bit(q_len, spec):
    torch.manual_seed(3)
    q, k, v = (x.to(DEVICE) for x in inputs(1, (3, 1, 16), q_len, 200))
    rows = on_device(rows_of(None, q_len, 200, torch.device("cpu")))
    theta = torch.full((3, 201), -math.inf, device=DEVICE)
    dense, _ = gpu.attend(q, k, v, rows, LayerSpec(), SCALE)
    assert torch.equal(gpu.attend(q, k, v, rows, spec, SCALE, theta)[0], dense)


@here
@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
def test_ties(placement):
    """All keys alike: Top-k keeps exactly K; Top-theta, where nothing passes, all that tie for the peak."""
    q, k = torch.ones(1, 3, 1, 16, device=DEVICE), torch.ones(1, 1, 300, 16, device=DEVICE)
    v = torch.randn(1, 1, 300, 16).to(DEVICE)
    rows = on_device(rows_of(None, 1, 300, torch.device("cpu")))
    _, counts = gpu.attend(q, k, v, rows, LayerSpec(1, placement, K), SCALE, count=True)
    assert counts is not None and counts.attn.tolist() == [[K] * 3]
    theta = torch.full((3, 301), 1e9, device=DEVICE)
    out, counts = gpu.attend(q, k, v, rows, LayerSpec(0, placement, K), SCALE, theta, count=True)
    assert counts is not None and counts.attn.tolist() == [[300] * 3]
    torch.testing.assert_close(out[0, :, 0], v[0, 0].mean(dim=0).expand(3, 16), rtol=1e-5, atol=1e-5)


@here
def test_v_sum_replaces_reading_v():
    torch.manual_seed(4)
    rows, batch, q_len, kv_len = case("static decode")
    q, k, v = inputs(batch, (4, 2, 16), q_len, kv_len)
    total = (mean_of_visible(v, rows)[:, :, 0] * rows.n[..., None]).to(DEVICE)
    check(q, k, v, rows, [LayerSpec(0, "pre-softmax", K, "exact", vmc=True)], v_sum=total)


@here
def test_operators_have_true_fakes():
    """The shapes and types that torch.compile is told are those that come out."""
    q, k, v = (x.to(DEVICE) for x in inputs(2, (4, 2, 16), 1, 40))
    n, theta = torch.full((1, 1), 40, device=DEVICE), torch.full((1, 1), -math.inf, device=DEVICE)
    settings = (SCALE, 0, "pre-softmax", K, "none", 1.0, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(gpu._decode, (q, k, v, n, None, theta, None, None, *settings), test_utils=checks)
    n = torch.arange(1, 2, device=DEVICE)[None]
    prefill = (q, k, v, n, 0, None, None, None, theta, None, None, *settings)
    torch.library.opcheck(gpu._prefill, prefill, test_utils=checks)


@needs_triton
def test_says_what_it_cannot():
    q = torch.zeros(1, 2, 3, 16, device="meta")
    rows = rows_of(None, 3, 3, torch.device("cpu"))
    assert "not on a GPU" in (gpu.unsupported(q, q, q, rows, LayerSpec()) or "")
    if HERE:
        q = torch.zeros(1, 2, 3, 16, device=DEVICE)
        assert "Top-k" in (gpu.unsupported(q, q, q, rows, LayerSpec(1, "pre-softmax", 2)) or "")
        assert "capk" in (gpu.unsupported(q, q, q, rows, LayerSpec(0, "pre-softmax", 2, capk=True)) or "")


# ---- Compiling for sm_90, which needs no GPU ----

MODEL = {"q", "k", "v", "out"}  # pointers to the model's type; the rest have one of their own
POINTERS = {
    "mask": "*u1", "key_real": "*u1", "real_rows": "*u1", "n": "*i64", "theta": "*fp32", "table": "*fp32",
    "v_sum": "*fp32", "v_mean": "*fp32", "scores": "*fp32", "keep": "*i8", "part_peak": "*fp32",
    "part_total": "*fp32", "part_taken": "*fp32", "part_count": "*i32", "part_acc": "*fp32",
    "attn": "*i64", "vrow": "*i32",
}  # fmt: skip


def compiled(function, dtype: str, constants: dict[str, object], options: dict[str, int]) -> tuple[int, str]:
    """Bytes of shared memory, and what cuobjdump says of registers and stack (spills)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for i, name in enumerate(function.arg_names):
        kind = f"*{dtype}" if name in MODEL else POINTERS.get(name)
        if name in constants:
            kind = "constexpr"
        elif kind or name.endswith(("_batch", "_head", "_row", "_stride")):
            aligned[(i,)] = [["tt.divisibility", 16]]
        signature[name] = kind or ("fp32" if name in ("scale", "sdc_scale") else "i32")
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature=signature, constexprs=values, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return built.metadata.shared, said.stdout + said.stderr


@needs_triton
@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("kernel", ["split", "gather", "merge", "prefill", "prefill post-softmax"])
def test_builds_for_hopper_without_spills(kernel):
    """bfloat16, head_dim 128, 4 heads a group."""
    from toptheta.kernels import triton_decode, triton_prefill

    tile = {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_D": 128}
    rows = tile | {"BLOCK_G": 16, "BLOCK_N": triton_decode.BLOCK_N}
    decode = triton_decode.options(torch.bfloat16, 128)
    if kernel == "split":
        constants = rows | {"HAS_MASK": True, "WITH_V": True, "STORE_SCORES": False}
        shared, usage = compiled(triton_decode.split_kernel, "bf16", constants, decode)
    elif kernel == "gather":
        constants = rows | {"BLOCK_S": 64, "CHOSEN": False, "STORE_KEEP": False}
        shared, usage = compiled(triton_decode.gather_kernel, "bf16", constants, decode)
    elif kernel == "merge":
        constants = tile | {"BLOCK_S": 64, "STEP": 16, "SDC": 1, "VMC": True, "ONE_PEAK": False}
        shared, usage = compiled(triton_decode.merge_kernel, "bf16", constants, {"num_warps": 4})
    else:
        post = kernel.endswith("post-softmax")
        both = triton_prefill.options(torch.bfloat16, 128)
        options = {name: both.pop(name) for name in ("num_warps", "num_stages")}
        flags = {"CAUSAL": True, "HAS_KEY_REAL": False, "HAS_REAL_ROWS": False, "COUNT": False, "VMC": True}
        constants = tile | both | flags | {"POST": post, "SDC": -1 if post else 1}
        shared, usage = compiled(triton_prefill.prefill_kernel, "bf16", constants, options)
    assert shared <= 227 * 1024  # what a Hopper processor gives one program
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
