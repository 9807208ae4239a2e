"""Parameters of the methods that make no sense are one sentence that names them."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.methods.base import Method, parse_method
from toptheta.methods.h2o import H2O
from toptheta.methods.quest import Quest
from toptheta.methods.skip_softmax import SkipSoftmax
from toptheta.methods.snapkv import SnapKV
from toptheta.methods.streaming_llm import StreamingLLM
from toptheta.methods.top_p import TopP
from toptheta.methods.top_theta import TopTheta
from toptheta.models.control import get_params
from toptheta.util.errors import UsageError


@pytest.mark.parametrize(
    "params, message",
    [
        ({"calib_interp": "cubic"}, "calib_interp is 'cubic': choose one of nearest, linear, fit"),
        ({"calib_smooth": -1}, "calib_smooth is -1: give a whole number"),
        ({"calib_smooth": 1.5}, "calib_smooth is 1.5: give a whole number"),
        ({"calib_smooth": True}, "calib_smooth is True: give a whole number"),
        ({"vmc": "false"}, "vmc is 'false': give True or False"),
        ({"calibrate": "no"}, "calibrate is 'no': give True or False"),
        ({"calib_tac": "no"}, "calib_tac is 'no': give True or False"),
        ({"mode": 0, "capk": "False"}, "capk is 'False': give True or False"),
        ({"mode": 1, "capk": 0}, "capk is 0: give True or False"),
        ({"mode": True}, "mode is True: give 0"),
        ({"mode": 1.0}, "mode is 1.0: give 0"),
        ({"test_layer": 1.0}, "test_layer is 1.0: give a whole number"),
        ({"test_layer": True}, "test_layer is True: give a whole number"),
        ({"calibration_requests": "8"}, "calibration_requests is '8': give a whole number"),
        ({"mode": 1, "K": {True: 4}}, "K names layer True"),
        ({"mode": 1, "K": True}, "K is True: give whole numbers"),
        ({"mode": 1, "K": [4, 4.5, 4]}, "K is 4.5: give whole numbers"),
        ({"mode": 1, "K": 10**20}, "K is 100000000000000000000: give a finite number below 2"),
        ({"sdc_scale": True}, "sdc_scale is True: give a number"),
        ({"sdc_scale": float("nan")}, "sdc_scale is nan: give a finite number"),
        ({"calib_add_sigma": True}, "calib_add_sigma is True: give a number"),
        ({"calib_add_sigma": 10**400}, "calib_add_sigma is 10*: give a number"),
        ({"calib_sample_frac": True}, "calib_sample_frac is True: give a share"),
        ({"calib_load_path": 5}, "calib_load_path is 5: give text"),
        ({"placement": 5}, "placement is 5: choose one of"),
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


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (TopTheta(floor="x"), "floor is 'x': give a whole number"),  # type: ignore[arg-type]
        (TopTheta(cap=2.5), "cap is 2.5: give a whole number"),  # type: ignore[arg-type]
        (TopTheta(capk="no"), "capk is 'no': give True or False"),  # type: ignore[arg-type]
        (TopTheta(cap=10**20), "cap is 100000000000000000000: give a finite number below 2"),
        (StreamingLLM(sinks="2"), "sinks is '2': give a whole number"),  # type: ignore[arg-type]
        (StreamingLLM(sinks=1.5), "sinks is 1.5: give a whole number"),  # type: ignore[arg-type]
        (H2O(recent="a"), "recent is 'a': give a number"),  # type: ignore[arg-type]
        (H2O(prefill=1), "prefill is 1: give text"),  # type: ignore[arg-type]
        (Quest(page=2.5), "page is 2.5: give a whole number"),  # type: ignore[arg-type]
        (Quest(dense_layers=1.5), "dense_layers is 1.5: give a whole number"),  # type: ignore[arg-type]
        (TopP(p="a"), "p is 'a': give a number"),  # type: ignore[arg-type]
        (TopP(p=True), "p is True: give a number"),
        (SnapKV(window=2.5), "window is 2.5: give a whole number"),  # type: ignore[arg-type]
        (SnapKV(pool_size=3.0), "pool_size is 3.0: give a whole number"),  # type: ignore[arg-type]
        (SkipSoftmax(tile=2.5), "tile is 2.5: give a whole number"),  # type: ignore[arg-type]
    ],
)
def test_bad_options_of_a_method(tiny_model: LlamaForCausalLM, method: Method, message: str) -> None:
    update_model(tiny_model)
    with pytest.raises(UsageError, match=message):
        set_params(tiny_model, method=method)


def test_a_repeated_option_is_refused() -> None:
    with pytest.raises(UsageError, match="method streaming_llm:sinks is given twice"):
        parse_method("streaming_llm:sinks=2,sinks=3")


def test_numbers_of_numpy(tiny_model: LlamaForCausalLM) -> None:
    """They become Python's own."""
    update_model(tiny_model)
    for k in (8, np.int64(8), torch.tensor(8), np.full(3, 8), [np.int32(8)] * 3, {np.int64(1): np.int64(8)}):
        set_params(tiny_model, mode=np.int64(1), K=k, sdc="exact", sdc_scale=np.float32(0.5))
        assert get_params(tiny_model).k_per_layer(3, default=8) == (8, 8, 8)
        assert type(get_params(tiny_model).k_per_layer(3)[1]) is int
    set_params(tiny_model, vmc=np.True_, test_layer=np.int64(0))
    set_params(tiny_model, method=StreamingLLM(sinks=np.int64(2)))  # type: ignore[arg-type]
    params = get_params(tiny_model)
    assert params.vmc is True and type(params.test_layer) is int and params.method == StreamingLLM(sinks=2)
    set_params(tiny_model, method=TopP(p=1), sdc="none", vmc=False)
    tiny_model(tokens(length=10))
