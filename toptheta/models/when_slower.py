"""`when_slower="dense"`: layers whose thresholds would be slower than dense attention are computed dense.

Which is slower a profile of the GPU says (kernels/profile.py), for the shapes of a call and the share of V
rows that is expected to be kept. That share is K, until it was counted: the first decode step of a request
counts what it keeps, and so does a step behind twice as many keys; the counts come back while the device goes
on. So nothing waits, and the step from which on a layer is dense depends on when they arrive.
"""

from collections.abc import Callable
from functools import cache
from math import log2

import torch
from torch import Tensor

from toptheta.attention.call import AttentionCall, Counts
from toptheta.kernels import registry
from toptheta.kernels.dense import DENSE_WAYS, dense_ways
from toptheta.kernels.int8_keys import serves
from toptheta.kernels.profile import (
    COMMAND,
    SCORES,
    TWO_TIER,
    WEIGHTS,
    Kind,
    Profile,
    Shape,
    pick,
    profile_of,
)
from toptheta.methods.base import Selection
from toptheta.methods.params import LayerSpec
from toptheta.util.console import say

STEPS_PER_DOUBLING = 16  # choose again when the number of keys has changed by 4 %


class Arriving:
    """A few numbers being copied from the device. ready: whether they have arrived."""

    def __init__(self, numbers: Tensor):
        self.ready: Callable[[], bool] = lambda: True
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.ready = event.query

    def values(self) -> list[float]:
        return self._numbers.tolist()


class Expectation:
    """What a layer expects its decode steps to keep. k: its K; group: query heads of a KV head.

    elements: keys that a row keeps; rows: V rows that the heads of a group keep together. Until they are
    counted, each head is assumed to keep K keys, all different.
    """

    def __init__(self, k: int, group: int):
        self.elements, self.rows = float(k), float(k * group)
        self._coming: Arriving | None = None
        self._counted_at = 0  # keys of the last step that was counted; 0: none of this request
        self._last = (0.0, 0)  # visible keys of that step, and steps since

    def new_request(self) -> None:
        """A new prompt: count the next step."""
        self._counted_at, self._last = 0, (0.0, 0)

    def step(self, kv_len: int) -> bool:
        """Start a decode step over `kv_len` keys; returns whether to count what it keeps."""
        self._take()
        self._last = (self._last[0], self._last[1] + 1)
        keys = self.visible(kv_len)
        return self._coming is None and (self._counted_at == 0 or keys >= 2 * self._counted_at)

    def counted(self, counts: Counts, n: Tensor) -> None:
        """Take the counts of a decode step, without waiting for them. n: as in `Rows`."""
        rows = (counts.vrow > 0).sum(dim=-1).float().mean()
        self._coming = Arriving(torch.stack([counts.attn.float().mean(), rows, n.float().mean()]))
        self._counted_at, self._last = max(1, counts.vrow.shape[-1]), (0.0, 0)

    def _take(self) -> None:
        if self._coming is not None and self._coming.ready():
            self.elements, self.rows, n = self._coming.values()
            self._coming, self._counted_at = None, max(1, round(n))
            self._last = (n, self._last[1])

    def visible(self, kv_len: int) -> int:
        """The number of visible keys of a cache, as far as known: all, or those of the last counted step plus
        one for each step since."""
        n, steps = self._last
        return min(kv_len, round(n) + steps) if n else kv_len


class Chooser:
    """Chooses how a layer's calls are computed, and remembers what it chose."""

    def __init__(self) -> None:
        self._expected: Expectation | None = None
        self._spec: LayerSpec | None = None
        self._chosen: dict[tuple[Kind, int], tuple[tuple[int, ...], str | None]] = {}
        self.count = False  # whether this call's counts are wanted
        self.last: str | None = None  # what was chosen last

    def way(self, call: AttentionCall) -> str | None:
        """One of the ways of kernels/profile.py and kernels/dense.py, or None: as the call says. Afterwards
        `count` says whether what the call keeps is to be counted for `counted`."""
        self.count = False
        (batch, num_heads, q_len, head_dim), (num_kv_heads, kv_len) = call.q.shape, call.k.shape[1:3]
        if q_len > 1 and self._expected is not None:
            self._expected.new_request()
        asked = sparse_way(call)
        if asked is None or q_len not in (1, kv_len):
            return None
        profile = _profile(call.q.device)
        if profile is None or not by_kernels(call):
            return None
        group = num_heads // num_kv_heads
        if self._expected is None or self._spec != call.spec:
            self._expected, self._spec, self._chosen = Expectation(call.spec.k, group), call.spec, {}
        capturing = call.q.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        masked, dtype = call.rows.mask is not None, str(call.q.dtype).removeprefix("torch.")
        phase = "decode" if q_len == 1 else "prefill"
        kind = Kind(phase, group, head_dim, dtype, capturing, masked)
        expected, visible = self._expected, None
        if phase == "prefill":
            kept = expected.elements / ((kv_len + 1) / 2)
        else:
            if not capturing and expected.step(kv_len):
                self.count = True
                return asked
            visible = expected.visible(kv_len) if masked else None
            kept = expected.rows / (visible or kv_len)
        shape = Shape(kind, batch * num_kv_heads, kv_len, visible)
        return self._pick(profile, shape, min(1.0, kept), asked)

    def _pick(self, profile: Profile, shape: Shape, kept: float, asked: str) -> str | None:
        """Cached `pick`, which takes a tenth of a millisecond: repeated only if the call or the expectation
        has changed."""
        keys = shape.kv_len if shape.visible is None else shape.visible
        sizes = (max(shape.kv_len, 1), max(keys, 1), max(kept, 1e-4))
        known = tuple(round(STEPS_PER_DOUBLING * log2(size)) for size in sizes)
        place = (shape.kind, shape.batch_heads)
        before, now = self._chosen.get(place, ((), None))
        if before != known:
            now = pick(profile, shape, kept, ways_of(asked, shape.kind.masked), now)
            self._chosen[place] = known, now
        self.last = now
        return now

    def counted(self, counts: Counts, n: Tensor) -> None:
        """Take the counts of a call after which `count` is set. n: as in `Rows`."""
        assert self._expected is not None
        self._expected.counted(counts, n)

    @torch.compiler.assume_constant_result
    def traced(
        self,
        device: torch.device,
        dtype: torch.dtype,
        shape: tuple[int, int, int, int, int],
        masked: bool,
        asked: str,
        k: int,
    ) -> str | None:
        """The choice for a decode step that is being traced, which the compiled model keeps: by earlier
        counts, else by K. shape: (B, H, H_kv, N, D)."""
        profile = _profile(device)
        if profile is None:
            return None
        batch, num_heads, num_kv_heads, kv_len, head_dim = shape
        group = num_heads // num_kv_heads
        kind = Kind("decode", group, head_dim, str(dtype).removeprefix("torch."), True, masked)
        expected = self._expected or Expectation(k, group)
        kept = min(1.0, expected.rows / kv_len)
        self.last = pick(profile, Shape(kind, batch * num_kv_heads, kv_len), kept, ways_of(asked, masked))
        return self.last


def ways_of(asked: str, masked: bool) -> list[str]:
    """The implementations to choose from: one and two tiers keep the same keys."""
    return [asked, *([SCORES] if asked == TWO_TIER else []), *dense_ways(masked)]


def sparse_way(call: AttentionCall) -> str | None:
    """The implementation of a call's selection; None if profiles do not cover it: they cover thresholds."""
    spec = call.kernel
    if spec is None or not spec.sparse or spec.selection != Selection.THRESHOLD or call.reference_only:
        return None
    if call.key_bits:
        return None
    if spec.placement == "post-softmax":
        return WEIGHTS
    return TWO_TIER if call.int8 is not None and call.q.shape[2] == 1 and serves(spec) else SCORES


def by_kernels(call: AttentionCall) -> bool:
    """Whether the call is computed by the kernels that profiles measure."""
    backend = registry.choose(call)
    return backend is not None and backend.name == "triton"


def is_dense(way: str | None) -> bool:
    return way in DENSE_WAYS


def _profile(device: torch.device) -> Profile | None:
    """The device's profile; prints a message once if there is none."""
    profile = profile_of(device)
    if profile is None:
        _say_once(device)
    return profile


@cache
def _say_once(device: torch.device) -> None:
    if device.type == "cuda":
        say(
            f"when_slower=dense has no effect, because there is no profile of this GPU: {COMMAND} measures "
            "one in less than five minutes."
        )
    else:
        say(f"when_slower=dense has no effect on {device.type}: it needs a GPU and its profile.")
