"""The patched model: it runs our code in every layer, dense is stock bit for bit, and every way of calling
agrees."""

import copy

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

from tests.conftest import tiny_config
from topk_llama import TopK_LLamaAttention, restore_model, set_params, update_model
from toptheta.attention.reference import LayerSpec
from toptheta.models.control import record_statistics
from toptheta.models.patch import patched_layers
from toptheta.models.recorder import Recorder
from toptheta.util.errors import UsageError

pytestmark = pytest.mark.usefixtures("path")

SPARSE = {
    "Top-k": {"mode": 1, "K": 6, "sdc": "exact", "vmc": True},
    "Top-k post": {"mode": 1, "K": 6, "placement": "post-softmax", "vmc": True},
    "Top-theta": {"mode": 0, "K": 6, "sdc": "exact", "vmc": True},
    "Top-theta post": {"mode": 0, "K": 6, "placement": "post-softmax", "vmc": True},
    "Top-theta capped": {"mode": 0, "K": 6, "sdc": "exp-threshold", "capk": True},
    "Top-theta offline": {"mode": 0, "K": 6, "sdc": "offline-calibrated", "vmc": True},
}


def tokens(batch: int = 1, length: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def steer(model: LlamaForCausalLM, params: dict) -> None:
    """Patch, and calibrate on a few prompts where the parameters need it."""
    update_model(model)
    if params["mode"] == 0 or params.get("sdc") == "offline-calibrated":
        set_params(model, **params, calibrate=True, calib_sample_frac=1.0)
        for seed in range(3):
            model(tokens(length=60, seed=seed))
    set_params(model, **params, calibrate=False)


def test_every_layer_runs_our_code(tiny_model: LlamaForCausalLM) -> None:
    assert update_model(tiny_model) is tiny_model
    layers = patched_layers(tiny_model)
    assert [layer.layer_idx for layer in layers] == [0, 1, 2]
    assert all(type(layer.self_attn) is TopK_LLamaAttention for layer in tiny_model.model.layers)
    set_params(tiny_model, mode=1, K=4)
    tiny_model(tokens())
    tiny_model(tokens(length=9))
    assert [layer.calls for layer in layers] == [2, 2, 2]


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


def test_no_llama_layer() -> None:
    with pytest.raises(UsageError, match="no LlamaAttention"):
        update_model(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10)))
    with pytest.raises(UsageError, match="not patched"):
        set_params(LlamaForCausalLM(tiny_config()), mode=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("recording", [False, True])
def test_dense_is_stock_bit_for_bit(implementation: str, recording: bool) -> None:
    torch.manual_seed(0)
    stock = LlamaForCausalLM._from_config(tiny_config(), attn_implementation=implementation).eval()
    ours = update_model(copy.deepcopy(stock))
    set_params(ours, mode=3)
    recorder = Recorder(6)
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
        recorder = Recorder(6)
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


def test_one_layer_only(tiny_model: LlamaForCausalLM) -> None:
    """test_layer: the others stay dense, which the statistics show."""
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K=4, test_layer=1)
    assert [layer.spec.sparse for layer in patched_layers(tiny_model)] == [False, True, False]
    recorder = Recorder(6)
    record_statistics(tiny_model, recorder)
    tiny_model(tokens(length=10))
    prefill, _ = recorder.drain()
    assert [int(prefill[layer].attn[0, 0]) for layer in range(3)] == [55, 4 * 10 - 6, 55]


def test_k_per_layer(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K={1: 0, 2: 7})
    assert [layer.spec.k for layer in patched_layers(tiny_model)] == [256, 0, 7]
    set_params(tiny_model, K=[3, 4, 5])
    assert [layer.spec.k for layer in patched_layers(tiny_model)] == [3, 4, 5]
    for k, message in (
        ([3, 4], "lists 2 values"),
        ({5: 3}, "layer 5"),
        ("64", "K is '64'"),
        (2.5, "K is 2.5"),
    ):
        with pytest.raises(UsageError, match=message):
            set_params(tiny_model, K=k)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"modus": 1}, "no parameter 'modus'"),
        ({"placement": "middle"}, "placement is 'middle'"),
        ({"mode": 1, "vmc": True}, "vmc has nothing to compensate"),
        ({"mode": 1, "sdc": "exact", "placement": "post-softmax"}, "needs placement pre-softmax"),
        ({"mode": 1, "sdc": "exp-threshold"}, "needs a threshold"),
        ({"mode": 1, "capk": True}, "mode 0 only"),
        ({"mode": 0}, "needs calibrated tables"),
        ({"mode": 1, "sdc": "offline-calibrated"}, "needs calibrated tables"),
        ({"mode": 1, "calib_sample_frac": 0.0}, "above 0"),
        ({"mode": 1, "test_layer": 3}, "test_layer is 3"),
        ({"mode": 3, "calibrate": True}, "nothing to calibrate"),
    ],
)
def test_parameters_that_make_no_sense(params: dict, message: str, tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    with pytest.raises(UsageError, match=message):
        set_params(tiny_model, **params)


def test_thresholds_stay_float32_and_move(tiny_model: LlamaForCausalLM) -> None:
    steer(tiny_model, SPARSE["Top-theta offline"])
    layer = patched_layers(tiny_model)[0]
    before = layer.theta.clone()
    tiny_model.to(torch.bfloat16)
    assert layer.q_proj.weight.dtype == torch.bfloat16
    assert layer.theta.dtype == torch.float32 and torch.equal(layer.theta, before)
    assert tiny_model(tokens()).logits.isfinite().all()
    tiny_model.to("meta")
    assert layer.theta.device.type == "meta"


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
    assert [layer.spec.k for layer in patched_layers(tiny_model)] == [3, 3, 3]


def test_statistics_cost_nothing_when_off(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    assert tiny_model.config._attn_implementation == "sdpa"  # dense: the stock function by its own name
    set_params(tiny_model, mode=1, K=4)
    assert tiny_model.config._attn_implementation == "toptheta"
    assert all(layer.spec == LayerSpec(1, "pre-softmax", 4) for layer in patched_layers(tiny_model))
    set_params(tiny_model, mode=3)
    assert tiny_model.config._attn_implementation == "sdpa"


def test_statistics_of_chunks_and_repeats(tiny_model: LlamaForCausalLM) -> None:
    """A prefill in chunks, and answers behind a repeated prompt, count like the whole."""
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K=6)
    recorder = Recorder(6)
    record_statistics(tiny_model, recorder)
    ids = tokens(length=30)
    tiny_model(ids)
    whole, _ = recorder.drain()
    cache = DynamicCache(config=tiny_model.config)
    recorder.phase = "prefill"
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
