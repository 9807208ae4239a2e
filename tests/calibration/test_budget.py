"""One threshold on weights for a budget: histograms, the solved threshold, layers, files, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import toptheta.eval.tasks
from tests.helpers.models import tokens
from topk_llama import restore_model, set_params, update_model
from toptheta.calibration.budget import BINS, LOWEST, WIDTH, kept_above, share_out, solve_threshold
from toptheta.calibration.tables import load_tables, save_tables
from toptheta.methods.base import NEG_INF
from toptheta.methods.params import AttentionParams
from toptheta.models import calibrate
from toptheta.models.calibrate import begin_calibration, calibrated_tables, calibrations, use_tables
from toptheta.models.control import get_params, record_statistics, tables_of
from toptheta.models.patch import choose_implementation
from toptheta.models.recorder import Recorder
from toptheta.models.sensitivity import measure
from toptheta.util.errors import UsageError

BUDGET = {"mode": 0, "placement": "post-softmax", "vmc": True, "calib_to": "budget", "calib_sample_frac": 1.0}


def begin(model, k: int, more_k: tuple[int, ...] = (), **params) -> None:
    update_model(model)
    layers = model.config.num_hidden_layers
    wanted = get_params(model).changed(BUDGET | {"K": k, "calibrate": True} | params)
    begin_calibration(model, wanted, [(other,) * layers for other in more_k])


def kept_per_row(model, ids: torch.Tensor, k: int) -> float:
    """Mean of what rows longer than `k` keep, over layers, heads and rows."""
    recorder = Recorder()
    record_statistics(model, recorder)
    model(ids)
    prefill, _ = recorder.drain()
    record_statistics(model, None)
    dense = k * (k + 1) / 2  # rows up to K keep all they see
    return float(np.mean([record.attn[0] for record in prefill.values()]) - dense) / (ids.shape[1] - k)


def test_histograms_count_every_weight(tiny_model: LlamaForCausalLM) -> None:
    """Against the weights that stock eager attention returns, for two K at once."""
    stock = LlamaForCausalLM._from_config(tiny_model.config, attn_implementation="eager").eval()
    stock.load_state_dict(tiny_model.state_dict())
    ids = tokens(length=40)
    weights = stock(ids, output_attentions=True).attentions
    begin(tiny_model, 6, (15,))
    tiny_model(ids)
    for i, calibration in calibrations(tiny_model).items():
        for k in (6, 15):
            assert int(calibration.rows[k]) == 40 - k
            for theta in (0.5, 0.03, 1e-4):
                edge = round((np.log(theta) - LOWEST) / WIDTH)
                expected = sum(
                    int((weights[i][0, :, n - 1, :n].log() > LOWEST + edge * WIDTH).sum())
                    for n in range(k + 1, 41)
                )
                found = int(calibration.counts[k][:, edge:].sum())
                assert abs(found - expected) <= 2, (i, k, theta)  # on the edge of a bin
            assert int(calibration.counts[k].sum()) == 6 * sum(range(k + 1, 41))


def test_the_solved_threshold_keeps_k_on_its_samples(tiny_model: LlamaForCausalLM) -> None:
    begin(tiny_model, 4, (8, 20))
    prompts = [tokens(length=60, seed=seed) for seed in range(6)]
    for ids in prompts:
        tiny_model(ids)
    by_k = {k: calibrated_tables(tiny_model, (k,) * 3) for k in (4, 8, 20)}
    for k, tables in by_k.items():
        values = {float(np.nanmax(tables.theta[i].values)) for i in range(3)}
        assert len(values) == 1 and 0 < values.pop() < 1  # one number for the whole model
        use_tables(tiny_model, tables)
        set_params(tiny_model, K=k, calibrate=False)
        kept = np.mean([kept_per_row(tiny_model, ids, k) for ids in prompts])
        if k > 4:  # Layers behind sparse ones see other scores; with much kept the difference is small.
            assert kept == pytest.approx(k, rel=0.1)
    counts = np.zeros((2, BINS), dtype=np.int64)
    counts[:, ::7] = 5
    for k in (1, 10.5, 100):
        assert kept_above(counts, 3, solve_threshold(counts, 3, k)) == pytest.approx(k, rel=1e-6)
    with pytest.raises(ValueError, match="keys on average"):
        solve_threshold(counts, 3, 1e6)


def text_of(split: str, tokenizer, length: int, parts: int) -> list[torch.Tensor]:
    """Windows of the bundled questions, one after the other."""
    path = Path(toptheta.eval.tasks.__file__).parent / "everyday_science" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    text = "\n".join(json.dumps(row) for row in rows)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    return list(ids[:, : length * parts].split(length, dim=1))


def test_it_holds_on_other_text(small_model, small_tokenizer) -> None:
    """The small real model: K within 1% on its samples, within 10% on held-out text of the same kind."""
    k = 32
    begin(small_model, k, calib_sample_frac=0.25)
    for ids in text_of("train", small_tokenizer, 400, 4):
        small_model(ids)
    found = calibrations(small_model)
    tables = calibrated_tables(small_model)
    theta = float(np.nanmax(tables.theta[0].values))
    counts = np.stack([one.counts[k].numpy() for one in found.values()])
    assert kept_above(counts, int(found[0].rows[k]), np.log(theta)) == pytest.approx(k, rel=0.01)
    set_params(small_model, K=k, calibrate=False)
    kept = [kept_per_row(small_model, ids, k) for ids in text_of("test", small_tokenizer, 400, 3)]
    assert np.mean(kept) == pytest.approx(k, rel=0.1)
    restore_model(small_model)


@pytest.mark.parametrize("way", ["chunks", "batch", "left padding", "resumed"])
def test_however_the_prompts_come(way: str, tiny_model: LlamaForCausalLM) -> None:
    prompts = [tokens(length=40, seed=seed) for seed in range(2)]
    begin(tiny_model, 6)
    for ids in prompts:
        tiny_model(ids)
    whole = {i: (one.counts[6].clone(), int(one.rows[6])) for i, one in calibrations(tiny_model).items()}
    begin(tiny_model, 6)
    if way == "chunks":
        for ids in prompts:
            cache = DynamicCache(config=tiny_model.config)
            for chunk in ids.split(17, dim=1):
                tiny_model(chunk, past_key_values=cache)
    elif way == "batch":
        tiny_model(torch.cat(prompts))
    elif way == "left padding":
        mask = torch.ones(2, 45, dtype=torch.long)
        mask[:, :5] = 0
        padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.cat(prompts)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        tiny_model(padded, attention_mask=mask, position_ids=positions)
    else:
        tiny_model(prompts[0])
        states = {i: one.state() for i, one in calibrations(tiny_model).items()}
        begin(tiny_model, 6)
        for i, one in calibrations(tiny_model).items():
            one.load_state({name: value.clone() for name, value in states[i].items()})
        tiny_model(prompts[1])
    for i, one in calibrations(tiny_model).items():
        assert int(one.rows[6]) == whole[i][1]
        # Rounding moves a weight into the next bin now and then.
        moved = (one.counts[6].cumsum(dim=1) - whole[i][0].cumsum(dim=1)).abs().max()
        assert moved <= 3


def test_files_hold_the_same_threshold(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    begin(tiny_model, 6)
    tiny_model(tokens(length=60))
    set_params(tiny_model, calibrate=False)
    ids = tokens(length=50, seed=3)
    expected = tiny_model(ids).logits
    save_tables(tables_of(tiny_model), tmp_path)
    lines = (tmp_path / "th.txt").read_text().splitlines()
    assert len(lines) == 3 * 6 and len({line.split(" ", 1)[1] for line in lines}) == 1
    assert lines[0].startswith("L0_H0:7 ") and lines[0].endswith(" 54 6")
    set_params(tiny_model, mode=3)
    set_params(tiny_model, **BUDGET, K=6, calib_load_path=str(tmp_path))
    assert torch.equal(tiny_model(ids).logits, expected)
    with pytest.raises(UsageError, match="were calibrated with calib_to budget, not with calib_to k"):
        set_params(tiny_model, calib_to="k", calib_load_path=str(tmp_path))
    (tmp_path / "calibration.safetensors").unlink()  # th.txt alone, as another program would read it
    set_params(tiny_model, mode=3)
    set_params(tiny_model, **(BUDGET | {"calib_to": "k"}), K=6, calib_load_path=str(tmp_path))
    assert torch.equal(tiny_model(ids).logits, expected)
    assert load_tables(tmp_path, 3, 6).k == dict.fromkeys(range(3), 6)


def test_layers_with_a_k_of_their_own(tiny_model: LlamaForCausalLM) -> None:
    """--layerk: such a layer has a threshold for its own K, the others share one."""
    begin(tiny_model, 6)
    tiny_model(tokens(length=60))
    update_model(tiny_model)
    set_params(tiny_model, **BUDGET, K=[20, 6, 6], calibrate=True)
    tiny_model(tokens(length=60))
    theta = calibrated_tables(tiny_model).theta
    first, second, third = (float(np.nanmax(theta[i].values)) for i in range(3))
    assert first < second == third
    set_params(tiny_model, calibrate=False)


@pytest.mark.parametrize("seed", range(3))
def test_shares_help_equally_at_the_margin(seed: int) -> None:
    """Made layers whose damage falls as a power: the shares have mean K and equal slopes, and no other shares
    with that mean do less damage."""
    rng = np.random.default_rng(seed)
    layers, k = 12, 16.0
    scale, power = rng.lognormal(-3, 2, layers), rng.uniform(0.5, 3.0, layers)
    kept = np.outer(rng.uniform(0.5, 2.0, layers), k * np.array([0.5, 1.0, 2.0]))
    damage = scale[:, None] * kept ** -power[:, None]
    shares = share_out(damage, kept, k, np.full(layers, 1e6))
    assert shares.mean() == pytest.approx(k, rel=1e-3)
    inside = shares > 1.0 + 1e-9
    slopes = (scale * power * shares ** (-power - 1))[inside]
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-3)
    total = (scale * shares**-power).sum()
    for _ in range(100):
        other = (shares * rng.lognormal(0, 0.2, layers)).clip(1.0)
        other *= k / other.mean()
        if (other >= 1.0).all():
            assert (scale * other**-power).sum() >= total * (1 - 1e-6)


def test_sensitivity_of_layers(tiny_model: LlamaForCausalLM) -> None:
    """Thresholds differ by layer, the budget holds, and the model is left as it was."""
    begin(tiny_model, 6, calib_layers="sensitivity")
    for seed in range(3):
        tiny_model(tokens(length=60, seed=seed))
    found = calibrations(tiny_model)
    assert [len(one.prompts) for one in found.values()] == [2, 0, 0]
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        real = calibrate.measure
        patch.setattr(calibrate, "measure", lambda *args: calls.append(1) or real(*args))
        tables = calibrated_tables(tiny_model)
        assert calibrations(tiny_model) == found  # still calibrating
        use_tables(tiny_model, tables)  # which ends the calibration: nothing is measured twice
        set_params(tiny_model, calibrate=False)
    assert len(calls) == 1 and not calibrations(tiny_model)
    thetas = [float(np.nanmax(tables.theta[i].values)) for i in range(3)]
    assert len(set(thetas)) == 3
    kept = [kept_above(found[i].counts[6].numpy(), int(found[i].rows[6]), np.log(thetas[i])) for i in found]
    assert np.mean(kept) == pytest.approx(6, rel=0.02)
    assert tiny_model(tokens()).logits.isfinite().all()


def test_sensitivity_leaves_padding_out(tiny_model: LlamaForCausalLM) -> None:
    """Of a batch, the first prompt is measured; its padding, and a mask of an earlier call, do not count."""
    begin(tiny_model, 6, calib_layers="sensitivity")
    ids = tokens(length=60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :25] = 0
    tiny_model(ids.repeat(2, 1), attention_mask=mask)
    tiny_model(tokens(length=30), attention_mask=torch.tensor([[0] * 20 + [1] * 10]))  # too short
    tiny_model.model(tokens(length=40, seed=1))
    kept = next(iter(calibrations(tiny_model).values())).prompts
    assert [one.tolist() for one in kept] == [ids[:, 25:].tolist(), tokens(length=40, seed=1).tolist()]


def test_damage_of_single_layers(tiny_model: LlamaForCausalLM) -> None:
    """As whole forward passes say, though the layers before the sparse one are left out; the model is left as
    it was."""
    update_model(tiny_model)
    k, log_thetas = 6, [-5.0, -3.0, -2.0]
    params = AttentionParams().changed(BUDGET | {"K": k})
    prompts = [tokens(batch=1, length=40, seed=seed) for seed in range(2)]
    found = measure(tiny_model, prompts, params, log_thetas, k)
    assert all("forward" not in block.__dict__ for block in tiny_model.model.layers)
    states = [layer.self_attn.toptheta for layer in tiny_model.model.layers]

    def log_probs(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return tiny_model(ids).logits[0, k:].double().log_softmax(dim=-1)

    expected = np.zeros_like(found)
    for ids in prompts:
        dense = log_probs(ids)
        for i, state in enumerate(states):
            for j, log_theta in enumerate(log_thetas):
                set_params(tiny_model, mode=3)
                state.spec = params.layer(k)
                state.theta = torch.full((tiny_model.config.num_attention_heads, k + 2), NEG_INF)
                state.theta[:, k + 1] = float(np.exp(log_theta))
                choose_implementation([layer.self_attn for layer in tiny_model.model.layers])
                sparse = log_probs(ids)
                expected[i, j] += float((dense.exp() * (dense - sparse)).sum(dim=-1).mean()) / len(prompts)
                set_params(tiny_model, mode=3)
    assert (np.diff(expected) > 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_damage_in_a_compiled_model(tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a model that is not, though it was compiled before."""
    update_model(tiny_model)
    asked = [tokens(batch=1, length=40)], AttentionParams().changed(BUDGET | {"K": 6}), [-3.0], 6
    expected = measure(tiny_model, *asked)
    monkeypatch.setattr(tiny_model, "forward", torch.compile(tiny_model.forward, backend="eager"))
    with torch.no_grad():
        tiny_model(input_ids=asked[0][0], use_cache=False, logits_to_keep=34)
    np.testing.assert_array_equal(measure(tiny_model, *asked), expected)


@pytest.mark.parametrize(
    "params, says",
    [
        ({"placement": "pre-softmax", "sdc": "exact"}, "calib_to budget calibrates a threshold on weights"),
        ({"calib_to": "k", "calib_layers": "sensitivity"}, "calib_layers sensitivity distributes a budget"),
        ({"calib_add_sigma": 0.1}, "calib_add_sigma has no effect with calib_to budget"),
        ({"calib_interp": "fit"}, "calib_interp has no effect with calib_to budget"),
        ({"calib_smooth": 3}, "calib_smooth has no effect with calib_to budget"),
        ({"calib_to": "q"}, "calib_to is 'q': choose one of k, budget"),
    ],
)
def test_what_does_not_fit(params: dict, says: str, tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    with pytest.raises(UsageError, match=says):
        set_params(tiny_model, **(BUDGET | {"K": 6, "calibrate": True} | params))


def test_a_budget_that_no_row_can_meet(tiny_model: LlamaForCausalLM) -> None:
    begin(tiny_model, 50)
    tiny_model(tokens(length=40))
    with pytest.raises(UsageError, match="no row longer than K=50 in layer 0: .* at most 40 tokens"):
        set_params(tiny_model, calibrate=False)
