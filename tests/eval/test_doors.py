"""The small real model through all doors, update_model, attn_implementation and lm_eval: the same answers to
the last bit; and the harness gets answers right for families whose logits are not lm_head's output."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from transformers import AutoModelForCausalLM

from tests.helpers.families import make
from topk_llama import load_calibration, save_calibration, set_params, update_model
from toptheta.eval.harness_model import TopThetaHarnessLM
from toptheta.models.loading import find_model, load_model, unpacked

PROMPTS = (
    "Water boils at a lower temperature on a mountain because the pressure of the air is",
    "The river rises in the hills, runs past three old mills and the town, and at last reaches the",
)
TEXTS = [
    "Question: Which one floats?\nAnswer:",
    "Question: What is ice made of, at school and at home?\nAnswer:",
]
ANSWERS = [" wood", " a stone that is heavy", " cold water and nothing else"]
ARGUMENTS = {"device": "cpu", "dtype": "float32", "batch_size": 1}


def answers(lm) -> list[float]:
    requests = [((text, answer), *lm._encode_pair(text, answer)) for text in TEXTS for answer in ANSWERS]
    return [found for found, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]


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


@pytest.mark.parametrize("name", ["gemma2", "granite", "gpt_oss"])
def test_families_in_the_harness(name: str, small_tokenizer, tmp_path: Path) -> None:
    make(name, vocab_size=len(small_tokenizer)).save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    folder = str(tmp_path)
    stock = get_model("hf")(pretrained=folder, attn_implementation="eager", **ARGUMENTS)
    dense = get_model("toptheta")(pretrained=folder, method="dense", **ARGUMENTS)
    np.testing.assert_allclose(answers(dense), answers(stock), rtol=1e-4)
    update_model(stock.model)
    set_params(stock.model, mode=1, K=3, sdc="exact", vmc=True)
    sparse = get_model("toptheta")(pretrained=folder, method="top_k", k=3, sdc="exact", vmc=True, **ARGUMENTS)
    np.testing.assert_allclose(answers(sparse), answers(stock), rtol=1e-4)
