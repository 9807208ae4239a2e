"""Every way of calling the patched model agrees: chunks, caches, padding, generate, beams."""

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from tests.helpers.models import SPARSE, steer, tokens
from toptheta.models.control import record_statistics
from toptheta.models.recorder import Recorder

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("name", SPARSE)
def test_cache_chunks_and_padding_agree(name: str, tiny_model: LlamaForCausalLM) -> None:
    """One prefill, a chunked one, decoding with a dynamic or static cache, left and right padding: the same
    logits."""
    steer(tiny_model, SPARSE[name])
    ids = tokens(length=40)
    whole = tiny_model(ids).logits[0]
    close = {"rtol": 1e-4, "atol": 1e-4}

    cache = DynamicCache(config=tiny_model.config)
    parts = [
        tiny_model(chunk, past_key_values=cache).logits[0] for chunk in ids.split([17, 12, 8, 1, 1, 1], dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, **close)

    static = StaticCache(config=tiny_model.config, max_cache_len=64)
    first = tiny_model(ids[:, :30], past_key_values=static, cache_position=torch.arange(30)).logits[0]
    torch.testing.assert_close(first, whole[:30], **close)
    for at in range(30, 40):
        step = tiny_model(ids[:, at : at + 1], past_key_values=static, cache_position=torch.tensor([at]))
        torch.testing.assert_close(step.logits[0, 0], whole[at], **close)

    other = tokens(length=29, seed=9)
    other_alone = tiny_model(other).logits[0]
    pad = torch.zeros(1, 11, dtype=torch.long)
    for side in ("left", "right"):
        joined = torch.cat([pad, other] if side == "left" else [other, pad], dim=1)
        mask = torch.cat(
            [pad, torch.ones_like(other)] if side == "left" else [torch.ones_like(other), pad], dim=1
        )
        batch, batch_mask = torch.cat([ids, joined]), torch.cat([torch.ones_like(ids), mask])
        positions = (batch_mask.cumsum(dim=1) - 1).clamp_min(0)
        recorder = Recorder()
        record_statistics(tiny_model, recorder)
        logits = tiny_model(batch, attention_mask=batch_mask, position_ids=positions).logits
        record_statistics(tiny_model, None)
        torch.testing.assert_close(logits[0], whole, **close)
        real = logits[1, 11:] if side == "left" else logits[1, :29]
        torch.testing.assert_close(real, other_alone, **close)
        prefill, _ = recorder.drain()
        assert prefill[0].n.tolist() == [40, 29]
        assert prefill[0].full.tolist() == [40 * 41 // 2, 29 * 30 // 2]


@pytest.mark.parametrize("name", ["Top-k", "Top-theta"])
def test_generate(name: str, tiny_model: LlamaForCausalLM) -> None:
    """Greedy batches equal one by one; static caches and beams run through the same code."""
    steer(tiny_model, SPARSE[name])
    a, b = tokens(length=20), tokens(length=14, seed=2)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = [
        tiny_model.generate(x, attention_mask=torch.ones_like(x), **options)[0, x.shape[1] :] for x in (a, b)
    ]
    batch = torch.cat([a, torch.cat([torch.zeros(1, 6, dtype=torch.long), b], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :6] = 0
    together = tiny_model.generate(batch, attention_mask=mask, **options)[:, 20:]
    assert torch.equal(torch.stack(alone), together)
    static = tiny_model.generate(
        a, attention_mask=torch.ones_like(a), cache_implementation="static", disable_compile=True, **options
    )
    assert torch.equal(static[0, 20:], alone[0])
    beams = tiny_model.generate(a, attention_mask=torch.ones_like(a), num_beams=3, **options)
    again = tiny_model.generate(a, attention_mask=torch.ones_like(a), num_beams=3, use_cache=False, **options)
    assert torch.equal(beams, again)


@pytest.mark.parametrize("name", ["Top-k post", "Top-theta"])
def test_changes_of_the_cache_between_steps(name: str, tiny_model: LlamaForCausalLM) -> None:
    """A cache that is cut, repeated, reordered, replaced or changed in place: what was summed of it before
    (for VMC) must not be used."""
    steer(tiny_model, SPARSE[name])
    ids, close = tokens(length=40), {"rtol": 1e-4, "atol": 1e-4}

    def step(cache: DynamicCache, at: int, text: torch.Tensor) -> torch.Tensor:
        return tiny_model(text[:, at : at + 1], past_key_values=cache).logits[:, 0]

    def behind(length: int, text: torch.Tensor) -> DynamicCache:
        return tiny_model(text[:, :length], use_cache=True).past_key_values

    whole = tiny_model(ids).logits[0]
    cache = behind(36, ids)
    for at in (36, 37, 38):
        torch.testing.assert_close(step(cache, at, ids)[0], whole[at], **close)
    cache.crop(-2)
    torch.testing.assert_close(step(cache, 37, ids)[0], whole[37], **close)
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(step(cache, 38, ids.repeat(2, 1))[1], whole[38], **close)
    other = ids.flip(1)
    torch.testing.assert_close(
        step(behind(39, other), 39, other)[0], tiny_model(other).logits[0, 39], **close
    )
    both = torch.cat([ids, other])
    cache = behind(37, both)
    step(cache, 37, both)
    cache.reorder_cache(torch.tensor([1, 0]))
    reordered = step(cache, 38, both.flip(0))
    torch.testing.assert_close(reordered[1], whole[38], **close)
    for layer in cache.layers:
        layer.values.mul_(2.0)
    changed = step(cache, 39, both.flip(0))
    fresh = behind(39, both.flip(0))
    for layer in fresh.layers:
        layer.values.mul_(2.0)
    torch.testing.assert_close(changed, step(fresh, 39, both.flip(0)), **close)
