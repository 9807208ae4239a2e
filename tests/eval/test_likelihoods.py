"""Answers are computed in groups of similar length."""

from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from toptheta.eval.likelihoods import Group, alike, score
from toptheta.models.control import record_statistics
from toptheta.models.patch import update_model
from toptheta.models.recorder import Recorder


def cost(groups: list[list[int]], lengths: list[int], call: int) -> int:
    return sum(call + len(group) * max(lengths[i] for i in group) for group in groups)


@pytest.mark.parametrize("seed", range(30))
def test_no_groups_cost_less(seed: int) -> None:
    """Of all ways to cut the sorted answers, and each answer is in one group."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 12, generator.integers(1, 11)).tolist()
    call = int(generator.choice([0, 1, 7, 30, 1000]))
    groups = alike(lengths, call)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best = min(
        cost([by_length[a:b] for a, b in zip((0, *cuts), (*cuts, len(lengths)))], lengths, call)
        for count in range(len(lengths))
        for cuts in combinations(range(1, len(lengths)), count)
    )
    assert cost(groups, lengths, call) == best


def test_answers_of_one_token(tiny_model: LlamaForCausalLM) -> None:
    """They are read off their prompts, which count once; beside a longer one prompts count for each."""
    model, recorder = update_model(tiny_model), Recorder()
    record_statistics(model, recorder)
    prompts = [tuple(range(3, 12)), tuple(range(20, 27))]
    one: list[Group] = [(prompt, {f"{i}a": (5,), f"{i}b": (6,)}) for i, prompt in enumerate(prompts)]
    more: list[Group] = [*one, (tuple(range(40, 45)), {"2a": (5, 7, 8)})]
    for batch, sequences in ((one, 2), (more, 5)):
        scored = score(model, batch, None, lambda keys: None, str, None)
        assert sum(len(part.prefill[0].attn) for part in scored) == sequences
        found = {key: value for part in scored for key, value in part.found.items()}
        record_statistics(model, None)
        for prompt, group in batch:
            for key, answer in group.items():
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
                expected = sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
                assert found[key][0] == pytest.approx(float(expected), rel=1e-4)
        record_statistics(model, recorder)


def test_examples() -> None:
    assert alike([3, 40, 4, 38], 20) == [[1, 3], [2, 0]]
    assert alike([3, 40, 4, 38], 1000) == [[1, 3, 2, 0]]
    assert alike([5], 20) == [[0]] and alike([0, 0], 0) == [[0, 1]]
