"""Parameters of the methods that make no sense are one sentence that names them."""

import pytest
from transformers import LlamaForCausalLM

from topk_llama import set_params, update_model
from toptheta.util.errors import UsageError


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


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"modus": 1}, "no parameter 'modus'"),
        ({"placement": "middle"}, "placement is 'middle'"),
        ({"mode": 1, "vmc": True}, "vmc has nothing to compensate"),
        ({"mode": 1, "sdc": "exact", "placement": "post-softmax"}, "needs placement pre-softmax"),
        ({"mode": 1, "sdc": "exp-threshold"}, "needs a threshold"),
        ({"mode": 1, "capk": True}, "mode 0 only"),
        ({"mode": 0}, "needs calibrated tables"),
        ({"mode": 1, "sdc": "offline-calibrated"}, "needs calibrated tables"),
        ({"mode": 1, "calib_sample_frac": 0.0}, "above 0"),
        ({"mode": 1, "test_layer": 3}, "test_layer is 3"),
        ({"mode": 3, "calibrate": True}, "nothing to calibrate"),
    ],
)
def test_parameters_that_make_no_sense(params: dict, message: str, tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    with pytest.raises(UsageError, match=message):
        set_params(tiny_model, **params)
