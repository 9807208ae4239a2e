"""The patched model: it runs our code in every layer, dense is stock bit for bit, a patch can be undone."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from tests.helpers.calls import layer_spec
from tests.helpers.models import SPARSE, copies, steer, tiny_config, tokens
from topk_llama import TopK_LLamaAttention, restore_model, set_params, update_model
from toptheta.models import interface
from toptheta.models.control import get_params, record_statistics
from toptheta.models.patch import layer_states, patched_layers
from toptheta.models.recorder import Recorder
from toptheta.util.errors import UsageError

pytestmark = pytest.mark.usefixtures("path")


def test_every_layer_runs_our_code(tiny_model: LlamaForCausalLM) -> None:
    assert update_model(tiny_model) is tiny_model
    layers = patched_layers(tiny_model)
    assert [layer.layer_idx for layer in layers] == [0, 1, 2]
    assert all(type(layer.self_attn) is TopK_LLamaAttention for layer in tiny_model.model.layers)
    set_params(tiny_model, mode=1, K=4)
    tiny_model(tokens())
    tiny_model(tokens(length=9))
    assert [layer.toptheta.now.calls for layer in layers] == [2, 2, 2]


def test_update_twice_and_restore(tiny_model: LlamaForCausalLM) -> None:
    stock = tiny_model(tokens()).logits
    originals = [layer.self_attn for layer in tiny_model.model.layers]
    names = list(tiny_model.state_dict())
    update_model(tiny_model)
    first = patched_layers(tiny_model)
    update_model(tiny_model)
    assert patched_layers(tiny_model) == first
    assert list(tiny_model.state_dict()) == names
    set_params(tiny_model, mode=1, K=4)
    assert not torch.equal(tiny_model(tokens()).logits, stock)
    restore_model(tiny_model)
    assert [layer.self_attn for layer in tiny_model.model.layers] == originals
    assert all(type(layer.self_attn) is LlamaAttention for layer in tiny_model.model.layers)
    assert torch.equal(tiny_model(tokens()).logits, stock)


def test_no_known_layer() -> None:
    with pytest.raises(UsageError, match="has no attention layer of a supported family"):
        update_model(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10)))
    with torch.device("meta"):
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        vision = sizes | {"image_size": 16, "patch_size": 8}
        config = Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4)
        many = Gemma3ForConditionalGeneration(config)
    with pytest.raises(UsageError, match="contains a language model of type 'gemma3_text' and other parts"):
        update_model(many)
    with pytest.raises(UsageError, match="not patched"):
        set_params(LlamaForCausalLM(tiny_config()), mode=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("recording", [False, True])
def test_dense_is_stock_bit_for_bit(implementation: str, recording: bool) -> None:
    torch.manual_seed(0)
    stock = LlamaForCausalLM._from_config(tiny_config(), attn_implementation=implementation).eval()
    ours = update_model(copy.deepcopy(stock))
    set_params(ours, mode=3)
    recorder = Recorder()
    record_statistics(ours, recorder if recording else None)
    padding = torch.ones(2, 40, dtype=torch.long)
    padding[1, :7] = 0
    for inputs in ({"input_ids": tokens()}, {"input_ids": tokens(2), "attention_mask": padding}):
        a, b = stock(**inputs, use_cache=True), ours(**inputs, use_cache=True)
        assert torch.equal(a.logits, b.logits)
        recorder.drain()
    step = tokens(length=1, seed=5)
    a, b = stock(tokens(), use_cache=True), ours(tokens(), use_cache=True)
    for _ in range(3):
        a = stock(step, past_key_values=a.past_key_values)
        b = ours(step, past_key_values=b.past_key_values)
        assert torch.equal(a.logits, b.logits)
    recorder.drain()
    assert torch.equal(stock.generate(tokens(), max_new_tokens=8), ours.generate(tokens(), max_new_tokens=8))


def test_thresholds_stay_float32_and_move(tiny_model: LlamaForCausalLM) -> None:
    steer(tiny_model, SPARSE["Top-theta offline"])
    layer = patched_layers(tiny_model)[0]
    state = layer.toptheta
    before = state.theta.clone()
    tiny_model.to(torch.bfloat16)
    assert layer.q_proj.weight.dtype == torch.bfloat16
    assert state.theta.dtype == torch.float32 and torch.equal(state.theta, before)
    assert tiny_model(tokens()).logits.isfinite().all()
    tiny_model.to("meta")
    assert state.theta.device.type == "meta"


def test_offloaded_model(tiny_model: LlamaForCausalLM) -> None:
    """Weights that accelerate brings at each call: patched before or after, the numbers are the same."""
    from accelerate import cpu_offload

    plain = copy.deepcopy(tiny_model)
    update_model(plain)
    set_params(plain, mode=1, K=5, sdc="exact")
    expected = plain(tokens()).logits
    cpu_offload(tiny_model, execution_device=torch.device("cpu"))
    assert tiny_model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K=5, sdc="exact")
    assert torch.equal(tiny_model(tokens()).logits, expected)
    set_params(tiny_model, mode=0, K=5, calibrate=True, calib_sample_frac=1.0)
    tiny_model(tokens())
    set_params(tiny_model, calibrate=False)
    assert tiny_model(tokens()).logits.isfinite().all()


def test_a_family_that_is_not_supported() -> None:
    """Also by the name of the implementation, before anything is set."""
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10, attn_implementation="top_theta")
    with pytest.raises(UsageError, match="GPT2Attention is an attention layer of no supported family"):
        GPT2LMHeadModel(config)(torch.tensor([[1, 2]]))


def test_no_weights_are_returned(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K=4)
    interface._warn_of_weights.cache_clear()
    with pytest.warns(UserWarning, match="output_attentions has no effect on sparse layers"):
        assert not tiny_model(tokens(), output_attentions=True).attentions


def test_output_attentions() -> None:
    """Hooks that captured attention weights before the patch still do after it, and after its removal."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(tiny_config(), attn_implementation="eager").eval()
    before = model(tokens(), output_attentions=True).attentions
    update_model(model)
    after = model(tokens(), output_attentions=True).attentions
    assert len(before) == len(after) == 3 and torch.equal(before[1], after[1])
    restore_model(model)
    assert torch.equal(model(tokens(), output_attentions=True).attentions[2], before[2])


def test_two_models_in_one_process(tiny_model: LlamaForCausalLM) -> None:
    other = copy.deepcopy(tiny_model)
    stock = other(tokens()).logits
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K=3)
    tiny_model(tokens())
    assert torch.equal(other(tokens()).logits, stock)
    update_model(other)
    set_params(other, mode=1, K=20)
    assert [state.spec.k for state in layer_states(tiny_model)] == [3, 3, 3]


def test_models_of_one_config() -> None:
    """The attention's name stands on the config: patching one of two models that share it leaves the
    other."""
    config = tiny_config()
    torch.manual_seed(0)
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    stock, own = other(tokens()).logits, one(tokens()).logits
    update_model(one)
    set_params(one, mode=1, K=3)
    assert other.config._attn_implementation == "sdpa" and torch.equal(other(tokens()).logits, stock)
    update_model(other)
    set_params(other, mode=1, K=4)
    set_params(one, mode=3)
    assert torch.equal(one(tokens()).logits, own) and not torch.equal(other(tokens()).logits, stock)
    restore_model(other)
    assert torch.equal(other(tokens()).logits, stock)


def test_copies_have_a_state_of_their_own(tiny_model: LlamaForCausalLM) -> None:
    stock = copy.deepcopy(tiny_model)
    steer(tiny_model, SPARSE["Top-theta offline"])
    sparse = tiny_model(tokens()).logits
    for other in copies(tiny_model, stock):
        assert torch.equal(other(tokens()).logits, sparse)
        set_params(other, mode=3)
        assert not torch.equal(other(tokens()).logits, sparse)
        assert torch.equal(tiny_model(tokens()).logits, sparse)


def test_statistics_cost_nothing_when_off(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    assert tiny_model.config._attn_implementation == "sdpa"  # dense: the stock function by its own name
    set_params(tiny_model, mode=1, K=4)
    assert tiny_model.config._attn_implementation == "top_theta"
    assert all(state.spec == layer_spec(1, "pre-softmax", 4) for state in layer_states(tiny_model))
    set_params(tiny_model, mode=3)
    assert tiny_model.config._attn_implementation == "sdpa"


def test_a_wrapper(tiny_model: LlamaForCausalLM) -> None:
    with pytest.raises(UsageError, match="Sequential is a wrapper without a config: give the model in it"):
        update_model(torch.nn.Sequential(tiny_model))


@pytest.mark.parametrize("wrong", [None, "owner/model", tiny_config()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("call", [update_model, restore_model, get_params, partial(set_params, mode=3)])
def test_what_is_no_model(call: Callable, wrong: Any) -> None:
    with pytest.raises(
        UsageError, match=f"^the model is of type {type(wrong).__name__}: give the model itself"
    ):
        call(wrong)


@pytest.mark.filterwarnings("error")
def test_an_error_before_the_attention_is_the_only_one(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K=4)
    projection = tiny_model.model.layers[1].self_attn.q_proj

    def fail(*_) -> None:
        raise MemoryError("no room")

    handle = projection.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="no room"):
        tiny_model(tokens())
    handle.remove()
    assert tiny_model(tokens()).logits.isfinite().all()
