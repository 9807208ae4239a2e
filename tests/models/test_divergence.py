"""A text read by a method and by dense attention: divergences against sums by hand, and the dense part."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from tests.helpers.families import make
from tests.helpers.models import SPARSE, steer, tokens
from toptheta.models import divergence
from toptheta.models.control import get_params, record_statistics, set_params
from toptheta.models.divergence import against_dense, read_dense
from toptheta.models.kl import kl_divergence
from toptheta.models.patch import dense_for, layer_states, update_model
from toptheta.models.recorder import Recorder


def log_probs(model: Any, ids: Tensor, decode_from: int) -> Tensor:
    """`[B, Q - decode_from, V]` float64 of the rows from `decode_from` on, the rows before them dense."""
    cache = DynamicCache(config=model.config)
    if decode_from:
        with dense_for(model):
            model(ids[:, :decode_from], past_key_values=cache, use_cache=True)
    logits = model(ids[:, decode_from:], past_key_values=cache, use_cache=True).logits
    return logits.double().log_softmax(dim=-1)


@pytest.mark.parametrize("params", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("decode_from", [0, 1, 20, 38])
def test_sums_by_hand(
    tiny_model: LlamaForCausalLM, params: dict, decode_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of every token, whole and in chunks, a last chunk of one row included."""
    monkeypatch.setattr(divergence, "COMPARED_ROWS", 7)
    steer(tiny_model, params)
    ids = tokens(batch=2, length=40)
    sparse = log_probs(tiny_model, ids, decode_from)[:, :-1]
    with dense_for(tiny_model):
        dense = log_probs(tiny_model, ids, 0)[:, decode_from:-1]
    wanted = ids[:, decode_from + 1 :, None]
    kl = (dense.exp() * (dense - sparse)).sum(dim=-1)
    assert decode_from or kl.max() > 0.01
    for chunk in (None, 13, 39, 40):
        found = against_dense(tiny_model, ids, decode_from, chunk)
        for got, expected in (
            (found.nll, -sparse.gather(-1, wanted)[..., 0]),
            (found.dense_nll, -dense.gather(-1, wanted)[..., 0]),
            (found.kl, kl),
        ):
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-5)
        assert torch.equal(found.same_top, dense.argmax(dim=-1) == sparse.argmax(dim=-1))


def test_a_dense_model_is_itself(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    found = against_dense(tiny_model, tokens(), 20, 8)
    assert found.kl.shape == (1, 19) and not found.kl.any() and found.same_top.all()
    assert torch.equal(found.nll, found.dense_nll)


def test_only_later_rows_count(tiny_model: LlamaForCausalLM) -> None:
    """Top-k keeps K elements in each of the rows that are counted, and in no others."""
    update_model(tiny_model)
    for method in ({"mode": 1, "K": 6}, {"mode": 3}):
        set_params(tiny_model, **method)
        recorder = Recorder()
        record_statistics(tiny_model, recorder)
        against_dense(tiny_model, tokens(), 30, 4)
        prefill, decode = recorder.drain()
        assert not prefill and len(decode) == 3
        for steps in decode.values():
            assert [step.n.tolist() for step in steps] == [[n] for n in range(31, 41)]
            for step in steps:
                assert (step.attn == (6 if method["mode"] == 1 else step.n)).all()


METHODS = [
    {"mode": 1, "K": 6, "vmc": True, "sdc": "exact"},
    {"method": "streaming_llm:sinks=2", "K": 6},
    {"method": "skip_softmax:decode=0.3,tile=4"},
    {"method": "skip_softmax:share=0.5,decode_a=2.0,decode_b=3.0,prefill_a=1.0,tile=4"},
    {"method": "top_p:p=0.5", "placement": "post-softmax"},
    {"method": "quest:page=4,dense_layers=0", "K": 12},
    {"method": "h2o", "K": 8},
    {"method": "tova", "K": 8},
    {"method": "snapkv:window=4", "K": 8},
    {"method": "top_theta:key_copy=int4", "K": 8},
]


@pytest.mark.parametrize("params", METHODS, ids=lambda params: params.get("method", "top_k"))
def test_rows_behind_a_prompt_are_decode_steps(tiny_model: LlamaForCausalLM, params: dict) -> None:
    """The same predictions and counts as when the text is decoded token by token, in one call or in many."""
    steer(tiny_model, params)
    ids = tokens(batch=2, length=40)
    recorder = Recorder()
    cache = DynamicCache(config=tiny_model.config)
    tiny_model(ids[:, :30], past_key_values=cache)
    record_statistics(tiny_model, recorder)
    if not get_params(tiny_model).method.needs_prompt:  # the prompt is dense here, whatever the method
        with dense_for(tiny_model):
            cache = DynamicCache(config=tiny_model.config)
            tiny_model(ids[:, :30], past_key_values=cache)
    logits = [tiny_model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
    expected = torch.cat(logits, dim=1)[:, :-1].log_softmax(dim=-1)
    _, one_by_one = recorder.drain()
    for chunk in (None, 3):
        found = against_dense(tiny_model, ids, 30, chunk)
        wanted = expected.gather(-1, ids[:, 31:, None])[..., 0]
        torch.testing.assert_close(found.nll, -wanted, rtol=1e-4, atol=1e-5)
        prefill, decode = recorder.drain()
        assert not prefill and found.kl.max() > 1e-3
        for layer, steps in decode.items():
            assert len(steps) == 10
            for step, before in zip(steps, one_by_one[layer], strict=True):
                for name in ("attn", "vrow", "full", "topk", "n", "kv_read", "kv_dense"):
                    assert (getattr(step, name) == getattr(before, name)).all(), name


@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("h2o", 30 + 10, 10),
        ("h2o:prefill=causal", 40, 40),
        ("tova", 1 + 10, 1 + 10),
        ("snapkv:window=4", 4 + 10, 4 + 10),
        ("top_k", 10, 10),
    ],
)
def test_what_is_read_of_a_prompt(
    tiny_model: LlamaForCausalLM, method: str, first: int, second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a dense reading only the rows that the method has to see, once for all K where K does not matter;
    and the predictions are those of the whole prompt."""
    update_model(tiny_model)
    ids, read = tokens(batch=2, length=40), list[int]()
    dense = read_dense(tiny_model, ids, 30, None)
    dense = replace(dense, room=dense.nbytes)
    step = divergence.hidden_states

    def counting(model: Any, input_ids: Tensor, *rest: Any) -> Any:
        read.append(input_ids.shape[1])
        return step(model, input_ids, *rest)

    monkeypatch.setattr(divergence, "hidden_states", counting)
    for k, expected in ((8, first), (6, second), (8, second)):
        set_params(tiny_model, method=method, K=k)
        read.clear()
        found = against_dense(tiny_model, ids, 30, None, dense)
        assert sum(read) == expected
        alone = against_dense(tiny_model, ids, 30, 7)
        torch.testing.assert_close(found.nll, alone.nll, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.kl, alone.kl, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["tova", "snapkv:window=4", "h2o"])
def test_prompts_behind_a_window_are_read_again(method: str) -> None:
    """A layer with a window, left dense here, cannot forget the last rows of a prompt."""
    model = update_model(make("qwen2"))
    ids = tokens(batch=2, length=40)
    set_params(model, method=method, K={0: 0, 1: 8})
    dense = read_dense(model, ids, 30, None)
    found = against_dense(model, ids, 30, None, replace(dense, room=dense.nbytes))
    assert found.kl.max() > 1e-3
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :30], past_key_values=cache)
        logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
    expected = torch.cat(logits, dim=1)[:, :-1].log_softmax(dim=-1).gather(-1, ids[:, 31:, None])[..., 0]
    torch.testing.assert_close(found.nll, -expected, rtol=1e-4, atol=1e-5)


def test_a_judge_of_another_type(tiny_model: LlamaForCausalLM) -> None:
    """Dense attention in bfloat16 is not 0 away from itself in float32; what was read before is not read
    again."""
    judge = update_model(copy.deepcopy(tiny_model))
    model = update_model(tiny_model).to(torch.bfloat16)
    ids = tokens(length=40)
    dense = read_dense(judge, ids, 20, None)
    found = against_dense(model, ids, 20, None, dense, judge)
    with torch.no_grad():
        p, q = (m(ids).logits[:, 20:-1].float().log_softmax(dim=-1) for m in (judge, model))
    assert 0.0 < found.kl.mean() < 0.1
    torch.testing.assert_close(found.kl.mean(), (p.exp() * (p - q)).sum(dim=-1).mean(), rtol=0.1, atol=0.0)
    again = against_dense(model, ids, 20, None, None, judge)
    torch.testing.assert_close(again.kl, found.kl)


def test_dense_for_leaves_no_trace(tiny_model: LlamaForCausalLM) -> None:
    """Also after an error, and while the model is being calibrated."""
    steer(tiny_model, SPARSE["Top-theta offline"])
    recorder = Recorder()
    record_statistics(tiny_model, recorder)
    ids, names = tokens(), ("spec", "calibration", "theta", "sdc_table", "recorder")

    def state() -> list[Any]:
        values = [getattr(layer, name) for layer in layer_states(tiny_model) for name in names]
        return [*values, get_params(tiny_model), tiny_model.config._attn_implementation]

    before, logits = state(), tiny_model(ids).logits
    with pytest.raises(KeyError), dense_for(tiny_model):
        assert tiny_model.config._attn_implementation == "sdpa"
        raise KeyError
    assert all(one is two or one == two for one, two in zip(before, state()))
    assert torch.equal(tiny_model(ids).logits, logits)
    recorder.drain()
    set_params(tiny_model, calibrate=True)
    before = state()
    with dense_for(tiny_model):
        tiny_model(ids)
    assert all(one is two or one == two for one, two in zip(before, state()))


def test_divergence_of_close_and_far_ones() -> None:
    """Right to a few digits from 1e-11 to tens of nats, and never below 0."""
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 4, size=(50, 3000))
    for distance in (1e-5, 1e-3, 0.1, 3.0, 30.0):
        other = logits + distance * draw.normal(size=logits.shape)
        p, q = (torch.tensor(x).log_softmax(dim=-1) for x in (logits, other))
        exact = (p.exp() * (p - q)).sum(dim=-1)
        got = kl_divergence(*(torch.tensor(x).float().log_softmax(dim=-1) for x in (logits, other)))
        assert (got >= 0).all()
        torch.testing.assert_close(got.double(), exact, rtol=0.05 if distance < 1e-4 else 1e-3, atol=1e-12)
