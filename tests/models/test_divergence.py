"""A text read by a method and by dense attention: divergences against sums by hand, and the dense part."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from tests.helpers.models import SPARSE, steer, tokens
from toptheta.models import divergence
from toptheta.models.control import get_params, record_statistics, set_params
from toptheta.models.divergence import against_dense
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
        recorder = Recorder(6)
        record_statistics(tiny_model, recorder)
        against_dense(tiny_model, tokens(), 30, 4)
        prefill, decode = recorder.drain()
        full = sum(range(31, 41))
        assert not decode
        for record in prefill.values():
            assert (record.full == full).all()
            assert (record.attn == (60 if method["mode"] == 1 else full)).all()


def test_dense_for_leaves_no_trace(tiny_model: LlamaForCausalLM) -> None:
    """Also after an error, and while the model is being calibrated."""
    steer(tiny_model, SPARSE["Top-theta offline"])
    recorder = Recorder(6)
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
