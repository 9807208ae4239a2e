"""set_params by layer: one sparse layer only, and K of each."""

import pytest
from transformers import LlamaForCausalLM

from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.models.control import record_statistics
from toptheta.models.patch import layer_states
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
    for k, message in (
        ([3, 4], "lists 2 values"),
        ({5: 3}, "layer 5"),
        ("64", "K is '64'"),
        (2.5, "K is 2.5"),
    ):
        with pytest.raises(UsageError, match=message):
            set_params(tiny_model, K=k)
