"""TopThetaCache: the sum of V that it carries is that of the visible rows, whatever is done to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import StaticSlidingWindowLayer

from tests.helpers.families import make
from tests.helpers.models import SPARSE, steer, tokens
from topk_llama import TopThetaCache, set_params, update_model
from toptheta.attention.call import AttentionCall
from toptheta.kernels import registry as kernels
from toptheta.models.cache import TopThetaLayer
from toptheta.util.errors import UsageError

pytestmark = pytest.mark.usefixtures("path")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LENGTH = 32


@pytest.fixture
def sums(monkeypatch) -> list[bool]:
    """Checks the sum that every attention call is handed; says of each single row whether there was one."""
    known: list[bool] = []
    real = kernels.attend

    def checked(call: AttentionCall):
        if call.q.shape[2] == 1:
            known.append(call.v_sum is not None)
        if call.v_sum is not None:
            mask = call.rows.mask
            seen = call.v if mask is None else call.v * mask[:, :, 0, :, None]
            torch.testing.assert_close(call.v_sum, seen.sum(dim=2), rtol=1e-5, atol=1e-5)
        return real(call)

    monkeypatch.setattr(kernels, "attend", checked)
    return known


def read(model: LlamaForCausalLM, cache, ids: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    """Logits of `ids`, given to the model in parts of these sizes."""
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    parts, start = [], 0
    for size in sizes:
        end = start + size
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        parts.append(model(ids[:, start:end], past_key_values=cache, **given).logits)
        start = end
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_equals_a_dynamic_cache(padding: str, tiny_model: LlamaForCausalLM, sums: list[bool]) -> None:
    """In chunks and single steps; the sum is carried from the first row to the last."""
    steer(tiny_model, SPARSE["Top-theta"])
    ids = tokens(batch=2, length=24)
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, 9) if padding == "left" else slice(11, 18)] = 0
    sizes = [12, 6, 1, 1, 3, 1]
    expected = read(tiny_model, DynamicCache(config=tiny_model.config), ids, mask, sizes)
    sums.clear()
    cache = TopThetaCache(tiny_model.config, LENGTH)
    real = mask.bool()
    torch.testing.assert_close(read(tiny_model, cache, ids, mask, sizes)[real], expected[real], **CLOSE)
    assert sums == [True] * 3 * 3 and all(layer._known for layer in cache.layers)
    cache.reset()
    again = read(tiny_model, cache, ids[:, 3:], mask[:, 3:], [20, 1])
    fresh = read(tiny_model, DynamicCache(config=tiny_model.config), ids[:, 3:], mask[:, 3:], [20, 1])
    torch.testing.assert_close(again[mask[:, 3:].bool()], fresh[mask[:, 3:].bool()], **CLOSE)


def vmc_off(model: LlamaForCausalLM) -> None:
    set_params(model, vmc=False)


def dense(model: LlamaForCausalLM) -> None:
    set_params(model, mode=3, sdc="none", vmc=False)


def untouched(model: LlamaForCausalLM) -> None:
    pass


@pytest.mark.parametrize("change", [vmc_off, dense, untouched], ids=lambda change: change.__name__)
def test_steps_that_ask_for_no_sum(change: Callable, tiny_model: LlamaForCausalLM, sums: list[bool]) -> None:
    """Rows that were written meanwhile are not forgotten: the sum is made anew, once."""
    steer(tiny_model, SPARSE["Top-theta"])
    ids = tokens(length=20)
    cache, other = TopThetaCache(tiny_model.config, LENGTH), DynamicCache(config=tiny_model.config)
    for used in (cache, other):
        set_params(tiny_model, **SPARSE["Top-theta"])
        tiny_model(ids[:, :12], past_key_values=used)
        change(tiny_model)
        tiny_model(ids[:, 12:15], past_key_values=used)
        tiny_model(ids[:, 15:16], past_key_values=used)
        set_params(tiny_model, **SPARSE["Top-theta"])
    sums.clear()
    for at in range(16, 20):
        got, expected = (
            tiny_model(ids[:, at : at + 1], past_key_values=used).logits for used in (cache, other)
        )
        torch.testing.assert_close(got, expected, **CLOSE)
    assert sums == [True] * len(sums) and all(layer._known for layer in cache.layers)


def test_other_masks_are_told(tiny_model: LlamaForCausalLM, sums: list[bool]) -> None:
    """A mask that hides keys from one row only: no sum is carried over it."""
    steer(tiny_model, SPARSE["Top-theta"])
    ids = tokens(length=16)
    masks = torch.ones(16, LENGTH, dtype=torch.bool).tril()
    masks[13, 2:7] = False
    cache = TopThetaCache(tiny_model.config, LENGTH)
    tiny_model(ids[:, :12], past_key_values=cache)
    got = [
        tiny_model(
            ids[:, at : at + 1], past_key_values=cache, attention_mask=masks[None, None, at : at + 1]
        ).logits
        for at in range(12, 15)
    ]
    other = DynamicCache(config=tiny_model.config)
    tiny_model(ids[:, :12], past_key_values=other)
    for at, logits in zip(range(12, 15), got):
        mask = masks[None, None, at : at + 1, : at + 1]
        expected = tiny_model(ids[:, at : at + 1], past_key_values=other, attention_mask=mask).logits
        torch.testing.assert_close(logits, expected, **CLOSE)
    assert not any(layer._known for layer in cache.layers)


@pytest.mark.parametrize("beams", [1, 3])
def test_generates(beams: int, tiny_model: LlamaForCausalLM, sums: list[bool]) -> None:
    steer(tiny_model, SPARSE["Top-theta"])
    ids = tokens(batch=2, length=18)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    options |= {"attention_mask": mask, "eos_token_id": None}
    expected = tiny_model.generate(ids, **options)
    cache = TopThetaCache(tiny_model.config, LENGTH)
    got = tiny_model.generate(ids, past_key_values=cache, disable_compile=True, **options)
    assert torch.equal(got, expected)


def test_prompt_lookup(
    tiny_model: LlamaForCausalLM, sums: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guessed tokens that turn out wrong are taken off the cache; the sum is found again at single rows."""
    steer(tiny_model, SPARSE["Top-theta"])
    ids = tokens(length=20).repeat(1, 2)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = tiny_model.generate(ids, **options)
    removed, crop = [], TopThetaLayer.crop
    monkeypatch.setattr(
        TopThetaLayer, "crop", lambda layer, tokens: removed.append(tokens) or crop(layer, tokens)
    )
    sums.clear()
    cache = TopThetaCache(tiny_model.config, 80)
    got = tiny_model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(got, expected) and min(removed) < 0 and all(sums)


def test_crops_by_a_negative_number_only(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    cache = TopThetaCache(tiny_model.config, 30)
    tiny_model(tokens(length=20), past_key_values=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 16
    with pytest.raises(ValueError, match="negative"):
        cache.crop(10)


@pytest.mark.parametrize("crop", [-100, -32, -20])
def test_a_crop_of_more_than_there_is(crop: int, tiny_model: LlamaForCausalLM, sums: list[bool]) -> None:
    """Empties the cache, as it does a DynamicCache."""
    steer(tiny_model, SPARSE["Top-theta"])
    found = []
    for cache in (TopThetaCache(tiny_model.config, 30), DynamicCache(config=tiny_model.config)):
        tiny_model(tokens(length=20), past_key_values=cache)
        cache.crop(crop)
        assert cache.get_seq_length() == 0
        tiny_model(tokens(length=18, seed=2), past_key_values=cache)
        found.append(tiny_model(tokens(length=1, seed=3), past_key_values=cache).logits)
    torch.testing.assert_close(found[0], found[1], **CLOSE)


@pytest.mark.parametrize("length", [-1, 0, "64", 3.5, None])
def test_wrong_arguments(length: Any, tiny_model: LlamaForCausalLM) -> None:
    with pytest.raises(
        UsageError, match=f"max_cache_len is {length!r}, but must be a whole number of tokens"
    ):
        TopThetaCache(tiny_model.config, length)
    with pytest.raises(UsageError, match=r"config is of type LlamaForCausalLM: give the model's config"):
        TopThetaCache(tiny_model, 64)  # type: ignore[arg-type]


def test_two_tiers_need_a_gpu(tiny_model: LlamaForCausalLM) -> None:
    cache = TopThetaCache(tiny_model.config, LENGTH, two_tier=True)
    for _ in range(2):  # the second call is refused, too
        with pytest.raises(UsageError, match="two_tier=True needs a GPU and Triton"):
            tiny_model(tokens(), past_key_values=cache)


def test_windows_stay_stock(sums: list[bool]) -> None:
    """Layers with a sliding window keep no sum; the others do, as behind a dynamic cache."""
    model = make("gemma3")
    steer(model, SPARSE["Top-theta"])
    ids, mask, sizes = tokens(length=24), torch.ones(1, 24, dtype=torch.long), [12, 6, 1, 1, 3, 1]
    expected = read(model, DynamicCache(config=model.config), ids, mask, sizes)
    sums.clear()
    cache = TopThetaCache(model.config, LENGTH)
    assert [type(layer) for layer in cache.layers] == [StaticSlidingWindowLayer, TopThetaLayer]
    torch.testing.assert_close(read(model, cache, ids, mask, sizes), expected, **CLOSE)
    assert sums == [False, True] * 3
