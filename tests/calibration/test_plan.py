"""Rows that are drawn for a prompt are the same whatever chunks, batches, padding or processes compute it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from tests.eval.helpers import calibrating_settings, gen_settings, only_run
from topk_llama import set_params, update_model
from toptheta.calibration.plan import RowPlan
from toptheta.calibration.tables import CalibrationTables, load_tables
from toptheta.models.calibrate import begin_calibration, calibrated_tables
from toptheta.models.control import get_params, reading_prompt
from toptheta.models.planning import announce_prompts, begin_prompts

K, FRAC = 6, 0.3
LENGTHS = {"a": 40, "b": 33, "c": 40, "d": 9, "e": 25, "f": 5}
PROMPTS = {
    key: torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n + i))
    for i, (key, n) in enumerate(LENGTHS.items())
}


def tables(
    model: LlamaForCausalLM, batches: list[list[str]], chunk: int = 99, left: bool = False
) -> CalibrationTables:
    """What is calibrated on all prompts in these batches, some of which another process may compute."""
    update_model(model)
    set_params(model, mode=3, calibrate=False)
    set_params(model, mode=0, K=K, calib_sample_frac=FRAC, calibrate=True)
    begin_calibration(model, get_params(model), seed=3)
    announce_prompts(model, {key: (0, len(ids)) for key, ids in PROMPTS.items()})
    for batch in batches:
        begin_prompts(model, batch)
        longest = max(LENGTHS[key] for key in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, key in enumerate(batch):
            at = slice(longest - LENGTHS[key], None) if left else slice(LENGTHS[key])
            ids[row, at], mask[row, at] = PROMPTS[key], 1
        positions, cache = (mask.cumsum(dim=1) - 1).clamp_min(0), DynamicCache(config=model.config)
        for start in range(0, longest, chunk):
            part = slice(start, start + chunk)
            given = {"attention_mask": mask[:, : start + chunk], "position_ids": positions[:, part]}
            with reading_prompt(model):
                model(ids[:, part], past_key_values=cache, **given)
    return calibrated_tables(model)


WAYS = {
    "batches": {"batches": [["a", "b", "c"], ["d", "e", "f"]]},
    "another order": {"batches": [["f", "c"], ["e", "b"], ["a", "d"]]},
    "left padding": {"batches": [["a", "f", "b"], ["d", "e", "c"]], "left": True},
    "chunks": {"batches": [[key] for key in PROMPTS], "chunk": 7},
    "chunks of one row": {"batches": [["a", "d", "b"], ["f", "e", "c"]], "chunk": 13, "left": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_rows(way: str, path: str, tiny_model: LlamaForCausalLM) -> None:
    alone = tables(tiny_model, [[key] for key in PROMPTS])
    other = tables(tiny_model, **WAYS[way])
    for layer in range(3):
        np.testing.assert_array_equal(other.theta[layer].samples, alone.theta[layer].samples)
        known = alone.theta[layer].samples > 0
        a, b = alone.theta[layer].values[known], other.theta[layer].values[known]
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    per_prompt = [max(0, n - K) for n in LENGTHS.values()]
    assert alone.theta[0].samples[0].sum() == sum(-(-3 * n // 10) for n in per_prompt)


def test_processes_share_the_prompts(tiny_model: LlamaForCausalLM) -> None:
    """What two processes sample, each its own prompts, adds up to what one does."""
    whole = tables(tiny_model, [[key] for key in PROMPTS])
    parts = [tables(tiny_model, [list(keys)]) for keys in ("ace", "bdf")]
    for layer in range(3):
        held = [part.theta[layer] for part in parts]
        width = whole.theta[layer].samples.shape[1]
        samples = [np.pad(one.samples, ((0, 0), (0, width - one.samples.shape[1]))) for one in held]
        np.testing.assert_array_equal(sum(samples), whole.theta[layer].samples)


def test_lengths_drawn_least_come_first() -> None:
    """20 prompts of one length, of each a tenth: drawn more evenly than by chance, which leaves 12 of 100
    lengths out and has a variance of 1.8."""
    plan = RowPlan(0.1, 0, 200)
    keys = [f"prompt{i}" for i in range(20)]
    plan.announce(dict.fromkeys(keys, (0, 110)))
    n, total = torch.arange(111)[None], torch.zeros(111, dtype=torch.long)
    for key in keys:
        plan.begin([key])
        rows = plan.rows(10, n)
        assert rows is not None and rows.sum() == 10 and not rows[0, :11].any()
        total += rows[0]
    assert (total[11:] == 0).sum() < 8 and total[11:].float().var() < 1.4


def test_decoded_rows() -> None:
    """Behind the prompt each row is sampled with the same probability, whatever the batch."""
    plan = RowPlan(0.25, 0, 5000)
    plan.announce({"a": (0, 10), "b": (0, 500)})
    n = torch.arange(501, 4501)[None]
    plan.begin(["a"])
    alone = plan.rows(4, n)
    plan.begin(["b", "a"])
    both = plan.rows(4, n.expand(2, -1))
    assert alone is not None and both is not None and torch.equal(both[1:], alone)
    assert 880 < alone.sum() < 1120 and not torch.equal(both[0], both[1])  # 1000, give or take 4 deviations
    assert plan.rows(4, n) is None  # a call of another batch


def thresholds(folder: Path) -> CalibrationTables:
    return load_tables(folder, 2, 6)


def check_same(folders: list[Path]) -> None:
    found = [thresholds(folder) for folder in folders]
    for a, b in itertools.pairwise(found):
        for layer in range(2):
            assert a.theta[layer].samples.sum() > 0
            np.testing.assert_array_equal(a.theta[layer].samples, b.theta[layer].samples)
            np.testing.assert_allclose(a.theta[layer].values, b.theta[layer].values, rtol=1e-4, atol=1e-5)


def test_runs_of_texts(folder_model: str, here_with_text: Path) -> None:
    """gen_llama.py: prompts in chunks and in batches."""
    from toptheta.eval.runner import evaluate

    ways = {"plain": {"prefill_chunk": None}, "chunks": {"prefill_chunk": 60}, "batches": {"batch_size": 2}}
    for way, changes in ways.items():
        common = {"dataset": "needle", "needle_lengths": (150,), "calibrate_only": True, "mode": (0,)}
        common |= {
            "calib_samples": 4,
            "calib_sample_frac": 0.2,
            "output_dir": way,
            "sdc": "none",
            "vmc": False,
        }
        evaluate(gen_settings(folder_model, **common | changes))
    check_same([only_run(here_with_text / way) for way in ways])


@pytest.mark.parametrize("task", ["everyday_science", "gsm8k"])
def test_runs_of_questions(task: str, folder_model: str, here: Path, request: pytest.FixtureRequest) -> None:
    """test_llama.py: answers behind shared prompts, and generated ones, in batches."""
    from toptheta.eval.runner import evaluate

    own = task == "everyday_science"
    data = None if own else str(request.getfixturevalue("local_data"))
    for batch_size in (1, 2):
        evaluate(
            calibrating_settings(
                folder_model, calib_sample_frac=0.2, calib_samples=2, batch_size=batch_size, task=task,
                data_dir=data, calibrate_only=True, output_dir=str(batch_size), num_fewshot=2 if own else 0,
            )
        )  # fmt: skip
    check_same([only_run(here / "1"), only_run(here / "2")])
