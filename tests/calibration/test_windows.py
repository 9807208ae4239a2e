"""Calibration of models with layers that have a sliding window, behind which all rows are equally long."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.helpers.families import make
from topk_llama import set_params, update_model
from toptheta.models.calibrate import calibrations, same_sparse_layers
from toptheta.models.control import get_params, record_statistics
from toptheta.models.planning import announce_prompts, begin_prompts
from toptheta.models.recorder import Recorder

WINDOW, LENGTH = 24, 200


def kept_by_layer(k: int, calib_to: str, frac: float) -> tuple[list[float], int]:
    """Kept elements of a row by layer, calibrated on announced prompts, and how many layers were sampled."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    kinds = ["sliding_attention", "full_attention"] * 2
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma3TextConfig(
        **sizes, **heads, max_position_embeddings=512, sliding_window=WINDOW, layer_types=kinds,
        initializer_range=0.3,
    )  # fmt: skip
    model = update_model(Gemma3ForCausalLM(config).eval().requires_grad_(False))
    set_params(
        model,
        mode=0,
        K=k,
        placement="post-softmax",
        calib_to=calib_to,
        calibrate=True,
        calib_sample_frac=frac,
    )
    prompts = {
        str(i): torch.randint(64, (1, LENGTH), generator=torch.Generator().manual_seed(i)) for i in range(4)
    }
    announce_prompts(model, dict.fromkeys(prompts, (0, LENGTH)))
    for key, ids in prompts.items():
        begin_prompts(model, [key])
        model(ids)
    sampled = len(calibrations(model))
    set_params(model, calibrate=False)
    recorder = Recorder()
    record_statistics(model, recorder)
    model(torch.randint(64, (1, LENGTH), generator=torch.Generator().manual_seed(7)))
    prefill, _ = recorder.drain()
    return [float(record.attn.mean()) / LENGTH for record in prefill.values()], sampled


@pytest.mark.parametrize("calib_to", ["budget", "k"])
def test_a_share_of_the_rows(calib_to: str) -> None:
    """A tenth of the rows gives about the thresholds that all rows give."""
    all_rows, _ = kept_by_layer(8, calib_to, 1.0)
    some, _ = kept_by_layer(8, calib_to, 0.1)
    assert 6.5 < sum(all_rows) / 4 < 9.5
    assert some == pytest.approx(all_rows, rel=0.3)


@pytest.mark.parametrize("calib_to", ["budget", "k"])
def test_k_above_the_window(calib_to: str) -> None:
    """Layers that can never have more keys stay dense, and the others get the budget alone."""
    kept, sampled = kept_by_layer(WINDOW, calib_to, 1.0)
    assert sampled == 2
    dense = (sum(range(WINDOW)) + (LENGTH - WINDOW) * WINDOW + WINDOW) / LENGTH
    assert kept[0] == kept[2] == pytest.approx(dense, abs=0.2)
    assert 0.8 * WINDOW < kept[1] < 1.3 * WINDOW and 0.8 * WINDOW < kept[3] < 1.3 * WINDOW


def test_a_k_on_each_side_of_the_window() -> None:
    """They need thresholds of different layers, so no calibration serves both."""
    model = update_model(make("gemma2"))
    window, layers = model.config.sliding_window, model.config.num_hidden_layers
    params = get_params(model).changed({"mode": 0})
    below, above, further = ((k,) * layers for k in (window - 1, window, window + 9))
    assert same_sparse_layers(model, params, above, further)
    assert not same_sparse_layers(model, params, below, above)
