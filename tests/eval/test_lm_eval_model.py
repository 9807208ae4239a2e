"""The lm-eval model: log-likelihoods with shared prompts are those of the stock class."""

from pathlib import Path

import numpy as np


def test_shared_prompts_equal_the_stock_harness(folder_model: str, here: Path) -> None:
    """Log-likelihoods of dense attention are those of lm-eval's own class, in batches too; likewise sparse
    ones."""
    from lm_eval.api.registry import get_model

    from topk_llama import set_params, update_model
    from toptheta.eval.lm_eval_model import TopThetaLM

    texts = [
        "Question: Which one floats?\nAnswer:",
        "Question: What is ice made of, at school and at home?\nAnswer:",
    ]
    answers = [" wood", " a stone that is heavy", " water", " cold water and nothing else"]
    requests = []
    ours = TopThetaLM(pretrained=folder_model, device="cpu", dtype="float32", batch_size=1)
    for text in texts:
        for answer in answers:
            requests.append(((text, answer), *ours._encode_pair(text, answer)))
    stock = get_model("hf")(pretrained=folder_model, device="cpu", dtype="float32", batch_size=1)
    expected = stock._loglikelihood_tokens(requests, disable_tqdm=True)
    for batch_size in (1, 2):
        ours.batch_size_per_gpu = batch_size
        found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-4)
    update_model(stock.model)
    for model in (stock.model, ours.model):
        set_params(model, mode=1, K=5, sdc="exact", vmc=True)
    expected = stock._loglikelihood_tokens(requests, disable_tqdm=True)
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-4)
