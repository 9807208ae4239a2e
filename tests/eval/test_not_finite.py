"""Numbers that are not finite stop a run with the request, the layer and the head."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.eval.helpers import gen_settings, qa_settings
from toptheta.eval.runner import evaluate
from toptheta.eval.settings import HUMANEVAL
from toptheta.util.errors import UsageError

HEAD = "the attention scores of layer 1, head 2 are not finite numbers; if the model overflows, use --dtype"


@pytest.fixture
def overflowing(folder_model: str, small_tokenizer, here_with_text: Path) -> str:
    """The small folder model with scores too large for float32: of queries and keys that are not."""
    model = AutoModelForCausalLM.from_pretrained(folder_model)
    attention = model.model.layers[1].self_attn
    query, key = (one.weight.view(-1, 16, 48) for one in (attention.q_proj, attention.k_proj))
    query[2] *= 1e20
    key[0] *= 1e20  # of heads 0 to 2
    query[:2] = 0.0
    model.save_pretrained("overflowing")
    small_tokenizer.save_pretrained("overflowing")
    return "overflowing"


@pytest.mark.parametrize("mode", [0, 1, 3])  # calibrating; sparse; dense
@pytest.mark.parametrize("dataset", ["perplexity", HUMANEVAL])
def test_generation(overflowing: str, dataset: str, mode: int) -> None:
    torch.manual_seed(0)
    settings = gen_settings(
        overflowing,
        dataset=dataset,
        mode=(mode,),
        text="text.txt" if dataset == "perplexity" else None,
        num_tasks=2,
    )
    kind = "(calibration0|window0)" if dataset == "perplexity" else "HumanEval/0#0"
    with pytest.raises(UsageError, match=f"^{kind}: {HEAD}"):
        evaluate(settings)


@pytest.mark.parametrize("mode", [0, 1, 3])
def test_questions(overflowing: str, mode: int) -> None:
    with pytest.raises(UsageError, match=rf"^the prompt that ends in '.*Answer:': {HEAD}"):
        evaluate(qa_settings(overflowing, mode=(mode,)))
