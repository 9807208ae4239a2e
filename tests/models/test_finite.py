"""What is no finite number stops a run, with the request and where it begins."""

import pytest
import torch

from tests.helpers.models import SPARSE, steer, tokens
from topk_llama import set_params, update_model
from toptheta.models import finite
from toptheta.models.generation import generate
from toptheta.util.errors import UsageError

DENSE = {"mode": 3}


def run(model, batch):
    """Replies to prompts of these seeds, of one length each, padded at the left."""
    ids = [
        torch.cat([torch.zeros(3 * i, dtype=torch.long), tokens(length=30 - 3 * i, seed=s)[0]])
        for i, s in enumerate(batch)
    ]
    ids = torch.stack(ids)
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return generate(model, inputs, None, max_new_tokens=3, do_sample=False, pad_token_id=0)


def checked(model, batch=(1, 2)):
    return finite.checked(model, lambda some: run(model, some), list(batch), lambda seed: f"prompt {seed}")


def spoil_queries(model, value):
    model.model.layers[1].self_attn.q_proj.weight[16 * 4 : 16 * 5] = value  # head 4


def spoil_scores(model):
    """Finite queries and keys whose product is not."""
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight[16 * 4 : 16 * 5] *= 1e20
    attention.k_proj.weight[16 * 1 : 16 * 2] *= 1e20  # of heads 3 to 5
    attention.q_proj.weight[16 * 3 : 16 * 4] = attention.q_proj.weight[16 * 5 : 16 * 6] = 0.0


SPOILT = {
    "the queries of layer 1, head 4": lambda model: spoil_queries(model, float("nan")),
    "the keys of layer 2, KV head 1": lambda m: (
        m.model.layers[2].self_attn.k_proj.weight[16:].fill_(torch.inf)
    ),
    "the values of layer 0, KV head 0": lambda m: (
        m.model.layers[0].self_attn.v_proj.weight[:16].fill_(torch.nan)
    ),
    "the attention scores of layer 1, head 4": spoil_scores,
    "the outputs of layer 1, after its attention,": lambda m: (
        m.model.layers[1].mlp.down_proj.weight[0].fill_(torch.nan)
    ),
    "the last layer's outputs": lambda m: m.model.norm.weight[3:4].fill_(torch.nan),
    "the logits": lambda m: m.lm_head.weight[5].fill_(torch.inf),
}


@pytest.mark.parametrize(
    "params", [DENSE, SPARSE["Top-theta"], SPARSE["Top-k post"]], ids=["dense", "theta", "post"]
)
@pytest.mark.parametrize("where", SPOILT)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_message_says_where_it_begins(tiny_model, where, params, implementation):
    tiny_model.set_attn_implementation(implementation)
    steer(tiny_model, params)
    SPOILT[where](tiny_model)
    with pytest.raises(UsageError) as error:
        checked(tiny_model)
    assert (
        str(error.value)
        == f"prompt 1: {where} are not finite numbers; if the model overflows, use --dtype float32."
    )


def test_the_request_is_named(tiny_model):
    """Only what the word 5 leads to is no number."""
    steer(tiny_model, SPARSE["Top-theta"])
    model, bad = tiny_model, int(tokens(length=27, seed=2)[0, 3])
    assert bad not in tokens(length=30, seed=1)
    model.model.embed_tokens.weight[bad] = torch.nan
    with pytest.raises(UsageError, match="^prompt 2: the queries of layer 0, head 0 are not"):
        checked(model)
    checked(model, [1])


@pytest.mark.parametrize("params", [DENSE, *SPARSE.values()], ids=["dense", *SPARSE])
def test_a_sound_model_answers_as_without(tiny_model, params):
    """Padding included, whose rows see nothing."""
    steer(tiny_model, params)
    assert torch.equal(checked(tiny_model), run(tiny_model, [1, 2]))


def test_while_calibrating(tiny_model):
    update_model(tiny_model)
    set_params(tiny_model, mode=0, K=6, calibrate=True, calib_sample_frac=1.0)
    checked(tiny_model)
    spoil_scores(tiny_model)
    with pytest.raises(UsageError, match="^prompt 1: the attention scores of layer 1, head 4 are not"):
        checked(tiny_model)
