"""Answers are computed in groups of similar length."""

from itertools import combinations

import numpy as np
import pytest

from toptheta.eval.likelihoods import alike


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


def test_examples() -> None:
    assert alike([3, 40, 4, 38], 20) == [[1, 3], [2, 0]]
    assert alike([3, 40, 4, 38], 1000) == [[1, 3, 2, 0]]
    assert alike([5], 20) == [[0]] and alike([0, 0], 0) == [[0, 1]]
