"""A copy of K in few bits behind static caches: the same as behind a growing one, and only new keys are
coded."""

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

from tests.helpers.models import SPARSE, steer, tokens
from topk_llama import TopThetaCache, set_params
from toptheta.kernels import registry
from toptheta.kernels.cpu import library
from toptheta.methods import key_codes
from toptheta.models import interface

pytestmark = pytest.mark.usefixtures("path")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LAYERS, ROOM = 3, 48
CACHES = {"static": StaticCache, "with sum": TopThetaCache}


@pytest.fixture(params=["int8", "int4"])
def model(request, tiny_model: LlamaForCausalLM) -> LlamaForCausalLM:
    steer(tiny_model, SPARSE["Top-theta post"])
    set_params(tiny_model, method=f"top_theta:key_copy={request.param}")
    return tiny_model


@pytest.fixture(params=["host", "device"])
def offset(request, monkeypatch) -> None:
    """device: where the first query lies among the keys is in a tensor that is not read, as on a GPU."""
    if request.param == "device":
        monkeypatch.setattr(interface, "_on_host", lambda q_offset: q_offset)


@pytest.fixture
def coded(monkeypatch) -> list[int]:
    """How many keys each layer codes, call by call."""
    sizes, real = [], key_codes.coded

    def counted(k: Tensor, mean: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        sizes.append(k.shape[2])
        return real(k, mean, bits)

    monkeypatch.setattr(key_codes, "coded", counted)
    return sizes


def make(kind: str, model: LlamaForCausalLM) -> Cache:
    return CACHES[kind](config=model.config, max_cache_len=ROOM)


def grown(model: LlamaForCausalLM) -> DynamicCache:
    return DynamicCache(config=model.config)


def read(
    model: LlamaForCausalLM, cache: Cache, ids: Tensor, sizes: list[int], mask: Tensor, start=0
) -> Tensor:
    """Logits of `ids` from `start` on, given to the model in parts of these sizes."""
    positions, parts = (mask.cumsum(dim=1) - 1).clamp_min(0), []
    for size in sizes:
        end = start + size
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        parts.append(model(ids[:, start:end], past_key_values=cache, **given).logits)
        start = end
    return torch.cat(parts, dim=1)


@pytest.mark.usefixtures("offset")
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_equals_a_growing_cache(padding: str, model: LlamaForCausalLM, coded: list[int]) -> None:
    """A prompt in two parts, steps, a later prompt, steps. Of the second part on the mean is another, so all
    of the prompt is coded anew. The same cache then takes another prompt, into the same tensors."""
    ids, sizes = tokens(batch=2, length=30), [14, 6, 1, 1, 4, 1, 1]
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, 9) if padding == "left" else slice(11, 20)] = 0
    for kind in CACHES:
        cache = make(kind, model)
        expected = read(model, grown(model), ids, sizes, mask)[mask[:, :28].bool()]
        coded.clear()
        got = read(model, cache, ids, sizes, mask)
        assert coded == [count for count in (14, 20, 1, 1, 4, 1, 1) for _ in range(LAYERS)]
        torch.testing.assert_close(got[mask[:, :28].bool()], expected, **CLOSE)
        copies = [layer.method_state.key_codes for layer in cache.layers]
        cache.reset()
        real = mask[:, 2:25]
        expected = read(model, grown(model), ids[:, 2:], [20, 1, 1, 1], real)[real.bool()]
        coded.clear()
        got = read(model, cache, ids[:, 2:], [20, 1, 1, 1], real)
        assert coded == [count for count in (20, 1, 1, 1) for _ in range(LAYERS)]
        torch.testing.assert_close(got[real.bool()], expected, **CLOSE)
        for layer, before in zip(cache.layers, copies):
            now = layer.method_state.key_codes
            assert all(getattr(now, x) is getattr(before, x) for x in ("codes", "steps", "mean"))


@pytest.mark.usefixtures("offset")
def test_crops(model: LlamaForCausalLM, coded: list[int]) -> None:
    """Keys are taken off, of the prompt too, and others come in their place."""
    ids, other = tokens(length=40), tokens(length=40, seed=2)
    mask = torch.ones_like(ids)
    results = []
    for cache in (grown(model), make("with sum", model)):
        first = read(model, cache, ids, [20, 1, 1, 1, 1], mask)
        cache.crop(-3)
        second = read(model, cache, other, [1, 1], mask, start=21)
        cache.crop(-10)
        coded.clear()
        third = read(model, cache, ids, [6, 1, 1], mask, start=13)
        results.append(torch.cat([first, second, third], dim=1))
    assert coded == [count for count in (6, 1, 1) for _ in range(LAYERS)]
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@pytest.mark.usefixtures("offset")
@pytest.mark.parametrize("between", [{"mode": 3}, {"method": "top_k"}], ids=["dense", "Top-k"])
def test_keys_that_come_to_another_method(between, model: LlamaForCausalLM, coded: list[int]) -> None:
    """They are coded with the next step. After a dense prompt the first step codes it."""
    ids, own = tokens(length=30), {"method": model.model.layers[0].self_attn.toptheta.spec.method}
    mask, results = torch.ones_like(ids), []
    for cache in (grown(model), make("static", model)):
        parts, coded_of = [], []
        for params, sizes, start in (
            (between, [20], 0), (own, [1, 1], 20), (between, [1, 3, 1], 22), (own, [1, 1], 27),
        ):  # fmt: skip
            set_params(model, **params)
            coded.clear()
            parts.append(read(model, cache, ids, sizes, mask, start))
            coded_of.append(list(coded))
        set_params(model, **own)
        results.append(torch.cat(parts, dim=1))
    assert coded_of == [[], [ROOM] * LAYERS + [1] * LAYERS, [], [6] * LAYERS + [1] * LAYERS]
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generates(kind: str, beams: int, model: LlamaForCausalLM) -> None:
    """Beams are reordered; one cache serves two prompts."""
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    cache = make(kind, model)
    for seed in (1, 2):
        ids = tokens(batch=2, length=18, seed=seed)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        options |= {"attention_mask": mask, "eos_token_id": None}
        expected = model.generate(ids, **options)
        cache.reset()
        got = model.generate(ids, past_key_values=cache, disable_compile=True, **options)
        assert torch.equal(got, expected)


def test_compiles_once(model: LlamaForCausalLM, path: str, monkeypatch) -> None:
    """A step over a static cache is one graph, for every step and for the next prompt; kernels compute it."""
    int8 = model.model.layers[0].self_attn.toptheta.spec.method.key_bits == 8  # int4 needs a larger head_dim
    if path == "chosen" and int8 and not isinstance(library.load(), str):
        monkeypatch.setattr(registry, "FORCED", "cpu")  # it would raise where it cannot be traced
    ids = tokens(length=30)

    def steps(step, cache: Cache, start: int) -> Tensor:
        model(ids[:, :start], past_key_values=cache)
        return torch.cat(
            [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(start, start + 4)]
        )

    expected = [steps(model, grown(model), start) for start in (20, 15)]
    torch._dynamo.reset()
    compiled, cache = torch.compile(model, fullgraph=True, backend="aot_eager"), make("static", model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = [steps(compiled, cache, 20)]
        cache.reset()
        got.append(steps(compiled, cache, 15))
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generated_code(kind: str, model: LlamaForCausalLM) -> None:
    """Also the default compiler, which generates C++, computes a step in plain PyTorch."""
    ids = tokens(length=21)

    def step(compute) -> Tensor:
        cache = grown(model) if kind == "dynamic" else make(kind, model)
        model(ids[:, :20], past_key_values=cache)
        return compute(ids[:, 20:], past_key_values=cache).logits

    expected = step(model)
    torch._dynamo.reset()
    torch.testing.assert_close(step(torch.compile(model)), expected, **CLOSE)
