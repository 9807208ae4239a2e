"""The rows of a mask: which keys each sequence sees."""

import gc
import weakref

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers.models import tokens
from topk_llama import set_params, update_model
from toptheta.attention.rows import _rows_of_mask, rows_of
from toptheta.util.errors import UsageError


def test_span_of_the_visible_keys():
    """First visible key and the one after the last, by sequence; nothing visible is an empty span."""
    mask = torch.zeros(3, 1, 2, 9, dtype=torch.bool)
    mask[0, 0, 0, 2:5] = mask[0, 0, 1, 7] = mask[1, 0, 1, 8] = True
    rows = rows_of(mask, 2, 9, torch.device("cpu"))
    assert rows.span().tolist() == [[2, 8], [8, 9], [0, 0]] and rows.span() is rows.span()
    assert rows_of(None, 1, 9, torch.device("cpu")).span() is None


@pytest.mark.parametrize("hidden", [float("-inf"), -1e4, torch.finfo(torch.float32).min])
def test_additive_masks(hidden: float):
    """0 is visible, very low numbers are not; anything else would be a bias, which is no mask."""
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    mask = torch.where(visible, 0.0, hidden)[None, None]
    assert torch.equal(rows_of(mask, 4, 4, mask.device).mask[0, 0], visible)
    for bias in (-0.5, 2.0):
        wrong = mask.clone()
        wrong[0, 0, 2, 1] = bias
        with pytest.raises(UsageError, match="adds a bias to the scores, which top_theta does not support"):
            rows_of(wrong, 4, 4, mask.device)


def test_masks_that_are_broadcast_or_of_heads() -> None:
    """One row for all queries is expanded, as sdpa does; a mask for each head is refused."""
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[0, ..., 0] = False
    rows = rows_of(mask, 3, 6, torch.device("cpu"))
    assert rows.n.tolist() == [[5, 5, 5], [6, 6, 6]]
    assert rows.mask is not None and rows.mask.shape == (2, 1, 3, 6)
    with pytest.raises(UsageError, match=r"shape \[2, 4, 3, 6\]"):
        rows_of(torch.ones(2, 4, 3, 6, dtype=torch.bool), 3, 6, torch.device("cpu"))


@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("q_len", [1, 3])
def test_the_unused_end_of_a_static_cache(q_len: int, tail: int) -> None:
    """Of a mask that is not known, the queries lie at the last key that any row sees; padding, left or right,
    is not real."""
    visible = torch.ones(q_len, 9, dtype=torch.bool).tril(9 - q_len)
    mask = torch.nn.functional.pad(visible.expand(3, 1, -1, -1), (0, tail))
    mask[1, :, :, : 9 - q_len + 1] = False  # the first of its rows is padding
    mask[2, :, :, 8] = False  # the last one is
    real = rows_of(mask.clone(), q_len, 9 + tail, mask.device).real
    expected = torch.ones(3, q_len, dtype=torch.bool)
    expected[1, 0] = expected[2, -1] = False
    assert torch.equal(real, expected)


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_is_changed_in_place(inference: bool) -> None:
    with torch.inference_mode(inference):
        mask = torch.zeros(1, 1, 1, 6, dtype=torch.bool)
        for count in range(1, 7):
            mask[..., :count] = True
            assert rows_of(mask, 1, 6, torch.device("cpu")).n.item() == count


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_is_not_kept_alive(dtype: torch.dtype) -> None:
    """What is derived from it is shared while it lives, and freed with it."""
    visible = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask = visible.clone() if dtype == torch.bool else torch.where(visible, 0.0, float("-inf"))
    once, again = (rows_of(mask, 5, 5, mask.device) for _ in range(2))
    assert once.span() is again.span() and once.n is again.n
    assert torch.equal(once.mask, visible) and torch.equal(again.mask, visible)
    alive = weakref.ref(mask)
    del mask, once, again
    gc.collect()
    assert alive() is None


def test_masks_of_a_model_are_not_kept_alive(tiny_model: LlamaForCausalLM) -> None:
    update_model(tiny_model)
    set_params(tiny_model, mode=1, K=4, sdc="exact", vmc=True)
    ids, real = tokens(batch=2, length=12), torch.ones(2, 12, dtype=torch.int64)
    real[1, :5] = 0
    gc.collect()
    before = len(_rows_of_mask)
    for cache in ({}, {"cache_implementation": "static"}):
        tiny_model.generate(
            ids, attention_mask=real, max_new_tokens=3, do_sample=False, pad_token_id=0, **cache
        )
        gc.collect()
        assert len(_rows_of_mask) <= before
