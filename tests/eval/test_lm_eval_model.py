"""The lm-eval model: log-likelihoods with shared prompts are those of the stock class; unusual requests and
models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tests.helpers.families import make
from topk_llama import set_params, update_model
from toptheta.eval.likelihoods import MOST_ANSWERS
from toptheta.eval.lm_eval_model import TopThetaLM
from toptheta.util.errors import UsageError


@pytest.fixture(scope="module")
def lm(folder_model: str) -> TopThetaLM:
    return TopThetaLM(pretrained=folder_model, device="cpu", dtype="float32", batch_size=1)


@pytest.fixture
def shapes(lm: TopThetaLM, request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    """The sizes `(B, L)` of the model's calls."""
    seen: list[tuple[int, int]] = []
    request.addfinalizer(noted(lm, seen).remove)
    return seen


def noted(lm: TopThetaLM, seen: list[tuple[int, int]]) -> Any:
    """A hook that adds the sizes of the model's calls to `seen`."""

    def note(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(tuple((inputs[0] if inputs else named["input_ids"]).shape))

    return lm.model.model.register_forward_pre_hook(note, with_kwargs=True)


def test_shared_prompts_equal_the_stock_harness(folder_model: str, here: Path) -> None:
    """Log-likelihoods of dense attention are those of lm-eval's own class, in batches too; likewise sparse
    ones."""
    from lm_eval.api.registry import get_model

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


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2_moe"])
@pytest.mark.parametrize("method", ["dense", "top_k"])
def test_a_window_in_batches(family: str, method: str, small_tokenizer: Any) -> None:
    """A batch pads no prompt in front of an answer that the window reaches back from: the likelihoods are
    those of each prompt by itself. Prompts within the window do share batches."""
    model = update_model(make(family))
    window = model.config.sliding_window
    assert 4 < window < 16
    lm = TopThetaLM(pretrained=model, tokenizer=small_tokenizer, batch_size=1)
    set_params(lm.model, method=method, K=6)
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=generator).tolist()

    lengths = [2 * window + 4, window + 4, window + 4, 3, 2]
    requests = [(("", ""), drawn(length), drawn(size)) for length in lengths for size in (2, 4)]
    calls: list[tuple[int, int]] = []
    alone = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    lm.batch_size_per_gpu = 8
    hook = noted(lm, calls)
    together = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    hook.remove()
    np.testing.assert_allclose([x for x, _ in together], [x for x, _ in alone], rtol=1e-4)
    assert [batch for batch, _ in calls] == [2, 2, 4, 4, 4, 4]  # prompts, answers


def test_one_prompt_of_many_answers(lm: TopThetaLM, shapes: list[tuple[int, int]]) -> None:
    """They are computed in several calls, and get the same likelihoods as in one."""
    set_params(lm.model, mode=3)
    requests = [(("", str(i)), [5], [7 + i, 9, 11]) for i in range(3 * MOST_ANSWERS + 1)]
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert max(batch for batch, _ in shapes) == MOST_ANSWERS
    lm.batch_size_per_gpu = len(requests)
    together = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    lm.batch_size_per_gpu = 1
    assert max(batch for batch, _ in shapes) == len(requests)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in together], rtol=1e-5)


def test_an_answer_longer_than_the_context(lm: TopThetaLM) -> None:
    with pytest.raises(UsageError, match="an answer of 2100 tokens leaves no room for a prompt"):
        lm._loglikelihood_tokens([(("", ""), [5, 6], [7] * 2100)], disable_tqdm=True)
    with pytest.raises(UsageError, match="an answer of 2048 tokens leaves no room for a prompt"):
        replies(lm, max_gen_toks=2048)


def test_prompts_longer_than_the_context(
    lm: TopThetaLM, shapes: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """They lose their beginning; what is left is counted, and how many there are is said once."""
    set_params(lm.model, mode=3)
    lm.cut.clear()
    long, short = ("long", [5] * 3000, [7, 9, 11]), ("short", [5] * 20, [7, 9, 11])
    requests = [((name, ""), prompt, answer) for name, prompt, answer in (long, short)]
    for _ in range(2):
        lm._loglikelihood_tokens(requests, disable_tqdm=True)
        assert lm.cut == {"long"} and shapes.pop(0) == (1, 2046)
        assert (lm.tokens["long"], lm.tokens["short"]) == ({"prompt": 2046}, {"prompt": 20})
        shapes.clear()
    lm.cut.clear()
    text = "all the world " * 1000
    request = Instance("generate_until", {}, (text, {"until": ["zzz"], "max_gen_toks": 8}), 0)
    lm.generate_until([request], disable_tqdm=True)
    assert lm.tokens[text]["prompt"] == 2040 == shapes[0][1]
    said = capsys.readouterr().err
    assert said.count("1 of 2 prompts are too long for the model's context of 2048 tokens") == 1
    assert said.count("1 of 1 prompts are too long") == 1


def replies(lm: HFLM, **options: Any) -> list[str]:
    text = "Question: What is ice made of, at school and at home?\nAnswer:"
    request = Instance("generate_until", {}, (text, {"until": ["zzz"], "max_gen_toks": 5} | options), 0)
    return lm.generate_until([request] * 3, disable_tqdm=True)


def test_repeats(lm: TopThetaLM, shapes: list[tuple[int, int]]) -> None:
    """A reply that is drawn is drawn anew each time; a greedy one is computed once."""
    set_params(lm.model, mode=3)
    assert len(set(replies(lm, do_sample=True, temperature=1.0))) == 3
    shapes.clear()
    assert len(set(replies(lm, do_sample=False))) == 1
    assert len(shapes) == 5


def test_a_model_that_asks_for_a_static_cache(lm: TopThetaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    set_params(lm.model, mode=3)
    requests = [
        Instance("generate_until", {}, (text, {"until": ["a"], "max_gen_toks": 9}), i)
        for i, text in enumerate(["What floats?", "What is ice made of?", "Which one is the largest of all?"])
    ]
    monkeypatch.setattr(lm, "batch_size_per_gpu", 3)
    expected = lm.generate_until(requests, disable_tqdm=True)
    monkeypatch.setattr(lm.model.generation_config, "cache_implementation", "static")
    assert lm.generate_until(requests, disable_tqdm=True) == expected


@pytest.mark.parametrize("batch_size", [1, 0])
def test_whole_texts(lm: TopThetaLM, folder_model: str, batch_size: int, monkeypatch: Any) -> None:
    """Tasks like wikitext, also with `--batch_size auto`, which is 0."""
    set_params(lm.model, mode=3)
    texts = ["The cat sat on the mat.", "Ice is made of water. " * 3]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    stock = HFLM(pretrained=folder_model, device="cpu", dtype="float32", batch_size=1)
    expected = stock.loglikelihood_rolling(requests, disable_tqdm=True)
    monkeypatch.setattr(lm, "batch_size_per_gpu", batch_size)
    np.testing.assert_allclose(lm.loglikelihood_rolling(requests, disable_tqdm=True), expected, rtol=1e-5)
    assert lm.batch_size_per_gpu == batch_size
