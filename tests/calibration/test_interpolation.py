"""Look-ups of lengths that calibration never saw, and smoothing, against plain loops."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from topk_llama import set_params, update_model
from toptheta.calibration.interpolation import lookup_table, nearest_lookup
from toptheta.calibration.tables import CalibrationTables, LayerTable
from toptheta.models.calibrate import use_tables
from toptheta.models.control import get_params
from toptheta.models.patch import layer_states

NEG_INF = float("-inf")
K = 6


def random_table(heads: int = 5, length: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Values and samples with gaps; each head has its own calibrated lengths above K."""
    generator = np.random.default_rng(3)
    samples = generator.integers(1, 9, (heads, length)) * (generator.random((heads, length)) < 0.4)
    samples[:, : K + 1] = 0
    samples[:, 30] = 4
    return np.where(samples > 0, generator.normal(size=samples.shape), np.nan), samples


def curve_table(curve, lengths, samples: int = 100_000) -> tuple[np.ndarray, np.ndarray]:
    """One head: `curve` at `lengths`."""
    values = np.full((1, max(lengths) + 1), np.nan)
    values[0, list(lengths)] = [curve(n) for n in lengths]
    return values, np.where(np.isnan(values), 0, samples)


def test_linear_by_loop() -> None:
    values, samples = random_table()
    found = lookup_table(values, samples, K, NEG_INF, "linear")
    assert found.dtype == np.float32 and found.shape == values.shape
    for head in range(5):
        known = [n for n in range(60) if samples[head, n]]
        for n in range(60):
            if n <= K:
                assert found[head, n] == NEG_INF
                continue
            left = max((m for m in known if m <= n), default=known[0])
            right = min((m for m in known if m >= n), default=known[-1])
            share = 0.0 if right <= left else (n - left) / (right - left)
            expected = (1 - share) * values[head, left] + share * values[head, right]
            assert found[head, n] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("width", [1, 4, 100])
def test_smooth_by_loop(width: int) -> None:
    values, samples = random_table()
    for interp in ("nearest", "linear"):
        found = lookup_table(values, samples, K, 0.0, interp, smooth=width)
        assert not np.array_equal(found, lookup_table(values, samples, K, 0.0, interp))
        for head in range(5):
            for n in np.flatnonzero(samples[head]):
                near = [m for m in np.flatnonzero(samples[head]) if abs(m - n) <= width]
                total = sum(samples[head, m] * values[head, m] for m in near)
                expected = total / sum(samples[head, m] for m in near)
                assert found[head, n] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("within", [(NEG_INF, math.inf), (0.0, 1.0), (0.0, math.inf)])
def test_fit_is_monotone_and_in_range(within: tuple[float, float]) -> None:
    """Whatever the values: noise, rising, falling, one length, two neighbours, zeros."""
    values, samples = random_table(8)
    n = np.arange(60)
    values[1] = np.where(samples[1] > 0, 0.1 * n + values[1], np.nan)
    values[2] = np.where(samples[2] > 0, -0.1 * n + values[2], np.nan)
    if within[0] == 0.0:
        values = np.exp(values) if within[1] > 1.0 else 1.0 / (1.0 + np.exp(-values))
        values[7] = np.where(samples[7] > 0, 0.0, np.nan)
    values[3, np.arange(60) != 30] = np.nan
    values[4, (n != 30) & (n != 31)] = np.nan
    values[4, 31] = 2 * values[4, 30] if within[1] > 1.0 else 0.9
    samples = np.where(np.isnan(values), 0, samples.clip(min=1))
    found = lookup_table(values, samples, K, NEG_INF, "fit", max_n=5000, within=within)
    assert found.shape == (8, 5001) and (found[:, : K + 1] == NEG_INF).all()
    curve = found[:, K + 1 :]
    assert np.isfinite(curve).all() and (curve > within[0]).all() and (curve < within[1]).all()
    steps = np.diff(curve, axis=1)
    assert ((steps >= 0).all(axis=1) | (steps <= 0).all(axis=1)).all()
    assert steps[1].sum() > 0 > steps[2].sum()
    np.testing.assert_allclose(curve[3], values[3, 30], rtol=1e-5)  # one length tells no trend
    # Two neighbours tell next to nothing of the trend far out, however much they differ.
    assert abs(curve[4, -1] - curve[4, 25]) < 0.5 * abs(values[4, 31] - values[4, 30])


def test_fit_recovers_a_known_curve() -> None:
    def scores(n: float) -> float:
        return -3.0 + 1.25 * math.log(n)

    def falling(n: float) -> float:
        return 4.0 - 0.5 * math.log(n)

    def steep(n: float) -> float:  # like the (K+1)-th largest of n: its minimum at n = K + 1
        return -1.0 + 0.8 * math.log1p(-K / n)

    def weights(n: float) -> float:
        return 0.5 * n**-0.75

    lengths = range(K + 1, 701, 7)
    for curve, within in (
        (scores, (NEG_INF, math.inf)),
        (falling, (NEG_INF, math.inf)),
        (steep, (NEG_INF, math.inf)),
        (weights, (0.0, 1.0)),
    ):
        table = curve_table(curve, lengths)
        found = lookup_table(*table, K, NEG_INF, "fit", max_n=8192, within=within)
        for n in (K + 1, 11, 100, 700, 701, 2000, 8192):
            assert found[0, n] == pytest.approx(curve(n), rel=1e-2, abs=1e-3), (curve.__name__, n)

    # A value of one sample weighs next to nothing beside those of many.
    values, samples = curve_table(scores, lengths)
    values[0, 100], samples[0, 100] = 1000.0, 1
    assert lookup_table(values, samples, K, NEG_INF, "fit", max_n=900)[0, 900] == pytest.approx(
        scores(900), rel=1e-2
    )


def test_no_calibrated_length() -> None:
    values, samples = random_table()
    values[2] = np.nan
    for interp in ("nearest", "linear", "fit"):
        with pytest.raises(ValueError, match="head 2 has no calibrated row length"):
            lookup_table(values, samples, K, NEG_INF, interp)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", ["theta", "sdc"])
def test_extrapolation_reaches_the_output(tiny_model: LlamaForCausalLM, kind: str) -> None:
    """Loaded tables with a curve: up to the longest calibrated length fit and nearest agree, beyond only
    linear and nearest do; back to nearest is back to its output."""
    update_model(tiny_model)

    def layer_table(curve) -> LayerTable:
        values, samples = curve_table(curve, range(K + 1, 40))
        return LayerTable(np.repeat(values, 6, axis=0), np.repeat(samples, 6, axis=0))

    theta = layer_table(lambda n: -6.0 + 2.0 * math.log(n) if kind == "theta" else -6.0)
    sdc = layer_table(lambda n: 0.01 * n**1.5 if kind == "sdc" else 0.5)
    tables = CalibrationTables(3, 6, dict.fromkeys(range(3), K))
    tables.theta, tables.sdc = dict.fromkeys(range(3), theta), dict.fromkeys(range(3), sdc)
    use_tables(tiny_model, tables)
    set_params(tiny_model, mode=0, K=K, sdc="offline-calibrated")
    ids = torch.randint(3, 97, (1, 200), generator=torch.Generator().manual_seed(1))
    logits = {}
    for interp in ("nearest", "linear", "fit"):
        set_params(tiny_model, calib_interp=interp)
        assert get_params(tiny_model).calib_interp == interp
        logits[interp] = tiny_model(ids).logits[0]
    layer = layer_states(tiny_model)[0]
    assert layer.theta.shape == layer.sdc_table.shape == (6, 513)
    assert (layer.sdc_table >= 0).all() and (layer.sdc_table[:, : K + 1] == 0).all()
    torch.testing.assert_close(logits["linear"], logits["nearest"])
    torch.testing.assert_close(logits["fit"][:39], logits["nearest"][:39], rtol=1e-2, atol=2e-2)
    assert (logits["fit"] - logits["nearest"])[60:].abs().amax(dim=1).median() > 0.1
    set_params(tiny_model, calib_interp="nearest")
    assert layer.theta.shape == (6, 40) and torch.equal(tiny_model(ids).logits[0], logits["nearest"])
    set_params(tiny_model, calib_smooth=3)
    if kind == "theta":
        assert layer.theta[0, 20] == pytest.approx(np.mean(theta.values[0, 17:24]), rel=1e-5)
    assert tables.theta[0] is theta and not torch.equal(tiny_model(ids).logits[0], logits["nearest"])


@pytest.mark.usefixtures("path")
def test_nearest_length() -> None:
    values = np.full((1, 13), np.nan)
    values[0, [6, 8, 12]] = [60.0, 80.0, 120.0]
    lookup = nearest_lookup(values, 4, float("-inf"))[0]
    assert lookup[:5].tolist() == [-np.inf] * 5
    assert lookup[5:].tolist() == [
        60.0,
        60.0,
        60.0,
        80.0,
        80.0,
        80.0,
        120.0,
        120.0,
    ]  # 7 and 10 tie: the smaller
