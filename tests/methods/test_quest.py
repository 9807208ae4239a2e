"""Quest against its rule in slow loops, by hand, and behind a cache."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.helpers.calls import call
from tests.helpers.methods import LAYOUTS, SCALE, check, softmax_over
from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.attention.reference import sparse_attention
from toptheta.attention.rows import rows_of
from toptheta.methods.base import parse_method
from toptheta.methods.params import LayerSpec
from toptheta.methods.quest import Quest
from toptheta.models.patch import layer_states
from toptheta.util.errors import UsageError


def page_score(query: list[float], keys: list[list[float]]) -> float:
    """What a key within the page's largest and smallest numbers could score at most."""
    total = 0.0
    for channel, x in enumerate(query):
        numbers = [key[channel] for key in keys]
        total += max(x * max(numbers), x * min(numbers))
    return total


def kept_keys(scores: list[float], page: int, pages: int, n: int) -> list[int]:
    """The keys of the pages with the largest scores."""
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:pages]
    return [j for j in range(n) if j // page in best]


def test_a_page_by_hand() -> None:
    assert page_score([1.0, -2.0], [[3.0, 5.0], [1.0, -1.0]]) == 3.0 + 2.0
    assert page_score([1.0, -2.0], [[3.0, -1.0]]) == 5.0  # one key: its score
    assert kept_keys([5.0, 1.0, 7.0, 6.0], 2, 3, 7) == [0, 1, 4, 5, 6]


def kept_by(method: Quest, k: int, keys: list[float], query: float = 1.0, decode: bool = True) -> list[int]:
    """What one head keeps whose keys have one channel."""
    key = torch.tensor(keys)[None, None, :, None]
    rows = rows_of(None, 1, len(keys), key.device)
    spec, q = LayerSpec(method, "pre-softmax", k), torch.full((1, 1, 1, 1), query)
    one = call(q, key, torch.ones_like(key), rows, spec, 1.0, count=True, decode=decode)
    return sparse_attention(one)[1].vrow[0, 0].nonzero()[:, 0].tolist()


def test_a_step_by_hand() -> None:
    """Pages of two; K = 6 is three pages of ten keys. The newest page is not kept for being new."""
    keys = [9.0, 0.0, 1.0, 1.0, 5.0, 2.0, -3.0, 8.0, 0.0, 0.0]
    assert kept_by(Quest(page=2), 6, keys) == [0, 1, 4, 5, 6, 7]
    assert kept_by(Quest(page=2), 6, keys, query=-1.0) == [0, 1, 6, 7, 8, 9]  # the smallest keys count
    assert kept_by(Quest(page=2), 2, keys) == [0, 1, 4, 5, 6, 7]  # three pages at least
    assert kept_by(Quest(page=2), 10, keys) == list(range(10))  # no more than K: dense
    assert kept_by(Quest(page=2), 6, keys, decode=False) == list(range(10))  # the end of a prompt


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads, group", [((4, 2), False), ((4, 2), True), ((3, 1), False)], ids=str)
def test_against_loops(layout: str, heads: tuple[int, int], group: bool) -> None:
    page, k, per_group = 3, 13, heads[0] // heads[1]

    def loop(q: Tensor, key: Tensor, prompt: int, places: list[int]) -> Tensor:
        out = torch.zeros(q.shape[0], q.shape[1], q.shape[1], dtype=torch.float64)
        for i in range(q.shape[1]):
            n = i + 1
            for h in range(q.shape[0]):
                own = key[h // per_group, :n]
                heads_of_it = [x for x in range(q.shape[0]) if x // per_group == h // per_group]
                kept = list(range(n))
                if i >= prompt and n > k:
                    scores = [
                        sum(
                            page_score(q[x, i].tolist(), own[j : j + page].tolist())
                            for x in (heads_of_it if group else [h])
                        )
                        for j in range(0, n, page)
                    ]
                    kept = kept_keys(scores, page, max(3, k // page), n)
                out[h, i, :n] = softmax_over(own @ q[h, i] * SCALE, kept)
        return out

    check(Quest(page=page, group=group), k, loop, layout, heads)


def test_in_a_model(tiny_model) -> None:
    """Prompts and the first layers are dense, in chunks too; steps are not."""
    ids = tokens(length=40)
    dense = tiny_model(ids).logits
    update_model(tiny_model)
    set_params(tiny_model, method="quest:page=2", K=6)
    assert [state.spec.sparse for state in layer_states(tiny_model)] == [False, False, True]
    cache = DynamicCache(config=tiny_model.config)
    parts = [tiny_model(chunk, past_key_values=cache).logits for chunk in ids[:, :30].split(15, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), dense[:, :30], rtol=1e-3, atol=1e-3)
    steps = [tiny_model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
    assert (torch.cat(steps, dim=1) - dense[:, 30:]).abs().max() > 0.01
    set_params(tiny_model, method="quest:dense_layers=0", K=6)
    assert all(state.spec.sparse for state in layer_states(tiny_model))


def test_its_names() -> None:
    method = parse_method("quest:page=8,group")
    assert method == Quest(8, True) and method.label(64) == "Quest page=8 group K=64"
    assert method.folder(64) == "quest_page8_group_k64"
    with pytest.raises(UsageError, match="page is 0: give a whole number"):
        parse_method("quest:page=0")


def test_sdc_is_not_calibrated(tiny_model) -> None:
    update_model(tiny_model)
    with pytest.raises(UsageError, match="do not show what quest drops: use sdc exact or none"):
        set_params(tiny_model, method="quest", sdc="offline-calibrated", K=6, calibrate=True)
