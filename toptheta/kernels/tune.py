"""`python -m toptheta.kernels.tune`: measure this GPU, in less than five minutes, for two things.

First the tiles, warps and pipeline stages of the Triton kernels, which are the fastest of a few from then on.
Then, for decode and prefill, how long torch's attention, its FlashAttention, our kernel without thresholds
and with thresholds (on scores, on weights, from two tiers of K) take, over lengths, batches and kept shares,
eager and in CUDA graphs: from that `when_slower="dense"` knows where thresholds are slower than dense
attention. Nothing else changes, and nobody has to run it. The profile lies in the cache folder (profile.py).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toptheta.util.errors import UsageError
from toptheta.util.parser import StrictParser
from toptheta.util.progress import Bar, duration

if TYPE_CHECKING:  # Triton has to be imported after TRITON_INTERPRET is set
    import torch

    from toptheta.kernels.drawn import Drawn, Sizes
    from toptheta.kernels.profile import Entry, Kind, Profile

DTYPES = ("bfloat16", "float16")
MODES = ((False, False), (True, False), (True, True))  # masked, graphed; under a graph caches are static
REPETITIONS = 12
TILES_SHARE = 0.4  # of the time, at most, for the tiles


@dataclass(frozen=True)
class Plan:
    """What is measured. tile_lengths: of decode, two tiers and prefill; decode: lengths and batches; few:
    how many configurations of each kind, None: all of tiles.FEW."""

    heads: tuple[int, int, int] = (32, 8, 128)
    dtype: str = "bfloat16"
    tile_lengths: tuple[int, int, int] = (32768, 32768, 8192)
    tile_batch: int = 4
    lengths: tuple[int, ...] = (4096, 32768, 1024, 131072, 12288)
    batches: tuple[int, ...] = (1, 4, 16)
    prefills: tuple[int, ...] = (4096, 1024, 16384)
    shares: tuple[float, ...] = (0.003, 0.02, 0.1, 0.3, 1.0)
    few: int | None = None
    cold_bytes: int = 400 << 20
    seconds: float = 270.0


TINY = Plan((4, 2, 32), "float16", (70, 70, 40), 1, (70, 40), (1,), (40,), (0.1, 1.0), 2, 0, 1e6)


class Clock:
    """The time limit of a plan. now: the current time in seconds."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self.seconds, self.now, self.start = seconds, now, now()

    def over(self, share: float = 1.0) -> bool:
        return self.now() - self.start > share * self.seconds


def parser() -> StrictParser:
    made = StrictParser(
        prog="python -m toptheta.kernels.tune",
        description="Measure this GPU: the best tile sizes of the kernels, and where thresholds are slower "
        "than dense attention.",
    )
    made.add_argument(
        "--heads",
        default="32:8:128",
        metavar="H:KV:D",
        help="query heads, KV heads and head_dim of the model (default 32:8:128, Llama-3-8B)",
    )
    made.add_argument("--dtype", default="bfloat16", help=f"{' or '.join(DTYPES)} (default bfloat16)")
    made.add_argument(
        "--minutes",
        default="4.5",
        metavar="N",
        help="time limit; what is not measured by then is left out (default 4.5)",
    )
    made.add_argument("--output", metavar="FILE", help="also write the profile to this file")
    made.add_argument(
        "--tiny",
        action="store_true",
        help="test the command with tiny sizes, in Triton's interpreter if there is no GPU; saves no profile",
    )
    return made


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Raises UsageError."""
    if arguments.tiny:
        return TINY
    parts = arguments.heads.split(":")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--heads is {arguments.heads!r}: give query heads:KV heads:head_dim, as 32:8:128.")
    num_heads, num_kv_heads, head_dim = map(int, parts)
    if num_heads % num_kv_heads or head_dim % 8 or head_dim > 256:
        raise UsageError(
            f"--heads is {arguments.heads}: query heads must be a multiple of KV heads, and head_dim a "
            "multiple of 8 up to 256."
        )
    if arguments.dtype not in DTYPES:
        raise UsageError(f"--dtype is {arguments.dtype!r}: choose {' or '.join(DTYPES)}.")
    try:
        minutes = float(arguments.minutes)
    except ValueError:
        minutes = 0.0
    if not 0.0 < minutes <= 60.0:
        raise UsageError(f"--minutes is {arguments.minutes!r}: give a number above 0 and up to 60.")
    return Plan((num_heads, num_kv_heads, head_dim), arguments.dtype, seconds=60.0 * minutes)


def best_tiles(plan: Plan, device: "torch.device", clock: Clock, step: Callable[[], None]) -> dict[str, Any]:
    """The fastest configuration of each kind of kernel, which stays in use afterwards."""
    import torch

    from toptheta.kernels.drawn import Drawn
    from toptheta.kernels.triton import tiles

    chosen: dict[str, Any] = {}
    for kind, length in zip(tiles.KINDS, plan.tile_lengths):
        phase, batch = ("prefill", 1) if kind == "prefill" else ("decode", plan.tile_batch)
        drawn = Drawn(_sizes(plan, phase, batch, length), device, plan.cold_bytes)
        spec, theta = _thresholds(drawn, "pre-softmax", 0.02)
        calls = {"ms": drawn.ours(spec, theta, two_tier=kind == "int8")}
        expected = {name: call()[0].float() for name, call in calls.items()}
        rows = []
        for config in tiles.FEW[kind][: plan.few]:
            if not clock.over(TILES_SHARE):
                rows.append(tiles.tune(kind, config, calls, expected, len(drawn.k)) | {"config": config})
            step()
        rows = [row for row in rows if "ms" in row]
        if rows:
            chosen[kind] = min(rows, key=lambda row: row["ms"])["config"]
            tiles.use(kind, chosen[kind])
        del drawn, calls
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return chosen


def _sizes(plan: Plan, phase: str, batch: int, length: int) -> "Sizes":
    import torch

    from toptheta.kernels.drawn import Sizes

    return Sizes(*plan.heads, getattr(torch, plan.dtype), phase, batch, length)


def _thresholds(drawn: "Drawn", placement: str, share: float) -> tuple[Any, "torch.Tensor"]:
    """A spec with thresholds that keep about this share of the elements."""
    import torch

    from toptheta.kernels.drawn import threshold
    from toptheta.methods.params import LayerSpec
    from toptheta.methods.top_theta import TopTheta

    sizes = drawn.sizes
    theta = torch.full((sizes.num_heads, 2), threshold(share, placement, sizes.kv_len), device=drawn.device)
    sdc = "exact" if placement == "pre-softmax" else "none"
    return LayerSpec(TopTheta(), placement, 1, sdc, vmc=True), theta


def kept_share(drawn: "Drawn", spec: Any, theta: "torch.Tensor") -> float:
    """The share of a KV head's V rows that are read; for a prompt, the share of elements that are kept."""
    from toptheta.kernels.triton import backend as gpu

    _, counts = gpu.run(drawn.call(spec, theta, 0, count=True))
    assert counts is not None
    if drawn.sizes.phase == "decode":
        return float((counts.vrow > 0).float().mean())
    rows = float(drawn.rows.n.sum()) * drawn.sizes.batch * drawn.sizes.num_heads
    return float(counts.attn.sum()) / rows


def ways(drawn: "Drawn", shares: tuple[float, ...], masked: bool) -> Iterator[tuple[str, float, Any]]:
    """Every implementation, with the share that it keeps and its call."""
    from toptheta.kernels.dense import dense_ways
    from toptheta.kernels.profile import SCORES, TWO_TIER, WEIGHTS

    for way in dense_ways(masked):
        yield way, 1.0, drawn.dense(way, masked)
    for way, placement in ((SCORES, "pre-softmax"), (WEIGHTS, "post-softmax"), (TWO_TIER, "pre-softmax")):
        if way == TWO_TIER and drawn.sizes.phase != "decode":
            continue
        for share in shares:
            spec, theta = _thresholds(drawn, placement, share)
            kept = round(kept_share(drawn, spec, theta), 6)
            yield way, kept, drawn.ours(spec, theta, way == TWO_TIER, masked)


def measure_shape(
    drawn: "Drawn", plan: Plan, masked: bool, graphed: bool, failed: dict[str, str]
) -> list["Entry"]:
    """Times of all implementations, run in turn. failed: receives why the others cannot be run."""
    import torch

    from toptheta.kernels.profile import Entry, Kind
    from toptheta.kernels.timing import Graph, captured, median_times, warmed

    sizes, graphs, kept_of = drawn.sizes, dict[str, Graph](), dict[str, tuple[str, float]]()
    for way, kept, call in ways(drawn, plan.shares, masked):
        name = f"{way} {kept}"
        try:
            graphs[name] = captured(call) if graphed else warmed(call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a way that this GPU or type does not have must not end the run
            failed[way] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:200]
            continue
        kept_of[name] = way, kept
    times = median_times(graphs, REPETITIONS)
    group, batch_heads = sizes.num_heads // sizes.num_kv_heads, sizes.batch * sizes.num_kv_heads
    kind = Kind(sizes.phase, group, sizes.head_dim, plan.dtype, graphed, masked)
    return [
        Entry(kind, way, batch_heads, sizes.kv_len, kept, round(times[name] / len(drawn.k), 5))
        for name, (way, kept) in kept_of.items()
    ]


def shapes(plan: Plan) -> list[tuple["Sizes", tuple[tuple[bool, bool], ...]]]:
    """The cases in the order in which they are measured, with their modes."""
    found = [(_sizes(plan, "decode", batch, n), MODES) for n in plan.lengths for batch in plan.batches]
    return found + [(_sizes(plan, "prefill", 1, n), MODES[:1]) for n in plan.prefills]


def fits(sizes: "Sizes", plan: Plan, device: "torch.device") -> bool:
    """Whether K, V, the int8 copy and the memory for creating it fit into the free memory."""
    import torch

    if device.type != "cuda":
        return True
    needed = max(2 * sizes.bytes_k, plan.cold_bytes) * 2 + 8 * sizes.bytes_k // sizes.batch
    return needed < torch.cuda.mem_get_info(device)[0]


def tune(plan: Plan, device: "torch.device", clock: Clock | None = None) -> "Profile":
    """Measure a profile; the best tiles stay in use afterwards. clock: default one of plan.seconds."""
    import torch

    from toptheta.kernels import profile as profiles
    from toptheta.kernels.drawn import Drawn
    from toptheta.kernels.triton import tiles

    clock = clock or Clock(plan.seconds)
    tiles.use_first()
    todo = shapes(plan)
    sweep = sum(len(tiles.FEW[kind][: plan.few]) for kind in tiles.KINDS)
    bar = Bar(sweep + sum(len(modes) for _, modes in todo), 0, "measurement", "tuning")
    entries: list[profiles.Entry] = []
    failed: dict[str, str] = {}
    left_out = 0
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            chosen = best_tiles(plan, device, clock, lambda: bar.update(1))
            for sizes, modes in todo:
                if clock.over() or not fits(sizes, plan, device):
                    left_out += len(modes)
                    bar.update(len(modes))
                    continue
                try:
                    drawn = Drawn(sizes, device, plan.cold_bytes)
                    for masked, graphed in modes:
                        entries += measure_shape(drawn, plan, masked, graphed, failed)
                        bar.update(1)
                except torch.OutOfMemoryError:
                    left_out += 1
                drawn = None  # type: ignore[assignment]
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    finally:
        bar.close()
    about = {"heads": list(plan.heads), "seconds": round(clock.now() - clock.start, 1), "left out": left_out}
    return profiles.Profile(profiles.key_of(device), chosen, entries, about | {"not run": failed})


def joined(new: "Profile", old: "Profile | None") -> "Profile":
    """The new profile plus the entries of the old one for other heads and types."""
    if old is None:
        return new
    shapes = {(one.kind.group, one.kind.head_dim, one.kind.dtype) for one in new.entries}
    kept = [one for one in old.entries if (one.kind.group, one.kind.head_dim, one.kind.dtype) not in shapes]
    return replace(new, tiles=old.tiles | new.tiles, entries=kept + new.entries)


def table(profile: "Profile") -> list[str]:
    """A readable summary: for every case the fastest dense implementation, and the kept share up to which
    sparse ones are faster."""
    from toptheta.kernels.dense import DENSE_WAYS

    cases: dict[tuple[Kind, int, int], list[Entry]] = {}
    for one in profile.entries:
        cases.setdefault((one.kind, one.batch_heads, one.kv_len), []).append(one)
    lines = []
    for (kind, pairs, length), found in sorted(cases.items(), key=lambda item: str(item[0])):
        dense = min((one for one in found if one.way in DENSE_WAYS), key=lambda one: one.ms, default=None)
        sparse = [one for one in found if one.way not in DENSE_WAYS]
        if dense is None:
            continue
        mode = ("graphed" if kind.graphed else "eager") + (", masked" if kind.masked else "")
        words = f"{kind.phase}, {pairs} KV heads, {length} keys, {mode}: {dense.way} {dense.ms:.4f} ms"
        for way in dict.fromkeys(one.way for one in sparse):
            faster = [one.kept for one in sparse if one.way == way and one.ms < dense.ms]
            words += f"; {way} " + (f"faster up to {100 * max(faster):.1f} % kept" if faster else "slower")
        lines.append(words)
    return lines


def main() -> int:
    try:
        arguments = parser().parse_args()
        plan = plan_of(arguments)
        import torch

        there = torch.cuda.is_available()
        if not there and not arguments.tiny:
            raise UsageError("this machine has no GPU to measure; --tiny tests the command without one.")
        if not there:
            os.environ["TRITON_INTERPRET"] = "1"
        from toptheta.kernels import profile as profiles
        from toptheta.kernels.triton import backend

        if not backend.HAS_TRITON:
            raise UsageError("Triton is not installed, so there are no kernels to measure: install triton.")
        device = torch.device("cuda" if there else "cpu")
        profile = tune(plan, device)
        if not arguments.tiny:
            profile = joined(profile, profiles.profile_of(device))
        print("\n".join(table(profile)))
        for way, why in profile.about["not run"].items():
            print(f"{way}: not run ({why})")
        if arguments.output:
            from toptheta.util.files import write_json

            write_json(Path(arguments.output), asdict(profile))
        took = duration(profile.about["seconds"])
        if arguments.tiny:
            print(f"Tested with tiny sizes in {took}; no profile is saved.")
        else:
            print(f"Profile, measured in {took}: {profiles.save(profile)}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename} cannot be written ({error.strerror}).", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; nothing is saved.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
