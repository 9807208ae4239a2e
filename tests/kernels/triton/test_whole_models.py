"""The Triton kernels in a whole patched model: prefill, decode, caches, torch.compile."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache

from tests.helpers.models import SPARSE, steer, tiny_config, tokens
from tests.kernels.triton.helpers import DEVICE, here
from topk_llama import TopThetaCache, set_params, update_model
from toptheta.kernels import int8_keys as two_tier
from toptheta.kernels import registry as kernels
from toptheta.methods.key_codes import coded
from toptheta.models.control import record_statistics
from toptheta.models.recorder import Recorder


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(10)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(tiny_config(**sizes)).eval().to(DEVICE)


def spy(monkeypatch, see) -> None:
    """Have `see` called with each call that the kernels take."""
    triton = next(backend for backend in kernels.BACKENDS if backend.name == "triton")
    seen = replace(triton, run=lambda call: see(call) or triton.run(call))
    others = [backend for backend in kernels.BACKENDS if backend.name != "triton"]
    monkeypatch.setattr(kernels, "BACKENDS", (*others, seen))


@here
@pytest.mark.parametrize("name", ["Top-theta", "Top-theta post"])
def test_whole_model(name, monkeypatch):
    """The patched model by TOPTHETA_KERNEL=triton: prefill of a padded batch, decode, statistics."""
    model = small_llama()
    steer(model, SPARSE[name])
    ids = tokens(batch=2, length=23).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    calls = []
    spy(monkeypatch, lambda call: calls.append(call.q.shape[2]))
    got = {}
    for path in ("reference", "triton"):
        monkeypatch.setattr(kernels, "FORCED", path)
        recorder = Recorder()
        record_statistics(model, recorder)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        given = {"attention_mask": mask[:, :21], "position_ids": positions[:, :21]}
        state = model(ids[:, :21], use_cache=True, **given)
        logits = [state.logits[mask[:, :21].bool()]]
        for end in (22, 23):
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, end - 1 : end]}
            step = model(ids[:, end - 1 : end], past_key_values=state.past_key_values, **given)
            logits.append(step.logits[:, 0])
        record_statistics(model, None)
        prefill, decode = recorder.drain()
        records = [*prefill.values(), *(record for steps in decode.values() for record in steps)]
        got[path] = torch.cat(logits), records
    assert calls == [21] * 2 + [1] * 4
    torch.testing.assert_close(got["triton"][0], got["reference"][0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(got["triton"][1], got["reference"][1]):
        assert (ours.attn == theirs.attn).all() and (ours.vrow == theirs.vrow).all()


CACHES = {
    "static": lambda config: StaticCache(config=config, max_cache_len=30),
    "with sum": lambda config: TopThetaCache(config, 30),
    "two tiers": lambda config: TopThetaCache(config, 30, two_tier=True),
}


CALIBRATED = {
    "placement": "post-softmax",
    "vmc": True,
    "calib_to": "budget",
    "calib_sample_frac": 1.0,
    "K": 6,
}
METHODS = {"value-aware": "top_theta:value_aware", "key copy": "top_theta:key_copy=int4"}


@here
@pytest.mark.long
@pytest.mark.parametrize("kind", [*CACHES, *METHODS])
def test_whole_model_compiles_once(kind, monkeypatch):
    """A static cache: every step runs the one graph, without a break, and equals the plain path."""
    model = small_llama()
    if kind in METHODS:
        update_model(model)
        set_params(model, **CALIBRATED, method=METHODS[kind], calibrate=True)
        model(tokens(length=60).to(DEVICE))
        set_params(model, calibrate=False)
    else:
        steer(model, SPARSE["Top-theta"])
    ids = tokens(length=23).to(DEVICE)

    def decode(step, cache) -> Tensor:
        model(ids[:, :20], past_key_values=cache)
        out = []
        for at in range(20, 23):
            position = torch.tensor([[at]], device=DEVICE)
            given = {"past_key_values": cache, "position_ids": position}
            out.append(step(input_ids=ids[:, at : at + 1], **given).logits[:, 0])
        return torch.cat(out)

    monkeypatch.setattr(kernels, "FORCED", "reference")
    expected = decode(model.forward, StaticCache(config=model.config, max_cache_len=30))
    monkeypatch.setattr(kernels, "FORCED", "triton")
    torch._dynamo.reset()
    cache = CACHES.get(kind, CACHES["with sum"])(model.config)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = decode(torch.compile(model.forward, fullgraph=True, backend="aot_eager"), cache)
    # With two tiers exact SDC adds up estimates of the scores that were not computed.
    close = 2e-3 if kind == "two tiers" else 1e-4
    torch.testing.assert_close(got, expected, rtol=close, atol=close)
    for layer in cache.layers if kind != "static" else ():
        torch.testing.assert_close(layer._sum, layer.values[:, :, :23].sum(dim=2, dtype=torch.float64))
    for layer in cache.layers if kind == "value-aware" else ():
        weighed = layer.weighing.of(layer.values)[:, :, :23]
        torch.testing.assert_close(layer.factor[:, :, :23], weighed, rtol=1e-4, atol=1e-5)
    for layer in cache.layers if kind == "key copy" else ():
        copy = layer.method_state.key_codes
        codes, steps = coded(layer.keys[:, :, :23], copy.mean, 4)
        assert torch.equal(copy.codes[:, :, :23], codes) and torch.equal(copy.steps[:, :, :23], steps)
    for layer in cache.layers if kind == "two tiers" else ():
        fresh = two_tier.quantized(layer.keys, layer.int8.mean)
        assert torch.equal(layer.int8.codes[:, :, :23], fresh.codes[:, :, :23])
        torch.testing.assert_close(layer.int8.slacks[:, :, :23], fresh.slacks[:, :, :23])


@here
def test_two_tiers_keep_the_same(monkeypatch):
    """A padded batch in the patched model: what is kept is identical, and the copy was used for it."""
    model = small_llama()
    steer(model, SPARSE["Top-theta"])
    ids = tokens(batch=2, length=23).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    monkeypatch.setattr(kernels, "FORCED", "triton")
    copies = []
    spy(monkeypatch, lambda call: copies.append(call.int8))
    got = {}
    for kind, make in CACHES.items():
        copies.clear()
        recorder = Recorder()
        record_statistics(model, recorder)
        cache, logits = make(model.config), []
        for start, end in ((0, 20), (20, 21), (21, 22), (22, 23)):
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            logits.append(model(ids[:, start:end], past_key_values=cache, **given).logits[:, -1])
        record_statistics(model, None)
        _, decode = recorder.drain()
        got[kind] = torch.cat(logits), [record for steps in decode.values() for record in steps]
        assert [copy is not None for copy in copies] == [kind == "two tiers"] * 2 * 4
    for kind in ("with sum", "two tiers"):
        torch.testing.assert_close(got[kind][0], got["static"][0], rtol=2e-3, atol=2e-3)
        for ours, theirs in zip(got[kind][1], got["static"][1]):
            assert (ours.attn == theirs.attn).all() and (ours.vrow == theirs.vrow).all()
