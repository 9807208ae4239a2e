"""set_params by layer: one sparse layer only, and K of each; what a refused call leaves as it was."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers.models import tokens
from topk_llama import restore_model, set_params, update_model
from toptheta.calibration.tables import save_tables
from toptheta.models.calibrate import calibrations, value_gram
from toptheta.models.control import get_params, reading_prompt, record_statistics, tables_of
from toptheta.models.patch import layer_states, model_state
from toptheta.models.recorder import Recorder
from toptheta.util.errors import UsageError

pytestmark = pytest.mark.usefixtures("path")


def test_one_layer_only(tiny_model: LlamaForCausalLM) -> None:
    """test_layer: the others stay dense, which the statistics show."""
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K=4, test_layer=1)
    assert [layer.spec.sparse for layer in layer_states(tiny_model)] == [False, True, False]
    recorder = Recorder()
    record_statistics(tiny_model, recorder)
    tiny_model(tokens(length=10))
    prefill, _ = recorder.drain()
    assert [int(prefill[layer].attn[0, 0]) for layer in range(3)] == [55, 4 * 10 - 6, 55]


def test_k_per_layer(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K={1: 0, 2: 7})
    assert [layer.spec.k for layer in layer_states(tiny_model)] == [256, 0, 7]
    set_params(tiny_model, K=[3, 4, 5])
    assert [layer.spec.k for layer in layer_states(tiny_model)] == [3, 4, 5]
    set_params(tiny_model, K={0: 9})  # the other layers keep theirs
    assert [layer.spec.k for layer in layer_states(tiny_model)] == [9, 4, 5]
    set_params(tiny_model, K=6)
    set_params(tiny_model, K={2: 7})
    assert [layer.spec.k for layer in layer_states(tiny_model)] == [6, 6, 7]
    for k, message in (
        ([3, 4], "lists 2 values"),
        ({5: 3}, "layer 5"),
        ({"1": 3}, "layer '1': the keys are the numbers"),
        ("64", "K is '64'"),
        (2.5, "K is 2.5"),
    ):
        with pytest.raises(UsageError, match=message):
            set_params(tiny_model, K=k)


BUDGET = {"mode": 0, "K": 6, "placement": "post-softmax", "calib_to": "budget", "calib_sample_frac": 1.0}


def calibrate(model: LlamaForCausalLM, **params) -> None:
    set_params(model, **params, calibrate=True)
    for seed in range(2):
        model(tokens(length=40, seed=seed))


def test_a_refused_call_changes_nothing(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Tables that do not fit, found in the last check; and what worked before still works."""
    model = update_model(tiny_model)
    calibrate(model, **BUDGET)
    set_params(model, calibrate=False)
    save_tables(tables_of(model), tmp_path)
    set_params(model, mode=3)
    with pytest.raises(UsageError, match="value_aware needs thresholds that were calibrated with it"):
        weighed = BUDGET | {"method": "top_theta:value_aware"}
        weighed.pop("mode")
        set_params(model, **weighed, calib_load_path=str(tmp_path))
    assert get_params(model).label == "dense" and not any(layer.spec.sparse for layer in layer_states(model))
    model(tokens(length=20))

    own = {"mode": 0, "K": 6, "placement": "pre-softmax", "calib_to": "k", "calib_sample_frac": 1.0}
    calibrate(model, **own)
    set_params(model, calibrate=False)
    before = model(tokens(length=40)).logits
    with pytest.raises(UsageError, match="calibrated with calib_to budget"):
        set_params(model, calib_load_path=str(tmp_path))
    set_params(model, vmc=False)
    assert torch.equal(model(tokens(length=40)).logits, before)


def test_a_calibration_goes_on_after_a_refused_end(tiny_model: LlamaForCausalLM) -> None:
    model = update_model(tiny_model)
    calibrate(model, mode=0, K=6, calib_sample_frac=1.0)
    with pytest.raises(UsageError, match="calibrated for K=6, not for K=8"):
        set_params(model, K=8, calibrate=False)
    assert get_params(model).calibrate and len(calibrations(model)) == 3
    set_params(model, calibrate=False)
    assert get_params(model).label == "Top-theta K=6" and not calibrations(model)


def test_restoring_ends_a_calibration_that_keeps_prompts(tiny_model: LlamaForCausalLM) -> None:
    model = update_model(tiny_model)
    set_params(model, **BUDGET, calib_layers="sensitivity", calibrate=True)
    hooks = model.get_input_embeddings()._forward_pre_hooks
    assert hooks
    restore_model(model)
    assert not hooks


def test_a_prompt_within_a_prompt(tiny_model: LlamaForCausalLM) -> None:
    shared = model_state(update_model(tiny_model))
    with reading_prompt(tiny_model):
        with reading_prompt(tiny_model):
            pass
        assert not shared.is_decode(1, 9, 8)
    assert shared.is_decode(1, 9, 8)


def test_samples_are_not_discarded_unasked(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    options = {"mode": 0, "K": 6, "calib_sample_frac": 1.0}
    set_params(tiny_model, **options, calibrate=True)
    set_params(tiny_model, calib_interp="linear")  # nothing is sampled yet
    with pytest.raises(UsageError, match="the calibration has seen no prompt"):
        set_params(tiny_model, calibrate=False)
    tiny_model(tokens(length=30))
    with pytest.raises(UsageError, match="a calibration is under way, whose samples"):
        set_params(tiny_model, calib_interp="fit")
    set_params(tiny_model, calibrate=False)
    assert get_params(tiny_model).calib_interp == "linear"
    set_params(tiny_model, calibrate=True)
    set_params(tiny_model, calibrate=True)  # from the start


@pytest.mark.parametrize("frac", [0.5, 1.0])
@pytest.mark.parametrize("to", ["k", "budget"])
def test_prompts_in_and_out_of_inference_mode(tiny_model: LlamaForCausalLM, to: str, frac: float) -> None:
    found = []
    update_model(tiny_model)
    for modes in ((True, False), (False, False)):
        with torch.inference_mode(modes[0]):
            set_params(
                tiny_model, mode=0, K=6, placement="post-softmax", calib_to=to, calib_sample_frac=frac,
                calibrate=True,
            )  # fmt: skip
            tiny_model(tokens(length=80))
        with torch.inference_mode(modes[1]):
            tiny_model(tokens(length=60, seed=1))
        set_params(tiny_model, calibrate=False)
        found.append(tables_of(tiny_model).theta[0].values)
    np.testing.assert_allclose(*found, rtol=1e-5)


class Adapted(torch.nn.Linear):
    """As an adapter has it: a weight, and something added to what it gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.5 * x[..., : self.out_features]


def test_value_norms_of_an_adapted_projection(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    layer = tiny_model.model.layers[0].self_attn
    plain = layer.o_proj
    size = plain.in_features
    for bias in (False, True):
        layer.o_proj = Adapted(size, plain.out_features, bias=bias)
        merged = layer.o_proj.weight + 0.5 * torch.eye(size)[: plain.out_features]
        parts = merged.view(plain.out_features, -1, layer.head_dim).transpose(0, 1)
        torch.testing.assert_close(value_gram(layer), parts.transpose(1, 2) @ parts)


def test_options_of_a_calibration_that_is_over(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """They shape tables, and are refused where they would change none."""
    model = update_model(tiny_model)
    own = {"mode": 0, "K": 6, "calib_sample_frac": 1.0, "calib_add_sigma": 1}
    set_params(model, mode=1, calib_sample_frac=0.5)  # before any calibration
    calibrate(model, **own, calib_tac=True)
    for more in ({"calib_add_sigma": -2.0}, {"calib_sample_frac": 0.5}, {"calib_tac": False}):
        with pytest.raises(UsageError, match="takes effect when calibrating"):
            set_params(model, **more, calibrate=False)
    set_params(model, **own, calibrate=False)
    save_tables(tables_of(model), tmp_path)
    before = get_params(model)
    with pytest.raises(
        UsageError, match="calib_add_sigma -2.0 takes .* calibrated with 1.0: .* calibrate=True"
    ):
        set_params(model, calib_add_sigma=-2.0)
    assert get_params(model) == before
    set_params(model, **own, calib_tac=True)
    set_params(model, mode=1, calib_tac=False)
    set_params(model, **own, calib_tac=True)  # as the tables were calibrated
    set_params(model, calib_load_path=tmp_path)  # a Path, after which the options are the default ones
    with pytest.raises(UsageError, match="takes effect"):
        set_params(model, calib_add_sigma=-2.0)
    set_params(model, calib_add_sigma=1)
    calibrate(model, calib_add_sigma=-2.0)
    set_params(model, calibrate=False)
    assert get_params(model).calib_add_sigma == -2.0


def test_a_calibration_under_way(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    model = update_model(tiny_model)
    calibrate(model, mode=0, K=6, calib_sample_frac=1.0)
    set_params(model, calibrate=False)
    save_tables(tables_of(model), tmp_path)
    set_params(model, calibrate=True)
    with pytest.raises(
        UsageError, match="under way, which these parameters do not need: add calibrate=False"
    ):
        set_params(model, mode=3)
    with pytest.raises(UsageError, match="calib_load_path loads tables instead of calibrating"):
        set_params(model, calibrate=True, calib_load_path=str(tmp_path))
    set_params(model, calib_load_path=str(tmp_path))  # ends it
    assert not get_params(model).calibrate and not calibrations(model)
    set_params(model, calibrate=True, calib_load_path=None)
    set_params(model, mode=3, calibrate=False)
    assert not calibrations(model)


def test_thresholds_of_weighed_values_alone(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    method = {"method": "top_theta:value_aware", "K": 6, "placement": "post-softmax", "calib_to": "budget"}
    set_params(tiny_model, **method, calib_sample_frac=1.0, calibrate=True)
    tiny_model(tokens(length=60))
    set_params(tiny_model, calibrate=False)
    with pytest.raises(UsageError, match="were calibrated with value_aware"):
        set_params(tiny_model, method="top_theta")
    set_params(tiny_model, method="top_theta:value_aware,key_copy=int4")


@pytest.mark.parametrize(
    "params, words",
    [
        ({"method": None}, "method is None: give a method's name"),
        ({"mode": 1, "K": -3}, "K is -3: give whole numbers"),
        ({"mode": 1, "test_layer": "0"}, "test_layer is '0': give a whole number"),
        ({"mode": 0, "calib_add_sigma": "0.1"}, "calib_add_sigma is '0.1': give a number"),
    ],
)
def test_wrong_values(tiny_model: LlamaForCausalLM, params: dict, words: str) -> None:
    update_model(tiny_model)
    with pytest.raises(UsageError, match=words):
        set_params(tiny_model, **params)
