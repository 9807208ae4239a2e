"""H2O against its rule in slow loops, and by hand."""

import pytest
import torch
from torch import Tensor

from tests.helpers.methods import LAYOUTS, SCALE, check, inputs, softmax_over, weights
from toptheta.methods.base import parse_method
from toptheta.methods.h2o import H2O
from toptheta.methods.params import LayerSpec
from toptheta.util.errors import UsageError


def staying(cached: list[int], sums: list[float], recent: int, heavy: int) -> list[int]:
    """Of the cached keys, in order, the last `recent`; of the others the `heavy` with the largest sums."""
    last = cached[len(cached) - recent :] if recent else []
    others = [j for j in cached if j not in last]
    return sorted(sorted(others, key=lambda j: -sums[j])[:heavy] + last)


def h2o_loop(k: int, share: float, causal: bool, per_group: int):
    def loop(q: Tensor, key: Tensor, prompt: int, places: list[int]) -> Tensor:
        length = q.shape[1]
        out = torch.zeros(q.shape[0], length, length, dtype=torch.float64)
        recent = int(share * k)
        for h in range(q.shape[0]):
            cached: list[int] = []
            sums = [0.0] * length
            for i in range(length):
                if i >= prompt or causal:
                    cached = staying(cached, sums, recent, k - recent) if len(cached) > k else cached
                cached = [*cached, i]
                out[h, i] = softmax_over(key[h // per_group] @ q[h, i] * SCALE, cached)
                for j in range(length):
                    sums[j] += float(out[h, i, j])
        return out

    return loop


def test_what_stays_by_hand() -> None:
    sums = [4.0, 0.5, 3.0, 1.0, 2.0, 0.1, 0.2]
    assert staying([0, 1, 2, 3, 4, 5, 6], sums, 2, 2) == [0, 2, 5, 6]
    assert staying([0, 3, 4, 5, 6], sums, 2, 2) == [0, 4, 5, 6]


def test_steps_by_hand() -> None:
    """Each row looks at one key alone, as good as: what was never looked at is dropped, for good."""
    length, looked_at = 9, [0, 0, 2, 2, 2, 0, 1, 7, 2]
    q, k = inputs((1, 1))
    q, k = torch.zeros_like(q[:, :, :length]), torch.zeros_like(k)
    k[:, :, range(length), range(length)] = 100.0  # a key's own channel
    for i, j in enumerate(looked_at):
        q[:, :, i, j] = 0.2
    got = weights(LayerSpec(H2O(), "pre-softmax", 4), q, k, prompt=5)[0, 0]
    # After 5 rows: 2 heavy (2 with 3 looks, 0 with 2) of 0 to 2, and the last 2. A step reads its own key
    # too.
    assert got[5].nonzero()[:, 0].tolist() == [0, 2, 3, 4, 5]
    assert got[6].nonzero()[:, 0].tolist() == [0, 2, 4, 5, 6]  # it asks for key 1, which is no longer there
    assert got[7].nonzero()[:, 0].tolist() == [0, 2, 5, 6, 7]
    assert got[8].nonzero()[:, 0].tolist() == [0, 2, 6, 7, 8]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
def test_against_loops(layout: str, heads: tuple[int, int]) -> None:
    for k, share, causal in (
        (8, 0.5, False),
        (9, 0.5, True),
        (7, 0.25, False),
        (5, 1.0, True),
        (5, 0, False),
    ):
        method = H2O(share, "causal" if causal else "dense")
        check(method, k, h2o_loop(k, share, causal, heads[0] // heads[1]), layout, heads)
    check(H2O(), 50, h2o_loop(50, 0.5, False, heads[0] // heads[1]), layout, heads)  # nothing to drop


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs()
    spec = LayerSpec(H2O(), "pre-softmax", 8)
    whole = weights(spec, q, k, padded=slice(0, 9))
    monkeypatch.setattr("toptheta.attention.reference.BLOCK_ELEMENTS", {"cpu": 1000})
    torch.testing.assert_close(weights(spec, q, k, padded=slice(0, 9)), whole)


def test_its_names() -> None:
    method = parse_method("h2o:recent=0.25,prefill=causal")
    assert method == H2O(0.25, "causal") and method.label(64) == "H2O recent=0.25 prefill=causal K=64"
    for text, says in (
        ("recent=2", "recent is 2.0: give a share of K"),
        ("prefill=no", "dense or causal"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_method(f"h2o:{text}")
