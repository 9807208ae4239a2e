"""The small real model through all doors, update_model, attn_implementation and lm_eval: the same answers to
the last bit."""

import torch
from transformers import AutoModelForCausalLM

from topk_llama import load_calibration, save_calibration, set_params, update_model
from toptheta.eval.harness_model import TopThetaHarnessLM
from toptheta.models.loading import find_model, load_model, unpacked

PROMPTS = (
    "Water boils at a lower temperature on a mountain because the pressure of the air is",
    "The river rises in the hills, runs past three old mills and the town, and at last reaches the",
)


def test_the_same_answers(tmp_path, small_tokenizer) -> None:
    """Thresholds are calibrated behind the first door and loaded behind the others."""
    source = find_model("smollm2")
    ids = [small_tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    first = update_model(load_model(source, "float32"))
    dense = first(ids[1]).logits
    set_params(first, mode=0, K=6, sdc="exact", vmc=True, calib_sample_frac=1.0, calibrate=True)
    first(ids[0])
    set_params(first, calibrate=False)
    save_calibration(first, tmp_path)
    second = AutoModelForCausalLM.from_pretrained(
        unpacked(source).location, dtype=torch.float32, attn_implementation="top_theta"
    ).eval()
    load_calibration(second, tmp_path, strict=False)  # a folder says nothing of the model's name
    third = TopThetaHarnessLM(pretrained="smollm2", thresholds=str(tmp_path)).model

    expected = first(ids[1]).logits
    assert not torch.allclose(expected, dense, atol=0.1)
    replies = []
    for model in (first, second, third):
        assert torch.equal(model(ids[1]).logits, expected)
        replies.append(model.generate(ids[1], max_new_tokens=12, do_sample=False))
    assert torch.equal(replies[0], replies[1]) and torch.equal(replies[0], replies[2])
