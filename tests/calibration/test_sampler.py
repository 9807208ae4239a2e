"""Calibration samples against plain loops: thresholds, missing denominators, drawn rows, resuming."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers.calibration import calibrated, prompts
from topk_llama import set_params, update_model
from toptheta.calibration.draw import draw_rows, sample_count
from toptheta.calibration.statistics import RunningSums
from toptheta.models.calibrate import begin_calibration, calibrated_tables
from toptheta.models.control import get_params
from toptheta.models.patch import layer_states
from toptheta.util.errors import UsageError

pytestmark = pytest.mark.usefixtures("path")


def first_layer_scores(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """`[H, Q, Q]` scores of layer 0 by hand, -inf above the diagonal."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))
    shape = (1, ids.shape[1], -1, layer.self_attn.head_dim)
    q = layer.self_attn.q_proj(hidden).view(shape).transpose(1, 2)
    k = layer.self_attn.k_proj(hidden).view(shape).transpose(1, 2)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    scores = q[0] @ k[0].repeat_interleave(3, dim=0).transpose(1, 2) * layer.self_attn.scaling
    return scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), float("-inf"))


@pytest.mark.parametrize("placement", ["pre-softmax", "post-softmax"])
def test_samples_of_the_first_layer(placement: str, tiny_model: LlamaForCausalLM) -> None:
    """theta = mean + sigma * population standard deviation of the (K+1)-th largest; SDC: mean of what is
    dropped."""
    k, sigma = 6, 0.3
    samples: dict[tuple[int, int], list[float]] = {}
    for ids in prompts():
        scores = first_layer_scores(tiny_model, ids)
        compared = scores if placement == "pre-softmax" else scores.softmax(dim=-1)
        for head in range(6):
            for row in range(k, ids.shape[1]):
                ranked = sorted(compared[head, row, : row + 1].tolist(), reverse=True)
                samples.setdefault((head, row + 1), []).append(ranked[k])
    update_model(tiny_model)
    set_params(
        tiny_model,
        mode=0,
        K=k,
        placement=placement,
        calibrate=True,
        calib_sample_frac=1.0,
        calib_add_sigma=sigma,
    )
    for ids in prompts():
        tiny_model(ids)
    tables = calibrated_tables(tiny_model)
    theta = tables.theta[0]
    for (head, n), values in samples.items():
        expected = np.mean(values) + (sigma * np.std(values) if len(values) > 1 else 0.0)
        assert theta.values[head, n] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert theta.samples[head, n] == len(values)
    assert np.isnan(theta.values[:, : k + 1]).all()


@pytest.mark.parametrize("mode", [0, 1])
def test_sdc_samples(mode: int, tiny_model: LlamaForCausalLM) -> None:
    """R of a row: exp(s - m) summed over what the thresholds so far (this prompt's included), or Top-k, would
    drop."""
    k = 6
    thresholds: dict[tuple[int, int], list[float]] = {}
    missing: dict[tuple[int, int], list[float]] = {}
    for ids in prompts():
        scores = first_layer_scores(tiny_model, ids)
        for head in range(6):
            for row in range(k, ids.shape[1]):
                values = scores[head, row, : row + 1].tolist()
                ranked = sorted(values, reverse=True)
                seen = thresholds.setdefault((head, row + 1), [])
                seen.append(ranked[k])
                theta = np.mean(seen) if mode == 0 else ranked[k]
                dropped = [v for v in values if v <= theta]
                if len(dropped) == len(values):  # never an empty row
                    dropped.remove(ranked[0])
                missing.setdefault((head, row + 1), []).append(sum(math.exp(v - ranked[0]) for v in dropped))
    update_model(tiny_model)
    set_params(tiny_model, mode=mode, K=k, sdc="offline-calibrated", calibrate=True, calib_sample_frac=1.0)
    for ids in prompts():
        tiny_model(ids)
    sdc = calibrated_tables(tiny_model).sdc[0]
    errors = [abs(sdc.values[head, n] / np.mean(v) - 1) for (head, n), v in missing.items()]
    assert np.median(errors) < 1e-4
    assert np.quantile(errors, 0.98) < 1e-2  # a score within rounding of theta may fall on either side
    assert all(sdc.samples[head, n] == len(v) for (head, n), v in missing.items())


def test_several_k_in_one_pass(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    separate = {}
    for k in (4, 9):
        set_params(tiny_model, mode=0, K=k, sdc="offline-calibrated", calibrate=True, calib_sample_frac=1.0)
        for ids in prompts():
            tiny_model(ids)
        separate[k] = calibrated_tables(tiny_model)
    set_params(tiny_model, calibrate=False)
    begin_calibration(tiny_model, get_params(tiny_model), [(4, 4, 4)])
    for ids in prompts():
        tiny_model(ids)
    for k in (4, 9):
        joint = calibrated_tables(tiny_model, (k, k, k))
        assert joint.k == {0: k, 1: k, 2: k}
        for layer in range(3):
            np.testing.assert_allclose(joint.theta[layer].values, separate[k].theta[layer].values, rtol=1e-6)
            np.testing.assert_allclose(joint.sdc[layer].values, separate[k].sdc[layer].values, rtol=1e-5)


def test_padding_and_batches_change_nothing(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    set_params(tiny_model, mode=0, K=5, calibrate=True, calib_sample_frac=1.0)
    for ids in prompts(2):
        tiny_model(ids)
    alone = calibrated_tables(tiny_model)
    set_params(tiny_model, mode=0, K=5, calibrate=True, calib_sample_frac=1.0)
    a, b = prompts(2)
    batch = torch.cat([torch.cat([a, torch.zeros(1, 3, dtype=torch.long)], dim=1), b])
    mask = torch.ones_like(batch)
    mask[0, 30:] = 0
    tiny_model(batch, attention_mask=mask)
    together = calibrated_tables(tiny_model)
    for layer in range(3):
        assert (together.theta[layer].samples == alone.theta[layer].samples).all()
        np.testing.assert_allclose(
            together.theta[layer].values, alone.theta[layer].values, rtol=1e-3, atol=1e-4, equal_nan=True
        )


def test_sampled_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    eligible = torch.ones(3, 50, dtype=torch.bool)
    eligible[:, :10] = False
    eligible[2] = False
    chosen = draw_rows(eligible, torch.zeros(3, 50, dtype=torch.long), 0.3, generator)
    assert chosen.sum(dim=1).tolist() == [sample_count(40, 0.3), 12, 0]
    assert not (chosen & ~eligible).any()
    # Lengths seen least come first: with odd rows seen very often, nearly all drawn are even.
    seen = torch.zeros(1, 50, dtype=torch.long)
    seen[0, 1::2] = 10**6
    drawn = torch.zeros(50)
    for _ in range(200):
        drawn += draw_rows(eligible[:1], seen, 0.25, generator)[0]
    assert drawn[::2].sum() > 0.99 * drawn.sum()
    again = draw_rows(eligible, torch.zeros(3, 50, dtype=torch.long), 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(
        again, draw_rows(eligible, torch.zeros(3, 50).long(), 0.3, torch.Generator().manual_seed(0))
    )


def test_sample_fraction_in_prefill_and_decode(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    set_params(tiny_model, mode=0, K=5, calibrate=True, calib_sample_frac=0.25)
    ids = prompts(1, length=45)[0]
    out = tiny_model(ids, use_cache=True)
    assert calibrated_tables(tiny_model).theta[0].samples[0].sum() == 10  # a quarter of 40 eligible rows
    for _ in range(200):
        cache = out.past_key_values
        tiny_model(ids[:, :1], past_key_values=cache)
    decoded = calibrated_tables(tiny_model).theta[0].samples[0, 46:].sum()
    assert 25 <= decoded <= 75  # 200 rows with probability 1/4: 50, give or take four standard deviations


def test_running_sums_need_no_list() -> None:
    sums = RunningSums(2, torch.device("cpu"))
    sums.reserve(20)
    values = torch.randn(100, 2, 15)
    n = torch.arange(6, 21)[None]
    for sample in values:
        sums.add(sample[None], n, torch.ones_like(n, dtype=torch.bool))
    assert sums.total.shape == (2, 21)
    expected = values.mean(0) + 0.5 * values.std(0, correction=0)
    torch.testing.assert_close(sums.threshold(0.5)[:, 6:].float(), expected, rtol=1e-5, atol=1e-6)
    assert sums.threshold(0.5)[:, :6].isnan().all()


def test_one_sample_has_no_spread() -> None:
    sums = RunningSums(1, torch.device("cpu"))
    sums.reserve(3)
    sums.add(torch.full((1, 1, 1), 0.1), torch.tensor([[3]]), torch.tensor([[True]]))
    assert sums.threshold(1000.0)[0, 3].item() == pytest.approx(0.1, abs=1e-7)


def test_k_above_every_prompt(tiny_model: LlamaForCausalLM) -> None:
    calibrated(tiny_model, K=50)
    with pytest.raises(UsageError, match="no row longer than K=50 in layer 0: .* at most 39 tokens"):
        calibrated_tables(tiny_model)
    with pytest.raises(UsageError, match="no row longer than K=50"):
        set_params(tiny_model, calibrate=False)
    set_params(tiny_model, mode=3, calibrate=False)  # needs no tables


def test_a_resumed_calibration_ends_the_same(tiny_model: LlamaForCausalLM) -> None:
    calibrated(tiny_model, calib_sample_frac=0.3, calib_tac=True)
    straight = calibrated_tables(tiny_model)
    set_params(tiny_model, mode=0, K=6, calib_sample_frac=0.3, calib_tac=True, calibrate=True)
    for ids in prompts()[:2]:
        tiny_model(ids)
    states = [layer.calibration.state() for layer in layer_states(tiny_model)]
    set_params(tiny_model, mode=0, K=6, calib_sample_frac=0.3, calib_tac=True, calibrate=True)
    for layer, state in zip(layer_states(tiny_model), states):
        layer.calibration.load_state(state)
    for ids in prompts()[2:]:
        tiny_model(ids)
    resumed = calibrated_tables(tiny_model)
    for layer in range(3):
        np.testing.assert_array_equal(resumed.theta[layer].values, straight.theta[layer].values)


def test_calibration_leaves_no_trace_in_dense_output(tiny_model: LlamaForCausalLM) -> None:
    """Without tac a calibrating model computes dense; with it, Top-k."""
    ids = prompts(1)[0]
    dense = tiny_model(ids).logits
    update_model(tiny_model)
    set_params(tiny_model, mode=0, K=6, calibrate=True)
    torch.testing.assert_close(tiny_model(ids).logits, dense, rtol=1e-4, atol=1e-4)
    set_params(tiny_model, mode=0, K=6, calibrate=True, calib_tac=True)
    tac = tiny_model(ids).logits
    set_params(tiny_model, mode=1, K=6, calib_tac=False, calibrate=False, sdc="none")
    torch.testing.assert_close(tiny_model(ids).logits, tac, rtol=1e-4, atol=1e-4)
