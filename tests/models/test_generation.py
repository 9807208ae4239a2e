"""Prompts in chunks: generation, likelihood and calibration are those without chunks."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, StoppingCriteria

from toptheta.models import generation as chunked
from toptheta.models.control import model_state, record_statistics, set_params
from toptheta.models.patch import layer_states, update_model
from toptheta.models.recorder import Recorder

METHODS: dict[str, dict[str, Any]] = {
    "dense": {"mode": 3, "placement": "none"},
    "top-k": {"mode": 1, "K": 12, "placement": "pre-softmax", "sdc": "exact", "vmc": True},
    "top-theta": {"mode": 0, "K": 12, "placement": "pre-softmax", "sdc": "exact", "vmc": True},
    "top-theta capped": {"mode": 0, "K": 12, "placement": "pre-softmax", "capk": True},
    "top-theta post": {"mode": 0, "K": 12, "placement": "post-softmax", "vmc": True},
}


@pytest.fixture(params=METHODS)
def steered(request, tiny_model) -> LlamaForCausalLM:
    """The tiny model in one of the methods, its thresholds calibrated."""
    update_model(tiny_model)
    method = METHODS[request.param]
    if method["mode"] == 0:
        set_params(tiny_model, **method | {"capk": False}, calibrate=True, calib_sample_frac=1.0)
        for seed in range(3):
            tiny_model(torch.randint(97, (2, 61), generator=torch.Generator().manual_seed(seed)))
    set_params(tiny_model, **method, calibrate=False)
    return tiny_model


def prompts(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded at the left."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        ids[i, -length:] = torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(9 + i))
        mask[i, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("chunk", [7, 19, 48])  # 49 = 7 * 7 = 48 + 1: the last chunk of one row is no decode
def test_generation_in_chunks(steered: LlamaForCausalLM, path: str, chunk: int) -> None:
    """Logits, tokens and every count are those without chunks; a batch padded at the left included."""
    for lengths in ((49,), (49, 20, 41)):
        got = []
        for size in (None, chunk):
            recorder = Recorder()
            record_statistics(steered, recorder)
            out = chunked.generate(
                steered,
                prompts(lengths),
                size,
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=[],
            )
            got.append((out, *recorder.drain()))
            record_statistics(steered, None)
            assert not model_state(steered).in_prompt
        (tokens, prefill, decode), (tokens_2, prefill_2, decode_2) = got
        assert torch.equal(tokens, tokens_2)
        assert [len(steps) for steps in decode.values()] == [len(steps) for steps in decode_2.values()]
        assert len(decode[0]) == 5
        for layer in prefill:
            assert (prefill_2[layer].n == list(lengths)).all()
            for one, two in [
                (prefill[layer], prefill_2[layer]),
                *zip(decode[layer], decode_2[layer]),
            ]:
                for name in ("attn", "vrow", "full", "topk", "n"):
                    np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


class StopAt(StoppingCriteria):
    """Ends sequence i after stops[i] new tokens. going: the sequences that it is asked about."""

    def __init__(self, start: int, stops: list[int]):
        self.start, self.stops, self.going = start, stops, list(range(len(stops)))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        new = input_ids.shape[1] - self.start
        return torch.tensor([new >= self.stops[i] for i in self.going])


@pytest.mark.parametrize("chunk", [None, 16])
def test_finished_sequences_leave(steered: LlamaForCausalLM, path: str, chunk: int | None) -> None:
    """The others' tokens are those of a whole batch, and so are the counts of everybody's own steps."""
    batch, stops, left = prompts((49, 20, 41)), [6, 2, 4], list[list[int]]()
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": [],
    }
    got = []
    for leaving in (False, True):
        recorder = Recorder()
        record_statistics(steered, recorder)
        if leaving:
            stop = StopAt(49, stops)

            def go_on(going: list[int], stop: StopAt = stop) -> None:
                left.append(going)
                stop.going = going

            out = chunked.generate(steered, batch, chunk, stop, go_on, **options)
        else:
            out = chunked.generate(steered, batch, chunk, **options)
        got.append((out, *recorder.drain()))
        record_statistics(steered, None)
    (tokens, prefill, decode), (tokens_2, prefill_2, decode_2) = got
    assert left == [[0, 2], [0]]
    for i, stop_at in enumerate(stops):
        assert torch.equal(tokens[i, :stop_at], tokens_2[i, :stop_at])
        assert not tokens_2[i, stop_at:].any()
    for layer in prefill:
        np.testing.assert_array_equal(prefill[layer].attn, prefill_2[layer].attn)
        assert len(decode[layer]) == len(decode_2[layer]) == 5
        for step, (one, two) in enumerate(zip(decode[layer], decode_2[layer])):
            live = np.array([step + 1 < stop_at for stop_at in stops])
            for name in ("attn", "vrow", "full", "n"):
                whole, own = getattr(one, name), getattr(two, name)
                np.testing.assert_array_equal(whole[live], own[live], err_msg=name)
                assert not own[~live].any()


def test_likelihood_in_chunks(steered: LlamaForCausalLM, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """-log p of each token: from whole logits by hand, and the same in chunks."""
    ids = prompts((49, 49))["input_ids"]
    logits = steered(ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(2, 48)
    monkeypatch.setattr(chunked, "LOGIT_ROWS", 10)
    for chunk in (None, 7, 16, 48, 49, 100):
        got = chunked.negative_log_likelihood(steered, ids, chunk)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_calibration_in_chunks(tiny_model: LlamaForCausalLM, path: str) -> None:
    """Every row is sampled once, and thresholds are those without chunks."""
    update_model(tiny_model)
    ids, theta = prompts((49,))["input_ids"], []
    for chunk in (None, 16):
        set_params(
            tiny_model, mode=0, K=12, placement="pre-softmax", calibrate=True, calib_tac=True,
            calib_sample_frac=1.0,
        )  # fmt: skip
        chunked.negative_log_likelihood(tiny_model, ids, chunk)
        set_params(tiny_model, calibrate=False)
        theta.append([layer.theta for layer in layer_states(tiny_model)])
    for one, two in zip(*theta):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
