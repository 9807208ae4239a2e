"""What transformers expects of every model, of ours too: where K is at least the length, generation finds the
tokens of the stock model; where it is not, every way of generating finds the same tokens.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from tests.helpers.families import make
from tests.helpers.models import SPARSE as METHODS
from tests.helpers.models import copies, steer, tokens
from topk_llama import set_params, update_model
from toptheta.models.patch import layer_states
from toptheta.util.errors import UsageError

NEW = 12
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WAYS: dict[str, dict[str, Any]] = {
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
    "chunks": {"prefill_chunk_size": 7},
}


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2", "gpt_oss"])
def stock(request) -> PreTrainedModel:
    return make(request.param)


@pytest.fixture(scope="module", params=["dense", "Top-k", "Top-theta"])
def pair(request, stock) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model to agree with, and ours: stock, where K is at least the length, or ours itself."""
    with torch.no_grad():
        ours = copy.deepcopy(stock)
        if request.param == "dense":
            update_model(ours)
            set_params(ours, mode=1, K=200, sdc="exact", vmc=True)
            return stock, ours
        steer(ours, METHODS[request.param])
        return ours, ours


def generate(model: PreTrainedModel, ids: Tensor, **arguments) -> Tensor:
    """The new tokens."""
    arguments = {"attention_mask": torch.ones_like(ids)} | GREEDY | arguments
    return model.generate(ids, **arguments)[:, ids.shape[1] :]


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_generating(way: str, pair) -> None:
    reference, ours = pair
    ids = tokens(length=18).repeat(1, 2)[:, :25]  # a text that repeats itself, for prompt lookup
    arguments = dict(WAYS[way])
    if way == "assisted":
        arguments["assistant_model"] = make("llama", "sdpa")
    assert torch.equal(generate(ours, ids, **arguments), generate(reference, ids))


def test_beams(pair) -> None:
    reference, ours = pair
    ids = tokens(2, length=14)
    assert torch.equal(
        generate(ours, ids, num_beams=3), generate(reference, ids, num_beams=3, use_cache=False)
    )


def test_batches(pair) -> None:
    """A batch padded at the left is its sequences one by one."""
    reference, ours = pair
    a, b = tokens(length=20), tokens(length=13, seed=2)
    batch = torch.cat([a, torch.cat([torch.zeros(1, 7, dtype=torch.long), b], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :7] = 0
    alone = torch.cat([generate(reference, a), generate(reference, b)])
    assert torch.equal(generate(ours, batch, attention_mask=mask), alone)
    logits = ours(batch, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(logits[1, 7:], reference(b).logits[0], rtol=1e-3, atol=1e-3)


def test_going_on_from_a_cache(pair) -> None:
    reference, ours = pair
    ids = tokens(length=16)
    whole = generate(reference, ids)
    first = ours.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
        **GREEDY | {"max_new_tokens": 5},
    )
    rest = generate(ours, first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW - 5)
    assert torch.equal(torch.cat([first.sequences[:, 16:], rest], dim=1), whole)


@pytest.mark.parametrize("name", ["phi3", "gpt_oss"])
def test_copies(name: str) -> None:
    """deepcopy and pickle: a copy has hooks and a state of its own."""
    model = make(name)
    steer(model, METHODS["Top-theta"])
    sparse = model(tokens()).logits
    for other in copies(model, make(name)):
        assert torch.equal(other(tokens()).logits, sparse)
        set_params(other, mode=3, sdc="none", vmc=False)
        assert not torch.equal(other(tokens()).logits, sparse)
        assert torch.equal(model(tokens()).logits, sparse)
        assert not set(layer_states(other)) & set(layer_states(model))


def test_pipeline(folder_model: str) -> None:
    """A pipeline with a model that was loaded with our attention."""
    model = AutoModelForCausalLM.from_pretrained(folder_model, attn_implementation="top_theta").eval()
    set_params(model, mode=1, K=6, sdc="exact", vmc=True)
    tokenizer = AutoTokenizer.from_pretrained(folder_model)
    text = "The hills were green, and the town below slept."
    [answer] = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        text, max_new_tokens=5, do_sample=False, return_full_text=False
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    new = generate(model, ids, max_new_tokens=5, eos_token_id=model.generation_config.eos_token_id)
    assert answer["generated_text"] == tokenizer.decode(new[0], skip_special_tokens=True)
    assert all(state.now.calls > 0 for state in layer_states(model))


def test_taken_off_by_transformers() -> None:
    """set_attn_implementation takes our attention off; that is an error while set_params asks for it."""
    model = update_model(make("llama", "sdpa"))
    dense = model(tokens()).logits
    set_params(model, mode=1, K=4)
    sparse = model(tokens()).logits
    model.set_attn_implementation("sdpa")
    with pytest.raises(UsageError, match="did not compute its attention with top_theta"):
        model(tokens())
    model.set_attn_implementation("top_theta")
    assert torch.equal(model(tokens()).logits, sparse)
    model.set_attn_implementation("eager")
    set_params(model, mode=3)
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(tokens()).logits, dense)


def test_arguments_that_would_vanish() -> None:
    model = update_model(make("llama"))
    set_params(model, mode=1, K=4)
    with pytest.raises(
        UsageError, match="passes cu_seq_lens_q to its attention, which top_theta does not support"
    ):
        model(tokens(), cu_seq_lens_q=torch.tensor([0, 20, 40]))
    with pytest.raises(UsageError, match="is_causal"):
        model(tokens(), is_causal=False)
