"""What every registered method must do in a model, beside its rule: the same in static and growing caches, in
compiled models, in threads that share the model, and with caches that are saved or leave inference mode."""

import pickle
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from tests.helpers.models import steer, tokens
from topk_llama import TopThetaCache
from toptheta.methods.base import names

OPTIONS = {  # small numbers, for prompts of 20 tokens
    "h2o": "h2o:prefill=causal",
    "quest": "quest:page=4,dense_layers=0",
    "skip_softmax": "skip_softmax:decode=0.1,prefill=0.1,tile=8",
    "snapkv": "snapkv:window=3,pool_size=3",
    "streaming_llm": "streaming_llm:sinks=2",
    "top_theta": "top_theta:key_copy=int4",
}
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=names())
def model(request: pytest.FixtureRequest, tiny_model: LlamaForCausalLM) -> LlamaForCausalLM:
    steer(tiny_model, {"method": OPTIONS.get(request.param, request.param), "K": 6})
    return tiny_model


def logits(model: LlamaForCausalLM, run: Any, cache: Any, ids: Tensor, prompt: int) -> Tensor:
    """Of the last row of a prompt, and of the steps after it, which `run` computes."""
    parts = [model(ids[:, :prompt], past_key_values=cache).logits[:, -1:]]
    parts += [run(ids[:, at : at + 1], past_key_values=cache).logits for at in range(prompt, ids.shape[1])]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("first", [1, 20])
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"attention_mask": "ones"}], ids=str)
def test_static_caches(model: LlamaForCausalLM, arguments: dict, first: int) -> None:
    """generate() makes masks of its own for static caches, from which rows must be recognised. A prompt of a
    single token is one, too."""
    ids = tokens(2, first)
    if "attention_mask" in arguments:
        arguments = {"attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **GREEDY, **arguments)
    for kind in (StaticCache, TopThetaCache):
        cache = kind(config=model.config, max_cache_len=40)
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY, **arguments), expected)


@pytest.mark.parametrize("name", ["tova", "skip_softmax"])
def test_compiled_steps(name: str, tiny_model: LlamaForCausalLM) -> None:
    """Without a break, also where no step came before. A traced mask has no known rows."""
    torch._dynamo.reset()
    steer(tiny_model, {"method": OPTIONS.get(name, name), "K": 6})
    ids = tokens(1, 24)
    compiled = torch.compile(tiny_model, backend="eager", fullgraph=True)
    found = []
    for run in (compiled, tiny_model):
        cache = StaticCache(config=tiny_model.config, max_cache_len=40)
        found.append(logits(tiny_model, run, cache, ids, 20))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_threads_share_a_model(model: LlamaForCausalLM) -> None:
    """Each with a cache of its own, as in a server."""
    several = [tokens(1, 60, seed=seed) for seed in range(3)]
    expected = [logits(model, model, DynamicCache(config=model.config), ids, 20) for ids in several]
    found: dict[int, Any] = {}

    def read(i: int) -> None:
        try:
            with torch.no_grad():
                found[i] = logits(model, model, DynamicCache(config=model.config), several[i], 20)
        except Exception as error:
            found[i] = error

    threads = [Thread(target=read, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, one in enumerate(expected):
        torch.testing.assert_close(found[i], one)


def test_a_cache_that_was_saved(model: LlamaForCausalLM) -> None:
    ids = tokens(1, 30)
    cache = DynamicCache(config=model.config)
    logits(model, model, cache, ids[:, :24], 20)
    other = pickle.loads(pickle.dumps(cache))
    found = [torch.cat([model(ids[:, i : i + 1], past_key_values=one).logits for i in range(24, 30)], 1)
             for one in (cache, other)]  # fmt: skip
    torch.testing.assert_close(found[1], found[0])


def test_out_of_inference_mode(model: LlamaForCausalLM) -> None:
    """There, what was created in it cannot be changed in place."""
    ids = tokens(1, 30)
    expected = logits(model, model, DynamicCache(config=model.config), ids, 20)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        logits(model, model, cache, ids[:, :24], 20)
    with torch.no_grad():
        rest = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(24, 30)]
    torch.testing.assert_close(torch.cat(rest, 1), expected[:, 5:])
