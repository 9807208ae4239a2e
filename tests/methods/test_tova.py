"""TOVA against its rule in slow loops, and by hand."""

import pytest
import torch
from torch import Tensor

from tests.helpers.methods import LAYOUTS, SCALE, check, inputs, softmax_over, weights
from toptheta.methods.base import parse_method
from toptheta.methods.params import LayerSpec
from toptheta.methods.tova import TOVA


def tova_loop(k: int, per_group: int):
    def loop(q: Tensor, key: Tensor, prompt: int, places: list[int]) -> Tensor:
        heads, length = q.shape[:2]
        out = torch.zeros(heads, length, length, dtype=torch.float64)
        cached: list[int] = []
        for i in range(length):
            if i >= prompt and len(cached) > k:
                last = [sum(float(out[h, i - 1, j]) for h in range(heads)) / heads for j in range(length)]
                cached = sorted(sorted(cached, key=lambda j: -last[j])[:k])
            cached = [*cached, i]
            for h in range(heads):
                out[h, i] = softmax_over(key[h // per_group] @ q[h, i] * SCALE, cached)
        return out

    return loop


def test_steps_by_hand() -> None:
    """Two heads with the same keys. A row's look at a key is a number, which the heads average."""
    q, k = torch.zeros(1, 2, 6, 8), torch.zeros(1, 1, 8, 8)
    k[0, 0, range(8), range(8)] = 5.0  # a key's own channel: SCALE * 5 = 1
    # The last row of the prompt, 4 keys: head 0 looks at 0 and 1, head 1 at 0 and 3.
    q[0, 0, 3, [0, 1]], q[0, 1, 3, [0, 3]] = torch.tensor([2.0, 3.0]), torch.tensor([2.0, 3.5])
    # The first step looks at 3 and 4 alone, so that of 0, 1 and 3 both others have less.
    q[0, :, 4, 3], q[0, :, 4, 4], q[0, :, 4, 0] = 3.0, 2.0, 1.0
    got = weights(LayerSpec(TOVA(), "pre-softmax", 3), q, k, prompt=4)[0]
    for head in range(2):
        assert got[head, 3].nonzero()[:, 0].tolist() == [0, 1, 2, 3]  # the prompt is dense
        assert got[head, 4].nonzero()[:, 0].tolist() == [0, 1, 3, 4]  # 2 has the least, in the mean
        assert got[head, 5].nonzero()[:, 0].tolist() == [0, 3, 4, 5]  # 1 has the least


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
def test_against_loops(layout: str, heads: tuple[int, int]) -> None:
    for k in (1, 8, 23, 50):
        check(TOVA(), k, tova_loop(k, heads[0] // heads[1]), layout, heads)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs()
    spec = LayerSpec(TOVA(), "pre-softmax", 8)
    for padded in (slice(0, 9), slice(21, 29)):
        whole = weights(spec, q, k, padded=padded)
        with monkeypatch.context() as patch:
            patch.setattr("toptheta.attention.reference.BLOCK_ELEMENTS", {"cpu": 1000})
            torch.testing.assert_close(weights(spec, q, k, padded=padded), whole)


def test_its_names() -> None:
    assert parse_method("tova") == TOVA() and TOVA().label(64) == "TOVA K=64"
    assert TOVA().folder(64) == "tova_k64"
