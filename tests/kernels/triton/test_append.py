"""The cache update of a decode step by kernels, against the plain path; and how many operators it calls."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.models import tiny_config
from tests.kernels.triton.helpers import DEVICE, here
from topk_llama import TopThetaCache
from toptheta.attention.rows import Rows
from toptheta.kernels.int8_keys import quantized
from toptheta.kernels.triton import cache_updates
from toptheta.models.cache import TopThetaLayer

ROOM = 20
VIEWS = ("aten::detach", "aten::view", "aten::empty")  # launch nothing


class Counted(TorchDispatchMode):
    """The operators that are called, without those that launch nothing."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if not name.startswith(VIEWS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def steps(monkeypatch, by_kernel: bool, dtype: torch.dtype, two_tier: bool, see: Callable) -> TopThetaLayer:
    """A layer after a prompt of 9 keys and 4 steps; `see` wraps each step and gets what it returned."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> torch.Tensor:  # as models hand them over: views of [B, M, H, D]
        x = torch.randn(2, length, 3, 24, generator=generator) * torch.rand(
            2, length, 3, 1, generator=generator
        )
        return x.to(DEVICE, dtype).transpose(1, 2)

    if not by_kernel:
        monkeypatch.setattr(cache_updates, "appends", lambda k, v: False)
    layer = TopThetaCache(tiny_config(), ROOM, two_tier=two_tier).layers[0]
    layer.summing = True
    visible = torch.zeros(2, 1, 1, ROOM, dtype=torch.bool, device=DEVICE)
    for start, length in ((0, 9), (9, 1), (10, 1), (11, 1), (12, 1)):
        k, v = draw(length), draw(length)
        if start == 11:
            k[0] = layer.int8.mean[0, :, None] if two_tier else 0.0  # nothing but the mean
        visible[:, :, :, start : start + length] = True
        visible[1, ..., 10] = False  # a row of padding
        mask = visible.expand(-1, -1, length, -1).clone()
        rows = Rows(n=mask.sum(dim=-1)[:, 0], mask=mask, causal=True)
        with see(length):
            layer.update(k, v)
            total = layer.at(layer.values, rows)
        if length == 1:
            seen = layer.values.double() * mask[:, :, 0, :, None]
            torch.testing.assert_close(total.double(), seen.sum(dim=2), rtol=1e-6, atol=1e-6)
    monkeypatch.undo()
    return layer


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("two_tier", [False, True])
def test_stores_the_same(two_tier, dtype, monkeypatch):
    counters: dict[bool, list[Counted]] = {False: [], True: []}

    def counting(by_kernel: bool) -> Callable:
        def see(length: int) -> Counted:
            mode = Counted()
            if length == 1:
                counters[by_kernel].append(mode)
            return mode

        return see

    plain, ours = (steps(monkeypatch, way, dtype, two_tier, counting(way)) for way in (False, True))
    assert [mode.names for mode in counters[True]] == [["toptheta::append", "toptheta::add_value"]] * 4
    assert all(len(mode.names) > (30 if two_tier else 10) for mode in counters[False])
    names = ["keys", "values", "_sum", "cumulative_length"]
    for name in names:
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    assert int(ours._finished) == 0 and int(ours.cumulative_length) == 13
    if two_tier:
        for name in ("codes", "steps", "mean"):
            assert torch.equal(getattr(ours.int8, name), getattr(plain.int8, name)), name
        torch.testing.assert_close(ours.int8.slacks, plain.int8.slacks, rtol=1e-5, atol=1e-9)


@here
def test_operators_have_true_fakes():
    row, whole = torch.randn(2, 3, 1, 24, device=DEVICE), torch.zeros(2, 3, ROOM, 24, device=DEVICE)
    end, finished = (torch.zeros((), dtype=torch.int64), torch.zeros(1, dtype=torch.int32))
    end, finished = end.to(DEVICE), finished.to(DEVICE)
    int8 = quantized(whole)
    checks = ("test_schema", "test_faketensor")
    for tiers in ((None,) * 4, (int8.codes, int8.steps, int8.slacks, int8.mean)):
        arguments = (row, row, whole, whole.clone(), end, finished, *tiers)
        torch.library.opcheck(cache_updates.append, arguments, test_utils=checks)
    total = torch.zeros(2, 3, 24, dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(cache_updates.add_value, (whole, end + 1, None, total), test_utils=checks)


def test_a_kernel_that_does_not_build(monkeypatch):
    """One warning, and the plain path from then on."""

    def fail(*arguments):
        raise ValueError("no such instruction")

    monkeypatch.setattr(cache_updates, "append", fail)
    monkeypatch.setattr(cache_updates, "_append_tried", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a chip")
    with pytest.warns(UserWarning, match="on a chip, as its own does not build there: no such instruction"):
        assert not cache_updates._append_works(torch.device("cpu"), torch.float16, 32)
    assert not cache_updates._append_works(torch.device("cpu"), torch.float16, 32)


@here
def test_a_full_cache_is_not_written_beyond(monkeypatch):
    """The kernel cannot say so, but in debug builds; it overwrites neither the next head nor other memory."""
    k = torch.ones(1, 2, 4, 16, device=DEVICE)
    layer = TopThetaLayer(4)
    layer.update(k, k)
    layer.update(0 * k[:, :, :1], 0 * k[:, :, :1])
    assert torch.equal(layer.keys, k) and torch.equal(layer.values, k)
    total = torch.zeros(1, 2, 16, dtype=torch.float64, device=DEVICE)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool, device=DEVICE)
    for seen in (None, mask):  # there is no such row to add
        assert not cache_updates.add_value(layer.values, layer.cumulative_length, seen, total).any()


@here
def test_a_copy_that_begins_empty():
    """As for export: around 0, where there are no keys to take the mean of."""
    cache = TopThetaCache(tiny_config(), ROOM, two_tier=True)
    cache.early_initialization(1, 2, 16, torch.float32, DEVICE)
    for layer in cache.layers:
        assert not layer.int8.mean.any() and layer.int8.slacks.isfinite().all()
