"""SnapKV against its rule in slow loops, and by hand."""

import pytest
import torch
from torch import Tensor

from tests.helpers.methods import LAYOUTS, SCALE, check, inputs, softmax_over, weights
from toptheta.methods.base import parse_method
from toptheta.methods.params import LayerSpec
from toptheta.methods.snapkv import SnapKV
from toptheta.util.errors import UsageError


def pooled(scores: list[float], size: int, pool: str) -> list[float]:
    """Of each number and its neighbours, size // 2 to both sides: the largest, or the sum over `size`."""
    out = []
    for i in range(len(scores)):
        near = scores[max(0, i - size // 2) : i + size // 2 + 1]
        out.append(max(near) if pool == "max" else sum(near) / size)
    return out


def staying(scores: list[float], window: int, k: int) -> list[int]:
    """Keys of a prompt that stay: the largest scores, one for each key before the window, and the window."""
    best = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[: k - window]
    return sorted(best) + list(range(len(scores), len(scores) + window))


def snapkv_loop(method: SnapKV, k: int, per_group: int):
    def loop(q: Tensor, key: Tensor, prompt: int, places: list[int]) -> Tensor:
        heads, length = q.shape[:2]
        out = torch.zeros(heads, length, length, dtype=torch.float64)
        for h in range(heads):
            for i in range(prompt):
                out[h, i] = softmax_over(key[h // per_group] @ q[h, i] * SCALE, list(range(i + 1)))
        window = min(method.window, k - 1)
        sums = out[:, prompt - window : prompt, : prompt - window].sum(dim=1)
        for h in range(heads):
            own = sums[h]
            if method.group:
                first = h // per_group * per_group
                own = sums[first : first + per_group].mean(dim=0)
            stay = list(range(prompt))
            if prompt > k:
                stay = staying(pooled(own.tolist(), method.pool_size, method.pool), window, k)
            for i in range(prompt, length):
                kept = [*stay, *range(prompt, i + 1)]
                out[h, i] = softmax_over(key[h // per_group] @ q[h, i] * SCALE, kept)
        return out

    return loop


def test_a_prompt_by_hand() -> None:
    scores = [0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 1.0]
    assert pooled(scores, 3, "max") == [0.0, 5.0, 5.0, 5.0, 0.0, 1.0, 1.0]
    assert pooled(scores, 3, "mean") == pytest.approx([0, 5 / 3, 5 / 3, 5 / 3, 0, 1 / 3, 1 / 3])
    assert staying(pooled(scores, 3, "max"), 2, 6) == [1, 2, 3, 5, 7, 8]


def test_steps_by_hand() -> None:
    """A prompt of 8, a window of 2: both last rows look at key 3, so it and its neighbours stay."""
    q, k = torch.zeros(1, 1, 11, 16), torch.zeros(1, 1, 16, 16)
    k[0, 0, range(16), range(16)] = 5.0
    q[0, 0, 0:6, 0] = 9.0  # earlier rows look at key 0, which does not count
    q[0, 0, 6:8, 3] = 9.0
    got = weights(LayerSpec(SnapKV(window=2, pool_size=3), "pre-softmax", 5), q, k, prompt=8)[0, 0]
    assert got[7].nonzero()[:, 0].tolist() == list(range(8))
    for i in (8, 9, 10):  # what is generated stays
        assert got[i].nonzero()[:, 0].tolist() == [2, 3, 4, 6, 7, *range(8, i + 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
def test_against_loops(layout: str, heads: tuple[int, int]) -> None:
    for method, k in (
        (SnapKV(window=4, pool_size=3), 9),
        (SnapKV(window=5, pool_size=5, pool="mean"), 12),
        (SnapKV(window=4, group=True), 10),
        (SnapKV(), 8),  # the window is cut to K - 1
        (SnapKV(window=2), 20),  # longer than the padded sequence's prompt, shorter than the other's
        (SnapKV(window=2), 35),
    ):
        check(method, k, snapkv_loop(method, k, heads[0] // heads[1]), layout, heads)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs()
    spec = LayerSpec(SnapKV(window=5), "pre-softmax", 8)
    for padded in (None, slice(0, 9), slice(21, 29)):
        whole = weights(spec, q, k, padded=padded)
        with monkeypatch.context() as patch:
            patch.setattr("toptheta.attention.reference.BLOCK_ELEMENTS", {"cpu": 1000})
            torch.testing.assert_close(weights(spec, q, k, padded=padded), whole)


def test_its_names() -> None:
    method = parse_method("snapkv:window=16,pool=mean,group")
    assert method == SnapKV(16, pool="mean", group=True)
    assert method.label(64) == "SnapKV window=16 pool=mean group K=64"
    for text, says in (
        ("window=0", "window is 0"),
        ("pool_size=4", "odd number"),
        ("pool=sum", "max or mean"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_method(f"snapkv:{text}")
