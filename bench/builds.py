#!/usr/bin/env python3
"""What Triton's compiler makes of the GPU kernels, for any chip. No GPU is needed; nothing is timed.

    .venv/bin/python bench/builds.py [--chip sm_90] [--output FILE]
    .venv/bin/python bench/builds.py --gate [--chip sm_80,gfx942] [--dtype bf16] [--head-dim 128]

For each kernel, the first prints the registers of a thread, the bytes of shared memory, how many programs a
processor (SM) can hold at the same time, the bytes spilled and, for each loop in the machine code, the
instructions of a warp, the barriers and the issue cycles. A processor issues instructions of four warps a
cycle, so its time for a tile is at least warps / 4 times the instructions. Builds are for bfloat16, head_dim
128 and 4 heads a group; "masked" ones are for padding or a static cache. --gate compiles every option, alone
and all together, for every chip, type and head_dim, and lists what does not build or does not fit; some
minutes for each of them.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toptheta.kernels.triton.chips import KNOWN
from toptheta.methods.key_copy import FIRST, LAST

MODEL = {
    "q",
    "k",
    "v",
    "out",
    "new_k",
    "new_v",
    "keys",
    "values",
}  # pointers to the model's type; the others are in POINTERS
POINTERS = {
    "mask": "*u1", "key_real": "*u1", "real_rows": "*u1", "n": "*i64", "theta": "*fp32", "table": "*fp32",
    "v_sum": "*fp32", "v_mean": "*fp32", "scores": "*fp32", "keep": "*i8", "part_max": "*fp32",
    "part_sum": "*fp32", "part_kept_sum": "*fp32", "part_count": "*i32", "part_acc": "*fp32",
    "part_best": "*fp32", "factor": "*fp32",
    "first_at": "*i64", "first": "*i64", "sums": "*fp32", "attn": "*i64", "vrow": "*i32",
    "always": "*u1", "key_steps": "*bf16", "copy_max": "*fp32", "copy_sum": "*fp32",
    "codes": "*i8", "steps": "*fp32", "slacks": "*fp32", "k_mean": "*fp32",
    "span": "*i32", "listed": "*i32", "end": "*i64", "finished": "*i32", "total": "*fp64",
}  # fmt: skip
TOOLS = Path("backends/nvidia/bin")
SHORTEST_LOOP = 50  # instructions: shorter loops do not go over tiles


@dataclass
class Build:
    """A kernel as built. spilled: bytes; loops: for each loop over tiles its instructions, its barriers, and
    its loads and stores of spilled values. resident: programs that a processor holds at the same time."""

    warps: int
    registers: int
    shared: int
    spilled: int
    resident: int
    loops: list[tuple[int, int, int]] = field(default_factory=list)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Kernels = dict[str, tuple[Any, dict[str, Any], dict[str, int]]]


def split_off(tile: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of a kernel, and compile options."""
    options = {name: value for name, value in tile.items() if name.islower()}
    return {name: value for name, value in tile.items() if name not in options}, options


def kernels(
    chip: str = "sm_90", dtype: str = "bf16", head_dim: int = 128, group: int = 4, every: bool = False
) -> Kernels:
    """For each kernel: the function, its constants and its compile options, as toptheta/kernels sets them for
    the chip. every: all their options."""
    from toptheta.kernels.int8_keys import LARGEST_CODE, TINY
    from toptheta.kernels.triton import decode as triton_decode
    from toptheta.kernels.triton import prefill as triton_prefill
    from toptheta.kernels.triton.append import add_value_kernel, append_kernel
    from toptheta.kernels.triton.copied import candidates_kernel, estimate_kernel
    from toptheta.kernels.triton.filtered import filtered_kernel
    from toptheta.kernels.triton.gather import gather_kernel
    from toptheta.kernels.triton.split import split_kernel
    from toptheta.kernels.triton.value_sums import block_sums_kernel

    about = KNOWN[chip]
    block_d = max(32, 1 << (head_dim - 1).bit_length())
    sizes = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": block_d}
    block_g = max(16, 1 << (group - 1).bit_length())
    tile, decode = split_off(triton_decode.options(about, DTYPES[dtype], block_d, group))
    rows = sizes | tile | {"BLOCK_G": block_g}
    splits, listing = {"BLOCK_S": triton_decode.part_block(1)}, {"BLOCK_F": triton_decode.BLOCK_F}
    tile, prefill = split_off(triton_prefill.options(about, DTYPES[dtype], block_d, True))
    other_tile, unskipped = split_off(triton_prefill.options(about, DTYPES[dtype], block_d, False))
    blocks = sizes | tile | {"FLAT": about.blackwell, "SUM_BLOCK": triton_prefill.SUM_BLOCK}
    merged = sizes | splits | {"STEP": 16}
    merge: dict[str, int] = {"num_warps": 4}

    def choices(**flags: tuple[Any, ...]) -> list[dict[str, Any]]:
        """The first values of all flags; if `every`, also each other value alone, and all the last ones."""
        first = {name: values[0] for name, values in flags.items()}
        if not every:
            return [first]
        alone = [first | {name: value} for name, values in flags.items() for value in values[1:]]
        last = {name: values[-1] for name, values in flags.items()}
        return [first, *alone, *([last] if last not in [first, *alone] else [])]

    both = (False, True)
    stores = {"COUNT": both, "STORE_SCORES": both}
    groups: list[tuple[str, Any, dict[str, Any], dict[str, int], list[dict[str, Any]]]] = [
        ("split", split_kernel, rows | splits | {"WITH_V": True, "WEIGHED": False}, decode,
         choices(FALLBACK=both, **stores)),
        ("split, scores only", split_kernel,
         rows | splits | {"WITH_V": False, "STORE_SCORES": True, "COUNT": False, "FALLBACK": False}, decode,
         choices(WEIGHED=both)),
        ("filtered", filtered_kernel, rows | listing, decode, choices(**stores)),
        ("scores by a copy of K", estimate_kernel, rows, decode, choices(BITS=(4, 8))),
        ("candidates", candidates_kernel,
         rows | splits | listing | {"ON_SCORES": False, "FIRST": FIRST, "LAST": LAST}, decode,
         choices(WEIGHED=both)),
        ("candidates, scores", candidates_kernel,
         rows | splits | listing | {"ON_SCORES": True, "WEIGHED": False, "FIRST": FIRST, "LAST": LAST},
         decode, [{}]),
        ("gather", gather_kernel, rows | splits | listing | {"KEEP_GIVEN": False, "ON_SCORES": False}, decode,
         choices(STORE_KEEP=both, WEIGHED=both, BY_COPY=both)),
        ("gather, scores", gather_kernel,
         rows | splits | listing | {"KEEP_GIVEN": False, "ON_SCORES": True, "WEIGHED": False,
                                     "BY_COPY": True}, decode, choices(STORE_KEEP=both)),
        ("merge", triton_decode.merge_kernel, merged | {"ONE_MAX": False}, merge,
         choices(SDC=(1, 0, 2, 3), VMC=(True, False))),
        ("prefill", triton_prefill.prefill_kernel, blocks | {"POST": False, "WEIGHED": False}, prefill,
         choices(CAUSAL=(True, False), HAS_REAL_ROWS=both, SDC=(1, 0, 2, 3), VMC=(True, False), COUNT=both,
                 SKIP=(triton_prefill.SKIP, not triton_prefill.SKIP))),
        ("prefill, post-softmax", triton_prefill.prefill_kernel, blocks | {"POST": True, "SDC": -1}, prefill,
         choices(CAUSAL=(True, False), HAS_REAL_ROWS=both, VMC=(True, False), COUNT=both, WEIGHED=both,
                 SKIP=(triton_prefill.SKIP, not triton_prefill.SKIP))),
    ]  # fmt: skip
    one_row = {"HEAD_DIM": head_dim, "BLOCK_D": 1 << (head_dim - 1).bit_length()}
    groups += [
        ("append", append_kernel, one_row | {"LARGEST": LARGEST_CODE, "TINY": TINY}, {"num_warps": 1},
         choices(INT8=(True, False))),
        ("add to the sum of V", add_value_kernel, one_row, {"num_warps": 1}, [{}]),
    ]  # fmt: skip
    if every:
        sums = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK": triton_prefill.SUM_BLOCK}
        groups += [
            ("sums of V", block_sums_kernel, sums, merge, [{}]),
            ("gather, Top-k", gather_kernel,
             rows | splits | listing | {"KEEP_GIVEN": True, "STORE_KEEP": True, "ON_SCORES": False,
                                         "WEIGHED": False, "BY_COPY": False}, decode, [{}]),
            ("merge, two stages", triton_decode.merge_kernel, merged | {"ONE_MAX": True}, merge,
             choices(SDC=(-1, 0, 1, 2, 3), VMC=(True, False))),
        ]  # fmt: skip
    found: Kernels = {}
    for name, function, constants, options, combinations in groups:
        for chosen in combinations:
            for flags in ({}, {"masked": True}):
                mask = {}
                if "HAS_MASK" in function.arg_names:
                    mask = {"HAS_MASK": bool(flags)}
                elif "HAS_KEY_REAL" in function.arg_names:
                    mask = {"HAS_KEY_REAL": bool(flags)}
                elif flags:
                    continue
                extra = [f"{flag} {value}" for flag, value in chosen.items()] if every else []
                label = ", ".join([name, *(["masked"] if flags else []), *extra])
                tile, own = ({}, options) if chosen.get("SKIP", True) else (other_tile, unskipped)
                found[label] = (function, constants | tile | chosen | mask, own)
    return found


def compiled(function: Any, constants: dict[str, Any], options: dict[str, int], dtype: str, chip: str) -> Any:
    """`function` compiled for a chip, with every stride a multiple of 16 elements."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    about = KNOWN[chip]
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
    target = GPUTarget(about.backend, about.arch, 32 if about.backend == "cuda" else 64)
    return triton.compile(source, target=target, options=options)


def build(
    function: Any,
    constants: dict[str, Any],
    options: dict[str, int],
    dtype: str = "bf16",
    chip: str = "sm_90",
) -> Build:
    """What the compiler says of a kernel on an NVIDIA chip."""
    import triton

    made = compiled(function, constants, options, dtype, chip)
    tool = Path(triton.__file__).parent / TOOLS / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    resident = KNOWN[chip].resident(found["REG"], made.metadata.shared, options["num_warps"])
    return Build(
        options["num_warps"], found["REG"], made.metadata.shared, found["STACK"] + found["LOCAL"], resident,
        loops(code),
    )  # fmt: skip


def fault(
    function: Any, constants: dict[str, Any], options: dict[str, int], dtype: str, chip: str
) -> str | None:
    """Why a kernel cannot run on a chip, or None: it does not compile, or needs too much shared memory."""
    try:
        shared = compiled(function, constants, options, dtype, chip).metadata.shared
    except Exception as error:  # the compiler raises whatever its passes raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    most = KNOWN[chip].shared
    return f"{shared} bytes of shared memory, of {most}" if shared > most else None


def gate(chips: list[str], dtypes: list[str], head_dims: list[int]) -> int:
    """Compile everything, print what fails; returns how many do."""
    failed = 0
    for chip, dtype, head_dim in itertools.product(chips, dtypes, head_dims):
        found = kernels(chip, dtype, head_dim, every=True)
        faults = {name: fault(*found[name], dtype, chip) for name in found}
        bad = {name: why for name, why in faults.items() if why is not None}
        print(f"{chip} {dtype} head_dim {head_dim}: {len(found)} builds, {len(bad)} fail", flush=True)
        for name, why in bad.items():
            print(f"  {name}: {why}", flush=True)
        failed += len(bad)
    return failed


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
    parser.add_argument(
        "--chip", help=f"of {', '.join(KNOWN)}; a list with --gate; default sm_90, with --gate all"
    )
    parser.add_argument("--gate", action="store_true", help="compile all options, for all chips")
    parser.add_argument("--dtype", help="with --gate: of bf16, fp16, fp32; default all")
    parser.add_argument("--head-dim", help="with --gate: default 64,128,256")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    try:
        import triton
    except ImportError:
        parser.exit(2, "builds.py: Triton is not installed: pip install triton\n")
    chips = (args.chip or (",".join(KNOWN) if args.gate else "sm_90")).split(",")
    dtypes = (args.dtype or ",".join(DTYPES)).split(",")
    for given, known in ((chips, KNOWN), (dtypes, DTYPES)):
        for one in given:
            if one not in known:
                parser.error(f"{one} is none of {', '.join(known)}")
    if args.gate:
        sys.exit(min(1, gate(chips, dtypes, [int(d) for d in (args.head_dim or "64,128,256").split(",")])))
    chip = chips[0]
    if KNOWN[chip].backend != "cuda":
        parser.error("machine code is read for NVIDIA chips only; --gate compiles for others")
    print(f"triton {triton.__version__}, {chip}, bfloat16, head_dim 128, 4 heads a group\n")
    print(f"{'kernel':29} {'registers':>9} {'shared':>7} {'resident':>8} {'spilled':>7}  loops over tiles")
    results = {}
    for name, (function, constants, options) in kernels(chip).items():
        made = build(function, constants, options, chip=chip)
        said = "; ".join(
            f"{count} instructions, {bars} barriers, {count * made.warps // 4} cycles"
            + (f", {spills} of spilled values" if spills else "")
            for count, bars, spills in made.loops
        )
        print(
            f"{name:29} {made.registers:9} {made.shared:7} {made.resident:8} {made.spilled:7}  {said or '-'}"
        )
        results[name] = asdict(made)
    if args.output:
        args.output.write_text(
            json.dumps({"triton": triton.__version__, "kernels": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
