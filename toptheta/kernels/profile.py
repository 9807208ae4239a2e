"""Profiles: how long each implementation of attention takes on a GPU, and which one is fastest.

`python -m toptheta.kernels.tune` measures a profile. It is a file in the user's cache folder whose name
depends on the GPU, the versions of torch and Triton, and the sources of the kernels. If any of these changes,
the file is no longer used.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from math import log2
from pathlib import Path
from typing import Any

import torch

from toptheta.kernels.dense import DENSE_WAYS
from toptheta.util.environment import cache_folder
from toptheta.util.errors import UsageError
from toptheta.util.files import write_json
from toptheta.util.schema import Count, Share, read_json

COMMAND = "python -m toptheta.kernels.tune"
# Thresholds on scores, on weights, and on scores with the int8 copy of K
SCORES, WEIGHTS, TWO_TIER = "scores", "weights", "two-tier"
SPARSE_WAYS = (SCORES, WEIGHTS, TWO_TIER)
HYSTERESIS = 0.05  # switch to another implementation only if it is faster by more than this
SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class Kind:
    """A kind of call, within which times are comparable. group: query heads per KV head; dtype: e.g.
    'bfloat16'; phase: decode, one row per sequence, or prefill, as many rows as keys; graphed: in a CUDA
    graph; masked: the call has a mask, as with a static cache."""

    phase: str
    group: Count
    head_dim: Count
    dtype: str
    graphed: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Entry:
    """One measurement. way: the implementation; batch_heads: sequences times KV heads; kept: share of the V
    rows of a KV head that are read (prefill: of the elements that are kept), 1 for dense attention."""

    kind: Kind
    way: str
    batch_heads: Count
    kv_len: Count
    kept: Share
    ms: float


@dataclass(frozen=True)
class Shape:
    """The shape of a call: N keys, of which `visible` are visible (None: all). Torch's implementations
    process all N."""

    kind: Kind
    batch_heads: int
    kv_len: int
    visible: int | None = None

    def keys_of(self, way: str) -> int:
        """The number of keys that an implementation processes."""
        return self.kv_len if self.visible is None or way in ("sdpa", "flash") else self.visible


@dataclass(frozen=True)
class Profile:
    """key: see `key_of`; tiles: the configuration of each kind of kernel, see triton/tiles.py; about: further
    facts about the measurement."""

    key: dict[str, str]
    tiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _curves(self) -> dict[tuple[Kind, str], dict[int, dict[int, list[tuple[float, float]]]]]:
        """By kind and implementation, by batch_heads and length: sorted (kept, ms), with ms made
        non-decreasing, because keeping more cannot be faster except for noise."""
        found: dict[tuple[Kind, str], dict[int, dict[int, list[tuple[float, float]]]]] = {}
        for one in sorted(self.entries, key=lambda one: (one.kept, one.ms)):
            lengths = found.setdefault((one.kind, one.way), {}).setdefault(one.batch_heads, {})
            curve = lengths.setdefault(one.kv_len, [])
            curve.append((one.kept, max(one.ms, curve[-1][1]) if curve else one.ms))
        return found

    def ms(self, way: str, shape: Shape, kept: float) -> float | None:
        """Milliseconds of an implementation, or None if it was not measured. kept: as in `Entry`.

        Taken from the nearest measured batch_heads, with linear interpolation between measured lengths and
        kept shares. Beyond the longest length the time is proportional to the length; below the shortest it
        is constant, as the launch dominates.
        """
        curves = self._curves.get((shape.kind, way))
        if not curves:
            return None
        pairs = min(curves, key=lambda pairs: (abs(log2(max(pairs, 1)) - log2(shape.batch_heads)), pairs))
        lengths, keys = curves[pairs], max(shape.keys_of(way), 1)
        known = sorted(lengths)
        times = [_between(lengths[length], kept) for length in known]
        if keys > known[-1]:
            return times[-1] * keys / known[-1]
        return _between(list(zip(map(float, known), times)), float(keys))


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear interpolation between sorted points; constant before the first and after the last."""
    right = bisect_right([at for at, _ in points], x)
    if right in (0, len(points)):
        return points[min(right, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def pick(
    profile: Profile, shape: Shape, kept: float, ways: Sequence[str], now: str | None = None
) -> str | None:
    """The fastest of `ways`, or `now` unless another one is faster by more than HYSTERESIS.

    None unless the profile has both a dense and a sparse one of them for this kind of call. With the same
    `now`, if dense is picked at one kept share, it is picked at every larger one.
    """
    times = {way: ms for way in ways if (ms := profile.ms(way, shape, kept)) is not None}
    if not times.keys() & set(DENSE_WAYS) or not times.keys() & set(SPARSE_WAYS):
        return None
    best = min(times, key=lambda way: times[way])
    if now is not None and now in times and times[best] >= (1 - HYSTERESIS) * times[now]:
        return now
    return best


@cache
def _digest() -> str:
    """The digest of the kernels' sources."""
    digest = hashlib.sha256()
    for file in sorted((SOURCES / "triton").glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def key_of(device: torch.device) -> dict[str, str]:
    """Everything that a profile's numbers depend on, by name."""
    gpu = "none"
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name}, {properties.major}.{properties.minor}, {properties.multi_processor_count}"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    runtime = torch.version.hip or torch.version.cuda or "none"
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "runtime": runtime,
        "triton": triton,
        "sources": _digest(),
    }


def path_of(key: dict[str, str]) -> Path:
    """The path of the profile with this key."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", key["gpu"].split(",")[0]).strip("-")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "profiles" / f"{name}-{digest}.json"


def load(key: dict[str, str]) -> Profile | None:
    """The profile with this key, or None. Raises UsageError if it is damaged."""
    path = path_of(key)
    if not path.is_file():
        return None
    remedy = f"remove it, or run {COMMAND} again"
    profile = read_json(path, Profile, remedy)
    if asdict(profile) != read_json(path, Any, remedy):  # a misspelt name would leave a default in its place
        raise UsageError(f"{path} is damaged (it has fields that profiles do not have): {remedy}.")
    return profile if profile.key == key else None


def save(profile: Profile) -> Path:
    """Write a profile to where `load` finds it; returns the path."""
    path = path_of(profile.key)
    write_json(path, asdict(profile))
    profile_of.cache_clear()
    return path


@cache
def profile_of(device: torch.device) -> Profile | None:
    """The profile of a device, cached until the next `save`."""
    return load(key_of(device))
