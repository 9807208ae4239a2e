#!/usr/bin/env python3
"""What Triton's compiler makes of the GPU kernels for Hopper (sm_90). No GPU is needed; nothing is timed.

For each kernel, this prints the registers of a thread, the bytes of shared memory, how many programs a
processor (SM) can hold at the same time, the bytes spilled and, for each loop in the machine code, the
instructions of a warp, the barriers and the issue cycles. A processor issues instructions of four warps a
cycle, so its time for a tile is at least warps / 4 times the instructions. Builds are for bfloat16, head_dim
128 and 4 heads a group; "masked" ones are for padding or a static cache.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MODEL = {"q", "k", "v", "out"}  # pointers to the model's type; the others are in POINTERS
POINTERS = {
    "mask": "*u1", "key_real": "*u1", "real_rows": "*u1", "n": "*i64", "theta": "*fp32", "table": "*fp32",
    "v_sum": "*fp32", "v_mean": "*fp32", "scores": "*fp32", "keep": "*i8", "part_max": "*fp32",
    "part_sum": "*fp32", "part_kept_sum": "*fp32", "part_count": "*i32", "part_acc": "*fp32",
    "attn": "*i64", "vrow": "*i32", "codes": "*i8", "steps": "*fp32", "slacks": "*fp32", "k_mean": "*fp32",
    "span": "*i32", "listed": "*i32",
}  # fmt: skip
TOOLS = Path("backends/nvidia/bin")
REGISTERS, SHARED, SHARED_OF_ONE = 65536, 228 * 1024, 227 * 1024  # of a Hopper processor
RESERVED = 1024  # bytes of shared memory that the system reserves for every program
SHORTEST_LOOP = 50  # instructions: shorter loops do not go over tiles


@dataclass
class Build:
    """A kernel as built. spilled: bytes; loops: for each loop over tiles its instructions, its barriers, and
    its loads and stores of spilled values."""

    warps: int
    registers: int
    shared: int
    spilled: int
    loops: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def resident(self) -> int:
        """Programs that a processor holds at the same time."""
        return min(REGISTERS // (self.registers * self.warps * 32), SHARED // (self.shared + RESERVED))


def kernels() -> dict[str, tuple[Any, dict[str, Any], dict[str, int]]]:
    """For each kernel: the function, its constants and its compile options, as toptheta/kernels sets them."""
    from toptheta.kernels.triton import decode as triton_decode
    from toptheta.kernels.triton import filtered as triton_filtered
    from toptheta.kernels.triton import prefill as triton_prefill

    sizes = {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_D": 128}
    decode = triton_decode.TILE | {"maxnreg": triton_decode.REGISTERS}
    rows = sizes | {"BLOCK_G": 16, "BLOCK_N": decode.pop("BLOCK_N"), "HAS_MASK": False}
    stores = {"COUNT": False, "STORE_SCORES": False}
    splits = {"BLOCK_S": triton_decode.MAX_SPLITS}
    tile = dict(triton_prefill.TILE)
    prefill = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    tile |= sizes | {"CAUSAL": True, "HAS_KEY_REAL": False, "HAS_REAL_ROWS": False, "COUNT": False}
    tile |= {"VMC": True, "SKIP": triton_prefill.SKIP}
    split = rows | stores | splits | {"FALLBACK": False}
    found = {
        "split": (triton_decode.split_kernel, split | {"WITH_V": True}, decode),
        "split, scores only": (
            triton_decode.split_kernel, split | {"WITH_V": False, "STORE_SCORES": True}, decode,
        ),
        "filtered": (
            triton_filtered.filtered_kernel, rows | stores | {"BLOCK_F": triton_decode.BLOCK_F}, decode,
        ),
        "gather": (
            triton_decode.gather_kernel, rows | splits | {"KEEP_GIVEN": False, "STORE_KEEP": False}, decode,
        ),
        "merge": (
            triton_decode.merge_kernel,
            sizes | splits | {"STEP": 16, "SDC": 1, "VMC": True, "ONE_MAX": False},
            {"num_warps": 4},
        ),
        "prefill": (triton_prefill.prefill_kernel, tile | {"POST": False, "SDC": 1}, prefill),
        "prefill, post-softmax": (triton_prefill.prefill_kernel, tile | {"POST": True, "SDC": -1}, prefill),
    }  # fmt: skip
    for name, (function, constants, options) in list(found.items()):
        for flag in ("HAS_MASK", "HAS_KEY_REAL"):
            if flag in constants:
                found[f"{name}, masked"] = function, constants | {flag: True}, options
    return found


def build(function: Any, constants: dict[str, Any], options: dict[str, int]) -> Build:
    """`function` compiled for bfloat16, with every stride a multiple of 16 elements."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for i, name in enumerate(function.arg_names):
        kind = "*bf16" if name in MODEL else POINTERS.get(name)
        if name in constants:
            kind = "constexpr"
        elif kind or name.endswith(("_batch", "_head", "_row", "_stride")):
            aligned[(i,)] = [["tt.divisibility", 16]]
        signature[name] = kind or ("fp32" if name in ("scale", "sdc_scale") else "i32")
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature=signature, constexprs=values, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / TOOLS / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Build(
        options["num_warps"], found["REG"], made.metadata.shared, found["STACK"] + found["LOCAL"], loops(code)
    )


def loops(code: str) -> list[tuple[int, int, int]]:
    """Instructions, barriers and uses of spilled values between each jump back and its target."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    found = []
    for at, text in lines:
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            body = [other for place, other in lines if int(jump[1], 16) <= place <= at]
            if len(body) >= SHORTEST_LOOP:
                barriers = sum("BAR.SYNC" in other for other in body)
                found.append((len(body), barriers, sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in body)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    try:
        import triton
    except ImportError:
        parser.exit(2, "builds.py: Triton is not installed: pip install triton\n")
    print(f"triton {triton.__version__}, sm_90, bfloat16, head_dim 128, 4 heads a group\n")
    print(f"{'kernel':29} {'registers':>9} {'shared':>7} {'resident':>8} {'spilled':>7}  loops over tiles")
    results = {}
    for name, (function, constants, options) in kernels().items():
        made = build(function, constants, options)
        said = "; ".join(
            f"{count} instructions, {bars} barriers, {count * made.warps // 4} cycles"
            + (f", {spills} of spilled values" if spills else "")
            for count, bars, spills in made.loops
        )
        print(
            f"{name:29} {made.registers:9} {made.shared:7} {made.resident:8} {made.spilled:7}  {said or '-'}"
        )
        results[name] = asdict(made) | {"resident": made.resident}
    if args.output:
        args.output.write_text(
            json.dumps({"triton": triton.__version__, "kernels": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
