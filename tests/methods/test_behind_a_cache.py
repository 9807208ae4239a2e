"""Methods that drop keys for good, in a model: the state follows the cache, whatever the batch or the
chunks."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.attention.call import AttentionCall
from toptheta.kernels import registry
from toptheta.kernels.cpu import library
from toptheta.models import generation as chunked
from toptheta.models.control import get_params, reading_prompt, record_statistics
from toptheta.models.recorder import Recorder
from toptheta.util.errors import UsageError

METHODS = ["h2o", "h2o:prefill=causal", "tova", "snapkv:window=3,pool_size=3"]
K, NEW = 6, {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}


@pytest.fixture(params=METHODS)
def model(request, tiny_model) -> LlamaForCausalLM:
    update_model(tiny_model)
    set_params(tiny_model, method=request.param, K=K)
    return tiny_model


def left_padded(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    ids = tokens(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for i, length in enumerate(lengths):
        ids[i, : max(lengths) - length] = mask[i, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("counted", [False, True])
def test_chunks_and_batches(model: LlamaForCausalLM, counted: bool) -> None:
    """A prompt in chunks, the last one of a single row (25 = 24 + 1), is a prompt, whether statistics are
    collected or not; a sequence of a padded batch is what it is alone."""
    lengths = (25, 14, 20)
    batch, found = left_padded(lengths), []
    for chunk in (None, 24, 7):
        recorder = Recorder() if counted else None
        record_statistics(model, recorder)
        found.append((chunked.generate(model, batch, chunk, **NEW), recorder and recorder.drain()))
    for out, counts in found[1:]:
        assert torch.equal(out, found[0][0])
        if counted:
            for phase in (0, 1):
                one, two = found[0][1][phase][2], counts[phase][2]
                for a, b in zip(*((x if phase else [x]) for x in (one, two))):
                    np.testing.assert_array_equal(a.attn, b.attn)
                    np.testing.assert_array_equal(a.vrow, b.vrow)
    record_statistics(model, None)
    for i, length in enumerate(lengths):
        alone = {name: x[i : i + 1, -length:] for name, x in batch.items()}
        assert torch.equal(chunked.generate(model, alone, None, **NEW)[0], found[0][0][i])


def test_what_a_step_reads(model: LlamaForCausalLM) -> None:
    """K keys and its own; SnapKV also what was generated before."""
    recorder = Recorder()
    record_statistics(model, recorder)
    chunked.generate(model, left_padded((25,)), None, **NEW)
    generated = np.arange(5) if "snapkv" in model.model.layers[0].self_attn.toptheta.spec.method.name else 0
    for steps in recorder.drain()[1].values():
        assert (np.stack([step.attn for step in steps])[:, 0] == np.add(K + 1, generated)[..., None]).all()


def steps(model, cache, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])], 1)


def test_repeats_and_static_caches(model: LlamaForCausalLM) -> None:
    prefix, rest = tokens(length=20), torch.cat([tokens(length=5, seed=3), tokens(length=5, seed=4)])
    alone = []
    for one in rest:
        cache = DynamicCache(config=model.config)
        model(prefix, past_key_values=cache)
        alone.append(steps(model, cache, one[None]))
    cache = DynamicCache(config=model.config)
    model(prefix, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(steps(model, cache, rest), torch.cat(alone), rtol=1e-4, atol=1e-4)
    fixed = StaticCache(config=model.config, max_cache_len=40)
    with reading_prompt(model):  # in chunks, the last of one row
        for chunk in prefix.split([12, 7, 1], dim=1):
            model(chunk, past_key_values=fixed)
    torch.testing.assert_close(steps(model, fixed, rest[:1]), alone[0], rtol=1e-4, atol=1e-4)
    assert model.generate(tokens(2), num_beams=3, **NEW | {"eos_token_id": 2}).shape[0] == 2


def test_another_method_behind_a_cache(model: LlamaForCausalLM) -> None:
    """One that ranks keys by the rows of the prompt is refused; the others start anew."""
    cache, ids, own = DynamicCache(config=model.config), tokens(length=4, seed=5), get_params(model).method
    model(tokens(length=20), past_key_values=cache)
    for other in {"tova", "h2o:recent=0.25", "snapkv:window=2"} - {own.spec}:
        set_params(model, method=other)
        with pytest.raises(UsageError, match="has not seen the prompt in this cache"):
            steps(model, cache, ids)
        fresh = DynamicCache(config=model.config)
        model(tokens(length=20), past_key_values=fresh)
        assert steps(model, fresh, ids).isfinite().all()
    set_params(model, method=own.spec)
    assert steps(model, cache, ids).isfinite().all()
    for other in ("top_k", "streaming_llm", "quest:page=4"):
        set_params(model, method=other)
        assert steps(model, cache, ids).isfinite().all()


def test_steps_that_are_taken_back(tiny_model: LlamaForCausalLM) -> None:
    """A cached prefix that is cropped to its length after an answer: SnapKV chooses anew."""
    update_model(tiny_model)
    set_params(tiny_model, method="snapkv:window=3,pool_size=3", K=K)
    prefix, question = tokens(1, 4), tokens(1, 25, seed=2)
    found = []
    for steps in (0, 2):
        cache = DynamicCache(config=tiny_model.config)
        tiny_model(prefix, past_key_values=cache)
        for at in range(steps):
            tiny_model(tokens(1, 2, seed=3)[:, at : at + 1], past_key_values=cache)
        cache.crop(-steps)
        tiny_model(question[:, :21], past_key_values=cache)
        rest = [tiny_model(question[:, i : i + 1], past_key_values=cache).logits for i in range(21, 25)]
        found.append(torch.cat(rest, 1))
        assert all(layer.method_state.tensors["dropped"].any() for layer in cache.layers)
    torch.testing.assert_close(found[1], found[0])


def test_a_step_that_is_taken_back_and_computed_again(tiny_model: LlamaForCausalLM) -> None:
    """The first step behind a prompt chooses the same keys again, of other sequences, too."""
    update_model(tiny_model)
    set_params(tiny_model, method="snapkv:window=3,pool_size=3", K=K)
    prompt, step = tokens(2, 20), tokens(2, 1, seed=3)
    cache = DynamicCache(config=tiny_model.config)
    tiny_model(prompt, past_key_values=cache)
    first = tiny_model(step, past_key_values=cache).logits
    dropped = [layer.method_state.tensors["dropped"].clone() for layer in cache.layers]
    other = copy.deepcopy(cache)
    cache.crop(-1)
    torch.testing.assert_close(tiny_model(step, past_key_values=cache).logits, first)
    for layer, before in zip(cache.layers, dropped):
        assert torch.equal(layer.method_state.tensors["dropped"], before)
    other.reorder_cache(torch.tensor([1, 0]))
    other.crop(-1)
    torch.testing.assert_close(tiny_model(step[[1, 0]], past_key_values=other).logits, first[[1, 0]])


def test_a_prompt_behind_steps_brings_nothing_back(model: LlamaForCausalLM) -> None:
    recorder = Recorder()
    record_statistics(model, recorder)
    cache = DynamicCache(config=model.config)
    model(tokens(length=20), past_key_values=cache)
    steps(model, cache, tokens(length=3, seed=3))
    recorder.drain()
    model(tokens(length=2, seed=4), past_key_values=cache)
    kept = recorder.drain()[0][1].attn
    assert (kept < 2 * 15).all() and (kept > 2 * K).all()  # of 24 and 25


@pytest.mark.parametrize("method", ["quest", *METHODS])
@pytest.mark.parametrize("chunk", [None, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_is_dense(
    tiny_model: LlamaForCausalLM,
    method: str,
    chunk: int | None,
    padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is computed by the fastest kernel, and the method sees only the rows that it needs: the results are
    those of plain PyTorch."""
    update_model(tiny_model)
    set_params(tiny_model, method=method, K=K)
    batch, seen, found = left_padded((25, 14) if padded else (25,)), [], []
    plain = registry.sparse_attention

    def watched(call: AttentionCall, *args: Any) -> Any:
        if not call.decode:
            seen.append(call.q.shape[2])
        return plain(call, *args)

    monkeypatch.setattr(registry, "sparse_attention", watched)
    for forced in ("reference", None):
        monkeypatch.setattr(registry, "FORCED", forced)
        seen.clear()
        recorder = Recorder()
        record_statistics(tiny_model, recorder)
        found.append((chunked.generate(tiny_model, batch, chunk, **NEW), recorder.drain()))
    assert torch.equal(found[0][0], found[1][0])
    for layer, (one, two) in enumerate(zip(found[0][1][0].values(), found[1][1][0].values())):
        for name in ("attn", "vrow", "full", "n", "kv_read"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=f"{layer} {name}")
    for one, two in zip(found[0][1][1].values(), found[1][1][1].values()):
        for before, after in zip(one, two, strict=True):
            np.testing.assert_array_equal(before.attn, after.attn)
    needed = {"quest": 0, "tova": 1, METHODS[-1]: 3}.get(method)
    if needed is not None and library.ready() is None:
        whole = [rows for rows in seen if rows > needed]  # where the last rows of a sequence are padding
        assert len(whole) == (3 if padded and chunk and needed else 0)
