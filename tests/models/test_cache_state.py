"""What a method remembers follows the cache: crops, reorders, repeats, copies, resets."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from tests.helpers.models import tokens
from topk_llama import TopThetaCache, set_params, update_model
from toptheta.methods.base import Block, Method, RowTables
from toptheta.util.errors import UsageError

K = 6


@dataclass(frozen=True)
class DropsForGood(Method):
    """A prompt is dense. Each later row drops, for good and for all heads, the key that the rows so far gave
    the least weight, until K are left beside the row's own. Not registered: it serves these tests alone."""

    name = "drops_for_good"
    title = "drops for good"
    has_state = True

    def keep(self, block: Block, tables: RowTables) -> Tensor:
        state, end = block.state, block.x.shape[-1]
        if not state.tensors:
            batch = block.x.shape[0]
            state.tensors = {"given": block.x.new_zeros(batch, end), "dropped": block.x.new_zeros(batch, end)}
        state.grow(end)
        if block.x.shape[2] == 1:
            dropped = state.tensors["dropped"][:, :end]
            alive = block.visible[:, 0, 0] & (dropped == 0)
            own = torch.arange(end) == block.n[:, :1] - 1
            given = state.tensors["given"][:, :end].masked_fill(~alive | own, float("inf"))
            least = given.argmin(dim=-1, keepdim=True)
            too_many = (alive.sum(dim=-1, keepdim=True) > K + 1).to(dropped.dtype)
            dropped.scatter_add_(-1, least, too_many)
        return block.visible & (state.tensors["dropped"][:, :end] == 0)[:, None, None]

    def after(self, block: Block, weights: Tensor) -> None:
        block.state.tensors["given"][:, : weights.shape[-1]] += weights.sum(dim=(1, 2))


@pytest.fixture
def model(tiny_model: LlamaForCausalLM) -> LlamaForCausalLM:
    update_model(tiny_model)
    set_params(tiny_model, method=DropsForGood(), K=K)
    return tiny_model


def steps(model, cache, ids: Tensor) -> Tensor:
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])], 1)


def prefilled(model, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    return cache


def test_drops_more_and_more(model) -> None:
    cache = prefilled(model, tokens(length=20))
    steps(model, cache, tokens(length=10, seed=3))
    for layer in cache.layers:
        assert layer.method_state.tensors["dropped"].sum() == 10  # one a step
        assert layer.method_state.tensors["given"].shape == (1, 30)
    set_params(model, mode=3)
    assert steps(model, cache, tokens(length=1)).isfinite().all()  # another method, the same cache


def test_repeats_and_reorders(model) -> None:
    """Sequences that share a repeated prefix are what each is alone; they are reordered like their keys."""
    prefix, rest = tokens(length=20), torch.cat([tokens(length=5, seed=3), tokens(length=5, seed=4)])
    alone = [steps(model, prefilled(model, prefix), one[None]) for one in rest]
    for repeat in (
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 0])),
    ):
        cache = prefilled(model, prefix)
        repeat(cache)
        torch.testing.assert_close(steps(model, cache, rest), torch.cat(alone), rtol=1e-4, atol=1e-4)
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    next_one = tokens(length=1).expand(2, 1)
    torch.testing.assert_close(
        steps(model, swapped, next_one), steps(model, cache, next_one).flip(0), rtol=1e-4, atol=1e-4
    )


def test_copies_crops_and_resets(model) -> None:
    prefix, rest = tokens(length=20), tokens(length=4, seed=3)
    cache = prefilled(model, prefix)
    other = copy.deepcopy(cache)
    expected = steps(model, cache, rest)
    assert other.layers[0].method_state.tensors["dropped"].sum() == 0
    torch.testing.assert_close(steps(model, other, rest), expected)
    other.crop(-2)  # the last two keys are taken off, and with them what was known of them
    assert other.get_seq_length() == 22
    assert all(layer.method_state.tensors["given"].shape == (1, 22) for layer in other.layers)
    other.reset()
    assert all(not layer.method_state.tensors for layer in other.layers)


def test_beam_search_and_static_caches(model) -> None:
    """generate() reorders the cache at each step; a static cache gives the same as a growing one."""
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert model.generate(tokens(2), num_beams=3, **arguments).shape == (2, 46)
    grown = model.generate(tokens(2), **arguments)
    for kind in (StaticCache, TopThetaCache):
        cache = kind(config=model.config, max_cache_len=60)
        assert torch.equal(model.generate(tokens(2), past_key_values=cache, **arguments), grown)


def test_without_a_cache_a_call_stands_alone(model) -> None:
    first, second = (model(tokens(length=20), use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_a_sliding_window_is_refused(model) -> None:
    model.config.sliding_window = 8
    model.config.layer_types = ["sliding_attention"] * 3
    with pytest.raises(UsageError, match="layer 0 has a sliding-window cache"):
        model(tokens(length=20), past_key_values=DynamicCache(config=model.config))
