"""The cache that grows in place holds what transformers' DynamicCache holds, without copying it."""

import copy

import pytest
import torch
from transformers import DynamicCache

from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.models.cache_state import branch
from toptheta.models.generation import generate
from toptheta.models.growing_cache import LEAST_ROOM, growing_cache


def states(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, length, 8), torch.randn(batch, 2, length, 4)  # V may be narrower


def test_every_change_is_that_of_a_dynamic_cache(tiny_model):
    torch.manual_seed(0)
    ours, stock = growing_cache(tiny_model.config), DynamicCache(config=tiny_model.config)
    changes = [
        lambda cache: cache.crop(-3),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 2, 5])),
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        lambda cache: cache.reset(),
    ]
    batch = 3
    for change in [*changes, None]:
        for length in (7, 1, 1, LEAST_ROOM, 1):
            for layer in range(len(stock.layers)):
                new = states(batch, length)
                for a, b in zip(ours.update(*new, layer), stock.update(*new, layer)):
                    assert torch.equal(a, b)
        if change is not None:
            change(ours)
            change(stock)
            assert ours.get_seq_length() == stock.get_seq_length()
            batch = batch if ours.layers[0].keys is None else len(ours.layers[0].keys)


def test_a_step_copies_nothing(tiny_model):
    torch.manual_seed(0)
    cache = growing_cache(tiny_model.config)
    places = {cache.update(*states(2, length), 0)[0].data_ptr() for length in [500] + [1] * (LEAST_ROOM - 10)}
    assert len(places) == 1
    assert cache.update(*states(2, 20), 0)[0].data_ptr() not in places  # the room is full


def test_branches_and_copies_leave_each_other_alone(tiny_model):
    torch.manual_seed(0)
    prefix = growing_cache(tiny_model.config)
    first = states(1, 9)
    prefix.update(*first, 0)
    caches = [branch(prefix, 1), branch(prefix, 3), branch(prefix, 1), copy.deepcopy(prefix)]
    news = [states(len(cache.layers[0].keys), 2) for cache in caches]
    found = [cache.update(*new, 0) for cache, new in zip(caches, news)]
    for (keys, values), (new_keys, new_values) in zip(found, news):
        assert torch.equal(keys, torch.cat([first[0].expand(len(new_keys), -1, -1, -1), new_keys], dim=2))
        assert torch.equal(values[:, :, 9:], new_values)
    assert torch.equal(prefix.layers[0].keys, first[0])


@torch.enable_grad()
def test_gradients_pass(tiny_model):
    ids = tokens(length=6)
    losses = []
    for cache in (growing_cache(tiny_model.config), DynamicCache(config=tiny_model.config)):
        tiny_model.zero_grad()
        for part in ids.split([4, 2], dim=1):
            out = tiny_model(part, past_key_values=cache)
        out.logits.sum().backward()
        losses.append(tiny_model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("mode", [0, 1, 3])
@pytest.mark.parametrize("chunk", [None, 4])
def test_the_same_texts(tiny_model, mode: int, chunk: int | None):
    """In a batch with padding, with what is remembered from step to step (the sum of V)."""
    model = update_model(tiny_model)
    set_params(model, mode=0, K=4, calibrate=True, placement="pre-softmax", sdc="exact", vmc=True)
    for seed in range(4):
        model(tokens(length=40, seed=seed))
    set_params(model, mode=mode, calibrate=False)
    ids = tokens(batch=2, length=12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    ours = generate(model, batch, chunk, max_new_tokens=20, do_sample=False)
    stock = model.generate(**batch, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours, stock[:, 12:])
