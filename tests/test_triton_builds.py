"""Whether the Triton kernels build for Hopper (sm_90), which needs no GPU, and within its registers."""

import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.test_kernels_triton import needs_triton
from toptheta.kernels import gpu

MODEL = {"q", "k", "v", "out"}  # pointers to the model's type; the rest have one of their own
POINTERS = {
    "mask": "*u1", "key_real": "*u1", "real_rows": "*u1", "n": "*i64", "theta": "*fp32", "table": "*fp32",
    "v_sum": "*fp32", "v_mean": "*fp32", "scores": "*fp32", "keep": "*i8", "part_peak": "*fp32",
    "part_total": "*fp32", "part_taken": "*fp32", "part_count": "*i32", "part_acc": "*fp32",
    "attn": "*i64", "vrow": "*i32", "codes": "*i8", "steps": "*fp32", "slacks": "*fp32", "k_mean": "*fp32",
    "span": "*i32", "listed": "*i32",
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
@pytest.mark.parametrize(
    "kernel", ["split", "filtered", "gather", "merge", "prefill", "prefill post-softmax"]
)
def test_builds_for_hopper_without_spills(kernel):
    """bfloat16, head_dim 128, 4 heads a group."""
    from toptheta.kernels import triton_decode, triton_filtered, triton_prefill

    tile = {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_D": 128}
    decode = triton_decode.TILE | {"maxnreg": triton_decode.REGISTERS}
    rows = tile | {"BLOCK_G": 16, "BLOCK_N": decode.pop("BLOCK_N"), "HAS_MASK": True}
    stores = {"COUNT": False, "STORE_SCORES": False}
    if kernel == "split":
        constants = rows | stores | {"BLOCK_S": triton_decode.MAX_SPLITS, "WITH_V": True, "RESCUE": False}
        shared, usage = compiled(triton_decode.split_kernel, "bf16", constants, decode)
    elif kernel == "filtered":
        constants = rows | stores | {"BLOCK_F": triton_decode.BLOCK_F}
        shared, usage = compiled(triton_filtered.filtered_kernel, "bf16", constants, decode)
    elif kernel == "gather":
        constants = rows | {"BLOCK_S": triton_decode.MAX_SPLITS, "CHOSEN": False, "STORE_KEEP": False}
        shared, usage = compiled(triton_decode.gather_kernel, "bf16", constants, decode)
    elif kernel == "merge":
        constants = tile | {
            "BLOCK_S": triton_decode.MAX_SPLITS,
            "STEP": 16,
            "SDC": 1,
            "VMC": True,
            "ONE_PEAK": False,
        }
        shared, usage = compiled(triton_decode.merge_kernel, "bf16", constants, {"num_warps": 4})
    else:
        post = kernel.endswith("post-softmax")
        both = dict(triton_prefill.TILE)
        options = {name: both.pop(name) for name in ("num_warps", "num_stages")}
        flags = {
            "CAUSAL": True,
            "HAS_KEY_REAL": False,
            "HAS_REAL_ROWS": False,
            "COUNT": False,
            "VMC": True,
            "SKIP": True,
        }
        constants = tile | both | flags | {"POST": post, "SDC": -1 if post else 1}
        shared, usage = compiled(triton_prefill.prefill_kernel, "bf16", constants, options)
    assert shared <= 227 * 1024  # what a Hopper processor gives one program
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
