"""Statistics of chunks, repeated prompts and decode count every row once."""

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.kernels import registry as kernels
from toptheta.models.control import reading_prompt, record_statistics
from toptheta.models.recorder import Recorder


@pytest.mark.usefixtures("path")
def test_chunks_answers_and_decode_count_every_row_once(tiny_model: LlamaForCausalLM) -> None:
    """One prefill, one in chunks with padding (a chunk of a single row too), and decode see the same rows."""
    update_model(tiny_model)
    set_params(tiny_model, mode=0, K=6, calibrate=True, calib_sample_frac=1.0)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    tiny_model(ids)
    set_params(tiny_model, calibrate=False)
    recorder = Recorder(effective_k=True)
    record_statistics(tiny_model, recorder)
    tiny_model(ids)
    whole = {layer: record.histogram for layer, record in recorder.drain()[0].items()}
    assert [int(h[:, :-1].sum()) for h in whole.values()] == [2 * 6 * 34] * 3

    cache = DynamicCache(config=tiny_model.config)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[2] = 0
    mask[2, -1] = 1  # a sequence of one token: no row of it is longer than K
    padded = torch.cat([ids, ids[:1]])
    at = 0
    for chunk in padded.split([20, 19, 1], dim=1):
        at += chunk.shape[1]
        with reading_prompt(tiny_model):
            tiny_model(chunk, past_key_values=cache, attention_mask=mask[:, :at])
    parts = recorder.drain()[0]
    assert all((parts[layer].histogram == whole[layer]).all() for layer in whole)

    cache = DynamicCache(config=tiny_model.config)
    tiny_model(ids[:, :6], past_key_values=cache)
    for at in range(6, 40):
        tiny_model(ids[:, at : at + 1], past_key_values=cache)
    prefill, decode = recorder.drain()
    assert not prefill[0].histogram.any()
    assert sum(int(step.attn.sum()) for step in decode[2]) == whole[2][:, -1].sum()

    asked = []
    attend = kernels.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "attend", lambda call: asked.append(call.count_rows) or attend(call))
        record_statistics(tiny_model, Recorder())
        tiny_model(ids)
        record_statistics(tiny_model, None)
        tiny_model(ids)
    assert asked == [False] * 6


@pytest.mark.usefixtures("path")
def test_statistics_of_chunks_and_repeats(tiny_model: LlamaForCausalLM) -> None:
    """A prefill in chunks, and answers behind a repeated prompt, count like the whole."""
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K=6)
    recorder = Recorder()
    record_statistics(tiny_model, recorder)
    ids = tokens(length=30)
    tiny_model(ids)
    whole, _ = recorder.drain()
    cache = DynamicCache(config=tiny_model.config)
    tiny_model(ids[:, :20], past_key_values=cache)
    index = torch.tensor([0, 0])
    cache.batch_select_indices(index)
    recorder.repeat(index)
    tiny_model(ids[:, 20:].repeat(2, 1), past_key_values=cache)
    parts, _ = recorder.drain()
    for layer in range(3):
        for name in ("attn", "vrow", "full", "topk", "n"):
            one, two = getattr(whole[layer], name), getattr(parts[layer], name)
            assert (two == one).all() and len(two) == 2, name
