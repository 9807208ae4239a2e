"""when_slower="dense" with made profiles: which calls are computed dense, what they give, how they count."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from tests.helpers.models import SPARSE, steer, tiny_config, tokens
from tests.kernels.triton.helpers import DEVICE, here
from topk_llama import TopThetaCache, set_params
from toptheta.kernels import profile as profiles
from toptheta.kernels import registry as kernels
from toptheta.kernels.dense import DENSE_WAYS
from toptheta.kernels.profile import SPARSE_WAYS, Entry, Kind, Profile, key_of
from toptheta.models.control import record_statistics, take_dense_calls
from toptheta.models.patch import layer_states
from toptheta.models.recorder import Recorder

LAYERS = 2
DENSE = {"mode": 3, "sdc": "none", "vmc": False, "when_slower": "sparse"}
THETA = SPARSE["Top-theta"] | {"when_slower": "sparse"}
SLOWER = SPARSE["Top-theta"] | {"when_slower": "dense"}


@pytest.fixture
def model(tmp_path, monkeypatch) -> LlamaForCausalLM:
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "FORCED", "triton")
    profiles.profile_of.cache_clear()
    torch.manual_seed(10)
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}
    made = LlamaForCausalLM(tiny_config(**sizes)).eval().to(DEVICE)
    steer(made, SPARSE["Top-theta"])
    yield made
    profiles.profile_of.cache_clear()


def measured(**ms: float) -> None:
    """Keep a profile in which a dense way takes twice these milliseconds at every length, and a sparse one as
    many where it keeps nothing and twice as many where it keeps all."""
    entries = []
    for phase in ("decode", "prefill"):
        for masked in (False, True):
            for graphed in (False, True):
                kind = Kind(phase, 2, 16, "float32", graphed, masked)
                for way, time in ms.items():
                    shares = (0.0, 1.0) if way in SPARSE_WAYS else (1.0,)
                    entries += [Entry(kind, way, 1, 64, kept, time * (1 + kept)) for kept in shares]
    profiles.save(Profile(key_of(torch.device(DEVICE)), entries=entries))


def read(model, cache, ids, step=None) -> torch.Tensor:
    """Logits of a prompt of 20 tokens and the steps behind it."""
    out = [model(ids[:, :20], past_key_values=cache).logits[:, -1]]
    for at in range(20, ids.shape[1]):
        position = torch.tensor([[at]], device=DEVICE)
        given = {"past_key_values": cache, "position_ids": position}
        out.append((step or model.forward)(input_ids=ids[:, at : at + 1], **given).logits[:, -1])
    return torch.stack(out)


def by(model, ids, params) -> torch.Tensor:
    set_params(model, **params)
    return read(model, DynamicCache(config=model.config), ids)


@here
@pytest.mark.parametrize("way", DENSE_WAYS)
def test_slower_thresholds_are_dense(way, model):
    """All but the first step of the request, which counts; statistics take the calls for what they are."""
    measured(**({one: 1.0 + (one != way) for one in DENSE_WAYS} | dict.fromkeys(SPARSE_WAYS, 2.0)))
    ids = tokens(length=24).to(DEVICE)
    expected = by(model, ids, DENSE)
    set_params(model, **SLOWER)
    recorder = Recorder()
    record_statistics(model, recorder)
    got = read(model, DynamicCache(config=model.config), ids)
    record_statistics(model, None)
    assert take_dense_calls(model) == (LAYERS * 4, LAYERS * 5)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[1], expected[1], rtol=1e-3, atol=1e-3)
    prefill, decode = recorder.drain()
    for steps in decode.values():
        shares = [float(record.attn.sum()) / (2 * record.n[0]) for record in steps]
        assert shares[0] < 0.8 and shares[1:] == [1.0] * 3
        assert all((record.kv_read == record.kv_dense).all() for record in steps[1:])
    assert all(record.attn.sum() == 2 * record.full.sum() for record in prefill.values())


@here
def test_faster_thresholds_stay(model):
    measured(**dict.fromkeys(DENSE_WAYS, 2.0), **dict.fromkeys(SPARSE_WAYS, 0.5))
    ids = tokens(length=24).to(DEVICE)
    expected = by(model, ids, THETA)
    assert torch.equal(by(model, ids, SLOWER), expected)
    assert take_dense_calls(model) == (0, LAYERS * 5)


@here
def test_counts_correct_what_is_expected(model):
    """Before, it is K of 6 for each of two heads; then what statistics say of the first step."""
    ids = tokens(length=24).to(DEVICE)
    set_params(model, **SLOWER)
    measured(kernel=0.7, scores=1.0)  # dense where more than 40 % are kept
    recorder = Recorder()
    record_statistics(model, recorder)
    read(model, DynamicCache(config=model.config), ids)
    record_statistics(model, None)
    _, decode = recorder.drain()
    found = [state.now.chooser._expected for state in layer_states(model)]
    for layer, expected in enumerate(found):
        first = decode[layer][0]
        assert expected.elements == first.attn.mean() and expected.rows == first.vrow.mean() < 21
    dense, _ = take_dense_calls(model)
    # The prompt's rows are expected to keep 6 of 10.5 keys on average, which is more than 40 %.
    assert dense == LAYERS + 3 * sum(expected.rows / 22 > 0.4 for expected in found)


@here
def test_two_tiers_may_become_one(model):
    """The same is kept, so what is asked for is left where the copy of K is slower."""
    measured(kernel=9.0, sdpa=9.0, scores=1.0, **{"two-tier": 2.0})
    ids = tokens(length=24).to(DEVICE)
    seen = []
    triton = next(one for one in kernels.BACKENDS if one.name == "triton")
    set_params(model, **SLOWER)
    cache = TopThetaCache(model.config, 30, two_tier=True)
    with pytest.MonkeyPatch.context() as patch:
        spy = replace(triton, run=lambda call: seen.append(call.int8 is not None) or triton.run(call))
        patch.setattr(kernels, "BACKENDS", (kernels.BACKENDS[0], spy))
        got = read(model, cache, ids)
    assert seen == [True] * LAYERS * 2 + [False] * LAYERS * 3  # the prompt has a copy, and does not use it
    expected = by(model, ids, THETA)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    assert take_dense_calls(model) == (0, LAYERS * 5)


@here
@pytest.mark.long
@pytest.mark.parametrize("slower", [True, False])
def test_compiled_models_keep_the_choice(slower, model):
    """It is made when the model is traced, and the sum of V goes on. The prompt is masked, for which nothing
    was measured as it is shorter than the cache: thresholds compute it."""
    measured(kernel=1.0, scores=4.0 if slower else 0.1)
    ids = tokens(length=24).to(DEVICE)
    set_params(model, **SLOWER)
    cache = TopThetaCache(model.config, 30)
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = read(model, cache, ids, step)
    set_params(model, **THETA)
    other = StaticCache(config=model.config, max_cache_len=30)
    expected = [model(ids[:, :20], past_key_values=other).logits[:, -1]]
    set_params(model, **(DENSE if slower else THETA))
    for at in range(20, 24):
        expected.append(model(ids[:, at : at + 1], past_key_values=other).logits[:, -1])
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-4)
    for layer in cache.layers:
        torch.testing.assert_close(layer._sum, layer.values[:, :, :24].sum(dim=2, dtype=torch.float64))
