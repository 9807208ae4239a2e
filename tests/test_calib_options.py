"""Look-ups of lengths that calibration never saw, smoothing, kept samples, calibration on another task."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from topk_llama import set_params, update_model
from toptheta.calibration.interpolation import lookup_table
from toptheta.calibration.kept_samples import (
    SAMPLES_NAME,
    read_calibration_samples,
    write_calibration_samples,
)
from toptheta.calibration.tables import BINARY_NAME, CalibrationTables, LayerTable, load_tables
from toptheta.eval.cli import parse_settings, settings_flags
from toptheta.eval.settings import GenSettings, QASettings, Settings
from toptheta.models.control import (
    begin_calibration,
    calibrated_tables,
    calibration_samples,
    get_params,
    use_tables,
)
from toptheta.models.patch import patched_layers
from toptheta.util.errors import UsageError

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
    layer = patched_layers(tiny_model)[0]
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
@pytest.mark.parametrize("frac", [1.0, 0.4])
def test_kept_samples_average_to_the_tables(
    tiny_model: LlamaForCausalLM, tmp_path: Path, frac: float
) -> None:
    """For each of several K, in batches with padding, also when calibration goes on from a saved state."""
    update_model(tiny_model)
    set_params(tiny_model, mode=0, K=4, calibrate=True, calib_sample_frac=frac)
    params = get_params(tiny_model)
    ids = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    begin_calibration(tiny_model, params, [(9, 9, 9)])
    assert all("kept" not in key for key in patched_layers(tiny_model)[0].calibration.state())
    begin_calibration(tiny_model, params, [(9, 9, 9)], keep_samples=True)
    tiny_model(ids, attention_mask=mask)
    states = [layer.calibration.state() for layer in patched_layers(tiny_model)]
    begin_calibration(tiny_model, params, [(9, 9, 9)], keep_samples=True)
    for layer, state in zip(patched_layers(tiny_model), states):
        layer.calibration.load_state(state)
    tiny_model(ids[:1, :33])
    for k in (4, 9):
        tables = calibrated_tables(tiny_model, (k, k, k))
        write_calibration_samples(tmp_path, calibration_samples(tiny_model, (k, k, k)))
        found = read_calibration_samples(tmp_path)
        assert list(found) == [0, 1, 2]
        for layer, (n, values) in found.items():
            assert n.dtype == np.int32 and values.dtype == np.float32 and values.shape == (len(n), 6)
            check_average(n, values, tables.theta[layer])


def check_average(n: np.ndarray, values: np.ndarray, table: LayerTable) -> None:
    assert len(n) == table.samples[0].sum() and n.min() > 0
    for length in np.flatnonzero(table.samples[0]):
        chosen = values[n == length].astype(np.float64)
        assert len(chosen) == table.samples[0, length]
        np.testing.assert_allclose(chosen.mean(axis=0), table.values[:, length], rtol=1e-9)


def test_no_samples_to_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no calib_samples.safetensors: calibrate with"):
        read_calibration_samples(tmp_path)
    (tmp_path / SAMPLES_NAME).write_bytes(b"not arrays")
    with pytest.raises(UsageError, match="is damaged"):
        read_calibration_samples(tmp_path)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"calib_interp": "cubic"}, "calib_interp is 'cubic': choose one of nearest, linear, fit"),
        ({"calib_smooth": -1}, "calib_smooth is -1: give a whole number"),
        ({"calib_smooth": 1.5}, "calib_smooth is 1.5: give a whole number"),
        ({"calib_smooth": True}, "calib_smooth is True: give a whole number"),
    ],
)
def test_bad_parameters(tiny_model: LlamaForCausalLM, params: dict, message: str) -> None:
    update_model(tiny_model)
    with pytest.raises(UsageError, match=message):
        set_params(tiny_model, **params)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mode 0 --calib_interp cubic", "--calib_interp is 'cubic'"),
        ("--mode 0 --calib_smooth -2", "--calib_smooth is -2"),
        ("--mode 0 --calib_smooth wide", "--calib_smooth is 'wide'"),
        ("--mode 1 --calib_interp fit", "--calib_interp fit has no effect without calibration"),
        ("--calib_smooth 4", "--calib_smooth 4 has no effect without calibration"),
        ("--mode 3 --calib_dump_samples", "--calib_dump_samples has no effect without calibration"),
        ("--mode 0 --calib_load_path . --calib_dump_samples", "has no effect with --calib_load_path"),
        ("--mode 1 --sdc offline-calibrated --calib_dump_samples", "use it with --mode 0"),
    ],
)
def test_bad_flags(flags: str, message: str) -> None:
    parser = argparse.ArgumentParser()
    settings_flags(parser, Settings)
    with pytest.raises(UsageError, match=message):
        parse_settings(Settings, parser.parse_args(flags.split()))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def qa_settings(folder_model: str, **changes) -> QASettings:
    values = {
        "llama": folder_model,
        "mode": (0,),
        "k": (16,),
        "calib_sample_frac": 1.0,
        "calib_samples": 3,
        "num_samples": 2,
        "num_fewshot": 2,
        "device": "cpu",
    }
    return QASettings(**(values | changes))


def test_dump_of_each_cell_survives_an_interrupt(
    folder_model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toptheta.eval import lm_eval_model as harness
    from toptheta.eval.tasks.qa import run_qa

    options = {"k": (16, 32), "calibrate_only": True, "calib_dump_samples": True}
    score, calls = harness.TopThetaLM._score, []

    def scoring(self, batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, batch)

    monkeypatch.setattr(harness.TopThetaLM, "_score", scoring)
    with pytest.raises(KeyboardInterrupt):
        run_qa(qa_settings(folder_model, **options))
    (run,) = here.joinpath("products").iterdir()
    run_qa(qa_settings(folder_model, **options), resume=str(run))
    assert len(calls) == 4  # three prompts, of which one was cut off: none ran twice
    for k in (16, 32):
        folder = run / f"mode0_k{k}"
        samples, tables = read_calibration_samples(folder), load_tables(folder, 2, 6)
        (folder / BINARY_NAME).unlink()
        assert sorted(samples) == sorted(tables.theta) == [0, 1]
        for layer, (n, values) in samples.items():
            assert n.min() == k + 1
            check_average(n, values, tables.theta[layer])
            check_average(n, values, load_tables(folder, 2, 6).theta[layer])  # of th.txt
    run_qa(qa_settings(folder_model, calibrate_only=True, output_dir="off"))
    assert not list(here.glob(f"off/**/{SAMPLES_NAME}"))


def arc_rows(folder: Path, split: str, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": str(i),
            "question": f"Which of these numbers follows {i}?",
            "choices": {"text": [str(i + 1), str(i + 5), str(i + 7)], "label": ["A", "B", "C"]},
            "answerKey": "A",
        }
        for i in range(count)
    ]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_calibration_on_another_task(folder_model: str, here: Path) -> None:
    """Evaluates the bundled task with the tables that the other task's own run calibrates."""
    from toptheta.eval.tasks.qa import run_qa

    arc_rows(here / "data" / "arc_easy", "train", 30)
    local = {"data_dir": str(here / "data")}
    (result,) = run_qa(qa_settings(folder_model, calib_task="arc_easy", calib_interp="fit", **local))
    assert result["task"] == "everyday_science" and result["metrics"]["acc"]["count"] == 2
    run_qa(
        qa_settings(
            folder_model, task="arc_easy", num_fewshot=25, calibrate_only=True, output_dir="own", **local
        )
    )
    run_qa(qa_settings(folder_model, calibrate_only=True, output_dir="plain"))
    (run,), (own,), (plain,) = (here.glob(f"{name}/*") for name in ("products", "own", "plain"))
    assert (run / "th.txt").read_text() == (own / "th.txt").read_text() != (plain / "th.txt").read_text()
    assert load_tables(run, 2, 6).meta["task"] == "arc_easy"
    assert load_tables(plain, 2, 6).meta["task"] == "everyday_science"
    config = json.loads((run / "config.json").read_text())
    assert (config["task"], config["num_fewshot"]) == ("everyday_science", 2)
    assert (config["calib_task"], config["calib_num_fewshot"]) == ("arc_easy", 25)
    assert config["settings"]["calib_task"] == "arc_easy" and config["settings"]["calib_interp"] == "fit"


@pytest.mark.parametrize("dataset", ["openai_humaneval", "perplexity"])
def test_generation_calibrates_on_a_task(folder_model: str, here: Path, dataset: str) -> None:
    """gen_llama.py's tables of --calib_task are those of test_llama.py."""
    from toptheta.eval.generate import run_generation
    from toptheta.eval.tasks.qa import run_qa

    arc_rows(here / "data" / "arc_easy", "train", 30)
    local = {"data_dir": str(here / "data"), "calibrate_only": True}
    run_qa(qa_settings(folder_model, task="arc_easy", num_fewshot=25, output_dir="own", **local))
    shared = {"llama": folder_model, "mode": (0,), "k": (16,), "calib_sample_frac": 1.0, "calib_samples": 3}
    (here / "text").write_text("One sentence follows the other, and all are alike. " * 200)
    text = {"text": str(here / "text"), "max_seq_len": 256} if dataset == "perplexity" else {}
    run_generation(
        GenSettings(**shared, **local, **text, dataset=dataset, device="cpu", calib_task="arc_easy")
    )
    (run,), (own,) = (here.glob(f"{name}/*") for name in ("products", "own"))
    assert (run / "th.txt").read_text() == (own / "th.txt").read_text()
    assert load_tables(run, 2, 6).meta["task"] == "arc_easy"
    config = json.loads((run / "config.json").read_text())
    assert config["task"] == dataset and config["calib_task"] == "arc_easy"


def test_wrong_calibration_tasks(folder_model: str, here: Path) -> None:
    from toptheta.eval.generate import run_generation
    from toptheta.eval.tasks.qa import run_qa

    arc_rows(here / "data" / "arc_challenge", "test", 3)
    for changes, message in (
        ({"calib_task": "hellaswagg"}, "--calib_task 'hellaswagg' is unknown: near it are hellaswag"),
        ({"calib_task": "arc_easy", "data_dir": "data"}, "no folder 'arc_easy' for --calib_task arc_easy"),
        ({"calib_task": "arc_challenge", "data_dir": "data"}, "no train.jsonl, which --calib_task arc_ch"),
    ):
        with pytest.raises(UsageError, match=message):
            run_qa(qa_settings(folder_model, **changes))
    with pytest.raises(UsageError, match="--calib_task arc_challenge"):
        run_generation(GenSettings(llama=folder_model, calib_task="arc_challenge", data_dir="data"))
    assert not here.joinpath("products").exists()
    assert GenSettings().calibration_task == "openai_humaneval"
