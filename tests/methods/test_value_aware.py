"""Value-aware thresholds: the factor of a key against slow loops, behind a cache, in files; what is
refused."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from tests.helpers.calls import call
from tests.helpers.kernel_cases import SCALE, case, inputs
from tests.helpers.models import tokens
from topk_llama import TopThetaCache, set_params, update_model
from toptheta.attention.reference import sparse_attention
from toptheta.calibration.tables import save_tables
from toptheta.methods.base import Block, RowTables, ValueNorms, parse_method
from toptheta.methods.params import LayerSpec
from toptheta.methods.state import State
from toptheta.methods.top_theta import TopTheta
from toptheta.models.control import tables_of
from toptheta.models.patch import dense_for
from toptheta.util.errors import UsageError

AWARE = {
    "method": "top_theta:value_aware",
    "placement": "post-softmax",
    "vmc": True,
    "calib_to": "budget",
    "calib_sample_frac": 1.0,
    "K": 6,
}


def calibrated(model: LlamaForCausalLM, **params) -> LlamaForCausalLM:
    update_model(model)
    set_params(model, **(AWARE | params), calibrate=True)
    for seed in range(3):
        model(tokens(length=60, seed=seed))
    set_params(model, calibrate=False)
    return model


def slow_factor(v: torch.Tensor, w_o: torch.Tensor, mean: torch.Tensor, scale: float) -> float:
    """Norm of what a value adds to the output beyond the mean value, relative to the head's usual norm."""
    return float((w_o.double() @ (v.double() - mean.double())).norm() / scale)


@pytest.mark.parametrize("kind", ["prefill", "chunk", "left padding", "padded decode", "any mask"])
@pytest.mark.parametrize(("floor", "cap"), [(1, 0), (4, 0), (1, 9), (4, 9)])
def test_against_loops(kind: str, floor: int, cap: int, monkeypatch) -> None:
    torch.manual_seed(0)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = inputs(batch, (4, 2, 16), q_len, kv_len)
    w_o, mean, scale = torch.randn(4, 20, 16), torch.randn(2, 16), torch.rand(4) + 1.0
    values = ValueNorms(w_o.transpose(1, 2) @ w_o, mean, scale)
    theta = torch.full((4, 14), 0.02)
    theta[:, :13] = float("-inf")
    spec = LayerSpec(TopTheta(value_aware=True, floor=floor, cap=cap), "post-softmax", 12)
    asked = call(q, k, v, rows, spec, SCALE, theta, count=True, count_rows=True)
    asked.values, asked.state = values, State()
    monkeypatch.setattr("toptheta.attention.reference.BLOCK_ELEMENTS", {"cpu": 20_000})  # several blocks
    _, counts = sparse_attention(asked)
    end = rows.end(q_len, kv_len)
    seen = rows.visible(0, q_len, kv_len)
    seen = torch.ones(1, 1, q_len, end, dtype=torch.bool) if seen is None else seen
    for b in range(batch):
        for i in range(0, q_len, 7):
            keys = seen[b if seen.shape[0] > 1 else 0, 0, i].nonzero()[:, 0].tolist()
            real = rows.real is None or bool(rows.real[b if rows.real.shape[0] > 1 else 0, i])
            for head in range(4):
                group = head // 2
                weights = (k[b, group, keys].double() @ q[b, head, i].double() * SCALE).softmax(dim=0)
                kept = len(keys)
                if len(keys) > 12:
                    compared = [
                        float(weight)
                        * slow_factor(v[b, group, key], w_o[head], mean[group], float(scale[head]))
                        for weight, key in zip(weights, keys)
                    ]
                    kept = min(cap or len(keys), max(floor, sum(x > 0.02 for x in compared)))
                assert counts.row[b, head, i] == (kept if real else 0), (b, i, head)


@pytest.mark.parametrize("kind", ["dynamic", "static", "top-theta"])
def test_behind_a_cache(kind: str, tiny_model: LlamaForCausalLM) -> None:
    """In chunks and single steps, the logits are those of the whole; a repeated prompt likewise."""
    model = calibrated(tiny_model)
    ids = tokens(length=40)
    whole = model(ids).logits
    static = StaticCache if kind == "static" else TopThetaCache
    cache = DynamicCache(config=model.config) if kind == "dynamic" else static(model.config, 50)
    parts = [
        model(ids[:, :15], past_key_values=cache).logits,
        model(ids[:, 15:33], past_key_values=cache).logits,
    ]
    parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(33, 40)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    if kind == "top-theta":
        layer = cache.layers[0]
        weighed = layer.weighing.of(layer.values)[:, :, :40]
        torch.testing.assert_close(layer.factor[:, :, :40], weighed, rtol=1e-4, atol=1e-5)
        assert not layer.factor[:, :, 40:].any()
    if kind == "dynamic":
        assert cache.layers[0].method_state.tensors["factor"].shape == (1, 6, 40)
        cache.batch_repeat_interleave(2)
        again = model(ids[:, :1].expand(2, 1), past_key_values=cache).logits
        torch.testing.assert_close(again[0], again[1])


def test_another_method_was_at_work_before(tiny_model: LlamaForCausalLM) -> None:
    model = calibrated(tiny_model)
    tables, ids = tables_of(model), tokens(length=40)
    cache = DynamicCache(config=model.config)
    set_params(model, mode=3)
    model(ids[:, :30], past_key_values=cache)
    set_params(model, **AWARE)
    assert tables_of(model) is tables
    model(ids[:, 30:31], past_key_values=cache)
    factor = cache.layers[1].method_state.tensors["factor"]
    assert factor.shape == (1, 6, 31) and (factor > 0).all()


@pytest.mark.parametrize("crop", [0, -31])
def test_keys_that_came_while_the_layer_was_dense(tiny_model: LlamaForCausalLM, crop: int) -> None:
    """They are weighed with the next sparse step, also if they came behind a cropped cache."""
    model = calibrated(tiny_model)
    turns = [tokens(length=40, seed=5), tokens(length=1, seed=6), tokens(length=40, seed=7)]

    def replied(forget: bool) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        for i, ids in enumerate([*turns, tokens(length=30, seed=8)]):
            with dense_for(model) if i in (0, 2) or crop and i == 3 else nullcontext():
                model(ids, past_key_values=cache)
            if crop and i == 2:
                cache.crop(crop)
        for layer in cache.layers if forget else ():
            layer.method_state.tensors.pop("factor")
        return model(tokens(length=1, seed=9), past_key_values=cache).logits

    torch.testing.assert_close(replied(False), replied(True), rtol=1e-5, atol=1e-6)


def test_the_caches_factors_after_another_method(tiny_model: LlamaForCausalLM) -> None:
    """Rows that came while nothing weighed them are weighed later; a reset cache starts anew."""
    model = calibrated(tiny_model)
    ids, cache = tokens(length=40), TopThetaCache(model.config, 50)
    model(ids[:, :20], past_key_values=cache)
    with dense_for(model):
        model(ids[:, 20:30], past_key_values=cache)
    model(ids[:, 30:31], past_key_values=cache)
    layer = cache.layers[1]
    expected = layer.weighing.of(layer.values)[:, :, :31]
    torch.testing.assert_close(layer.factor[:, :, :31], expected, rtol=1e-4, atol=1e-5)
    cache.reset()
    model(ids[:, :9], past_key_values=cache)
    assert (layer.factor[:, :, :9] > 0).all() and not layer.factor[:, :, 9:].any()


def test_another_calibration_behind_a_cache(tiny_model: LlamaForCausalLM) -> None:
    """Keys that came before it are weighed as by it."""
    ids, found = tokens(length=40), []
    model = calibrated(tiny_model)
    cache = DynamicCache(config=model.config)
    model(ids[:, :30], past_key_values=cache)
    set_params(model, **AWARE, calibrate=True)
    for seed in range(7, 9):
        model(tokens(length=60, seed=seed))
    set_params(model, calibrate=False)
    for one in (cache, None):
        if one is None:
            with dense_for(model):  # so that K and V are those of the other cache
                one = DynamicCache(config=model.config)
                model(ids[:, :30], past_key_values=one)
        first = one.layers[0]
        model(ids[:, 30:31], past_key_values=one)
        found.append(first.method_state.tensors["factor"])
    torch.testing.assert_close(found[1], found[0])


def test_files(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    model = calibrated(tiny_model)
    ids = tokens(length=50, seed=4)
    expected = model(ids).logits
    tables = tables_of(model)
    assert all(
        values.mean.shape == (2, 16) and values.scale.shape == (6,) for values in tables.values.values()
    )
    save_tables(tables, tmp_path)
    set_params(model, mode=3)
    set_params(model, **AWARE, calib_load_path=str(tmp_path))
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(UsageError, match="were calibrated with value_aware"):
        set_params(model, method="top_theta", K=6)
    (tmp_path / "calibration.safetensors").unlink()
    set_params(model, mode=3)
    with pytest.raises(UsageError, match="value_aware needs thresholds that were calibrated with it"):
        set_params(model, **AWARE, calib_load_path=str(tmp_path))


def test_scale_is_the_mean_norm(tiny_model: LlamaForCausalLM) -> None:
    """Over the first prompt the factors of a head have mean 1."""
    model = calibrated(tiny_model)
    cache = DynamicCache(config=model.config)
    model(tokens(length=60, seed=0), past_key_values=cache)
    # The first layer sees the same values as while calibrating: nothing sparse lies before it.
    factor = cache.layers[0].method_state.tensors["factor"]
    np.testing.assert_allclose(factor.mean(dim=2)[0].numpy(), np.ones(6), rtol=1e-4)


def test_the_unused_end_of_a_static_cache(tiny_model: LlamaForCausalLM) -> None:
    """Its zeros, and padding, are not in the mean of V."""
    update_model(tiny_model)
    ids, found = tokens(length=60), []
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    for capacity in (60, 100):
        set_params(tiny_model, **AWARE, calibrate=True)
        cache = StaticCache(config=tiny_model.config, max_cache_len=capacity)
        tiny_model(ids, attention_mask=mask, past_key_values=cache)
        set_params(tiny_model, calibrate=False)
        found.append(tables_of(tiny_model).values[0])
        set_params(tiny_model, mode=3)
    for part in ("mean", "scale"):
        np.testing.assert_allclose(getattr(found[1], part), getattr(found[0], part), rtol=1e-5, atol=1e-7)
    set_params(tiny_model, **AWARE, calibrate=True)
    tiny_model(ids, attention_mask=mask)
    set_params(tiny_model, calibrate=False)
    np.testing.assert_allclose(tables_of(tiny_model).values[0].mean, found[0].mean, rtol=1e-5, atol=1e-7)


def test_by_layer(tiny_model: LlamaForCausalLM) -> None:
    model = calibrated(tiny_model, calib_layers="sensitivity")
    assert model(tokens(length=50)).logits.isfinite().all()


def test_needs_a_budget(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    with pytest.raises(UsageError, match="value_aware needs one threshold on weights.*add calib_to budget"):
        set_params(tiny_model, **(AWARE | {"calib_to": "k"}), calibrate=True)


@pytest.mark.parametrize("kind", ["prefill", "left padding", "padded decode", "any mask"])
def test_running_weights_against_loops(kind: str) -> None:
    """A key's weight among the keys up to itself: a sum of exps that grows from the left."""
    torch.manual_seed(0)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = inputs(batch, (4, 2, 16), q_len, kv_len)
    theta = torch.full((4, 14), 0.02)
    theta[:, :13] = float("-inf")
    kept = {}
    for running in (False, True):
        spec = LayerSpec(TopTheta(running=running), "post-softmax", 12)
        _, counts = sparse_attention(call(q, k, v, rows, spec, SCALE, theta, count=True, count_rows=True))
        kept[running] = counts.row
    seen = rows.visible(0, q_len, kv_len)
    end = rows.end(q_len, kv_len)
    seen = torch.ones(1, 1, q_len, end, dtype=torch.bool) if seen is None else seen
    for b in range(batch):
        for i in range(0, q_len, 7):
            keys = seen[b if seen.shape[0] > 1 else 0, 0, i].nonzero()[:, 0].tolist()
            if rows.real is not None and not rows.real[b if rows.real.shape[0] > 1 else 0, i]:
                continue
            for head in range(4):
                found, total = 0, 0.0
                for key in keys:
                    exp = float((k[b, head // 2, key].double() @ q[b, head, i].double() * SCALE).exp())
                    total += exp
                    found += exp / total > 0.02
                assert kept[True][b, head, i] == (found if len(keys) > 12 else len(keys)), (b, i, head)
    assert (kept[True] >= kept[False]).all() and (kept[True] > kept[False]).any()


def test_running_weights_are_refused_for_scores_and_copies(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    with pytest.raises(UsageError, match="running=True compares weights: add placement post-softmax"):
        set_params(tiny_model, method="top_theta:running", K=6, calibrate=True)
    with pytest.raises(UsageError, match="running cannot be combined with .*key_copy: leave one out"):
        parse_method("top_theta:running,key_copy=int4", "--method")


def test_a_floor_and_a_cap() -> None:
    """Of a row that nothing passes, its largest are kept; of one that more pass, what passes, or the largest
    of that."""
    weights = torch.tensor([[[[0.05, 0.3, 0.2, 0.1, 0.35], [0.1, 0.6, 0.1, 0.1, 0.1]]]])
    block = Block(
        x=weights,
        row_max=weights.amax(dim=-1, keepdim=True),
        n=torch.tensor([[5, 5]]),
        real=None,
        start=0,
        budget=2,
    )
    for floor, kept in ((1, [[1, 2, 4], [1]]), (2, [[1, 2, 4], None])):
        keep = TopTheta(floor=floor).keep(block, RowTables(theta=torch.full((1, 1, 2, 1), 0.15)))
        for row, expected in zip(keep[0, 0], kept):
            found = row.nonzero()[:, 0].tolist()
            assert found == expected if expected else (len(found) == floor and 1 in found)
    for cap, expected in ((3, [1, 2, 4]), (2, [1, 4]), (1, [4])):
        keep = TopTheta(cap=cap).keep(block, RowTables(theta=torch.full((1, 1, 2, 1), 0.15)))
        assert keep[0, 0, 0].nonzero()[:, 0].tolist() == expected and keep[0, 0, 1].sum() == 1
    assert TopTheta(floor=2).kernel_spec() is None and TopTheta(floor=2).label(8) == "Top-theta floor=2 K=8"
    assert TopTheta(cap=2).kernel_spec() is None and TopTheta(cap=2).label(8) == "Top-theta cap=2 K=8"
    with pytest.raises(UsageError, match="--method top_theta:floor is 0: give a whole number of at least 1"):
        parse_method("top_theta:floor=0", "--method")
    for cap in (-1, 3):
        words = f"--method top_theta:cap is {cap}, less than the 4 keys that rows keep: raise it"
        with pytest.raises(UsageError, match=words):
            parse_method(f"top_theta:floor=4,cap={cap}", "--method")
