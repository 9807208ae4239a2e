"""What prompts share is computed once: which beginnings those are, and that answers and statistics stay what
they are."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from tests.eval.helpers import interrupt_at, only_run, qa_settings
from tests.eval.test_several_processes import check_same
from tests.helpers.processes import run as start_processes
from topk_llama import set_params
from toptheta.eval import cell, likelihoods, lm_eval_model, partial, prefixes
from toptheta.eval.cell import Cell
from toptheta.eval.lm_eval_model import TopThetaLM
from toptheta.eval.prefixes import in_batches, shared_lengths
from toptheta.eval.runner import evaluate
from toptheta.models.control import record_statistics
from toptheta.models.recorder import Recorder
from toptheta.report.results import read_answers
from toptheta.util.errors import UsageError

Prompt = tuple[int, ...]


def most_spared(prompts: list[Prompt], depth: int = 0) -> int:
    """The most tokens that one level of groups spares, by trying each: prompts that share `depth` tokens."""
    if len(prompts) < 2:
        return 0
    by_next: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        if len(prompt) - prefixes.REST > depth:
            by_next.setdefault(prompt[depth], []).append(prompt)
    spared = (len(prompts) - 1) * depth
    if spared < max(prefixes.LEAST, prefixes.LEAST_SHARE * sum(map(len, prompts))):
        spared = 0
    return max(spared, sum(most_spared(part, depth + 1) for part in by_next.values()))


@pytest.mark.parametrize("seed", range(40))
def test_no_groups_spare_more(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "LEAST", 6)
    draw = random.Random(seed)
    made = [tuple(draw.choices(range(3), k=draw.randint(1, 5))) for _ in range(3)]
    prompts = [draw.choice(made) + draw.choice(made) * draw.randint(0, 2) + (draw.randint(0, 2),) * 2]
    prompts += [draw.choice(made) * 2 + tuple(draw.choices(range(3), k=draw.randint(0, 6))) for _ in range(9)]
    prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    found = shared_lengths(prompts)
    assert found.keys() == set(prompts)
    spared = 0
    for group in in_batches(prompts, lambda prompt: prompt[: found[prompt]], len(prompts)):
        length = found[group[0]]
        assert len({prompt[:length] for prompt in group}) == 1
        assert not length or all(len(prompt) >= length + prefixes.REST for prompt in group)
        spared += (len(group) - 1) * length
    assert spared == most_spared(prompts)


def test_examples() -> None:
    """Five shots and 20 questions each of two subjects, with words that some questions begin with; shots that
    are drawn anew, whose first is the same now and then; each prompt the beginning of the next."""
    system, which = tuple(range(9)), (7, 8, 9)
    shots = {subject: system + (subject,) * 300 for subject in (100, 200)}
    questions = [shots[subject] + which * (i % 2) + (1000 + i,) * 40 for subject in shots for i in range(20)]
    assert set(shared_lengths(questions).values()) == {309}
    drawn = [system + (i % 3,) * 60 + (i,) * 500 for i in range(30, 60)]
    assert set(shared_lengths(drawn).values()) == {0}
    growing = [tuple(range(n)) for n in range(1, 900)]
    assert 0 < len(set(shared_lengths(growing).values())) < 900
    assert shared_lengths([]) == {} and shared_lengths([(1, 2, 3)]) == {(1, 2, 3): 0}


def test_batches_do_not_mix_prefixes() -> None:
    items = ["a1", "b1", "c", "a2", "a3", "d", "b2"]
    prefix = {"a": (1,), "b": (2,)}
    assert in_batches(items, lambda item: prefix.get(item[0], ()), 2) == [
        ["a1", "a2"],
        ["a3"],
        ["b1", "b2"],
        ["c", "d"],
    ]


UNTIL = ["a", "in "]  # what a random model soon says
SHOTS = "".join(
    f"Question: What is {a} and {b}?\nAnswer: {a + b}\n\n" for a, b in zip(range(3, 9), range(20, 60, 7))
)
QUESTIONS = ["What is 2 and 3?", "Which of 7, 12 and 19 is largest?", "What is half of 44?", "What is 9?"]
ANSWERS = [" 5", " nineteen, of course"]
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"mode": 3},
    "Top-k": {"mode": 1, "sdc": "exact", "vmc": True},
    "Top-k post": {"mode": 1, "placement": "post-softmax", "vmc": True},
    "Top-theta": {"mode": 0, "sdc": "exact", "vmc": True},
    "Top-theta post": {"mode": 0, "placement": "post-softmax", "vmc": True},
    "Top-theta capped": {"mode": 0, "sdc": "exp-threshold", "capk": True},
    "Top-theta offline": {"mode": 0, "sdc": "offline-calibrated", "vmc": True},
    "value-aware": {
        "method": "top_theta:value_aware=True",
        "placement": "post-softmax",
        "calib_to": "budget",
        "vmc": True,
    },
    **{
        name: {"method": name, "vmc": False}
        for name in ("top_p", "streaming_llm", "h2o", "h2o:prefill=causal", "tova", "snapkv", "quest")
    },
}


def requests_of(lm: TopThetaLM, shots: str = SHOTS) -> list[Any]:
    texts = [f"{shots}Question: {question}\nAnswer:" for question in QUESTIONS]
    return [((text, answer), *lm._encode_pair(text, answer)) for text in texts for answer in ANSWERS]


@pytest.fixture(scope="module")
def lm(folder_model: str) -> TopThetaLM:
    return TopThetaLM(pretrained=folder_model, device="cpu", dtype="float32", batch_size=1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prefix has, as they are read."""
    lengths: list[int] = []
    read = lm_eval_model.read_prefix
    monkeypatch.setattr(
        lm_eval_model, "read_prefix", lambda model, ids: lengths.append(len(ids)) or read(model, ids)
    )
    return lengths


def prepare(lm: TopThetaLM, params: dict[str, Any]) -> None:
    plain = {"K": 16, "placement": "pre-softmax", "sdc": "none", "vmc": False, "calib_to": "k"} | params
    set_params(lm.model, mode=3)
    record_statistics(lm.model, None)
    if params.get("mode") == 0 or "value_aware" in params.get("method", ""):
        set_params(lm.model, **plain, calibrate=True, calib_sample_frac=1.0)
        lm._loglikelihood_tokens(requests_of(lm, "What was it? " * 20), disable_tqdm=True)
    set_params(lm.model, **plain, calibrate=False)


def run(lm: TopThetaLM, folder: Path, batch_size: int, generate: bool, ratio: bool) -> tuple[list[Any], dict]:
    """Answers, and all that is counted, each question by itself."""
    lm.batch_size_per_gpu = batch_size
    lm.recorder = Recorder(keep_popularity=True, effective_k=ratio)
    record_statistics(lm.model, lm.recorder)
    lm.cell = Cell(folder, (16, 16) if ratio else None, effective_k=ratio)
    try:
        if generate:
            options = {"until": UNTIL, "do_sample": False, "max_gen_toks": 12}
            texts = [f"{SHOTS}Question: {question}\nAnswer:" for question in QUESTIONS]
            found = lm.generate_until(
                [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(texts)],
                disable_tqdm=True,
            )
        else:
            found = lm._loglikelihood_tokens(requests_of(lm), disable_tqdm=True)
        counted = {name: sorted("".join(lines).splitlines()) for name, lines in lm.cell._lines.items()}
        counted |= {name: histogram.tolist() for name, histogram in lm.cell._new_histograms.items()}
        return found, counted | {"kept": lm.cell._new_kept}
    finally:
        lm.cell = lm.recorder = None
        record_statistics(lm.model, None)


@pytest.mark.parametrize(
    ("method", "generate"),
    [(name, generate) for name in METHODS for generate in (False, True)],
)
def test_the_same_as_without_sharing(
    method: str, generate: bool, lm: TopThetaLM, tmp_path: Path, reads: list[int], monkeypatch
) -> None:
    """Likelihoods and texts, elements and V rows of every head, KV bytes, lengths, effective K, popularity;
    one by one and in padded batches, answers of each length by themselves, and as transformers generates one
    by one."""
    prepare(lm, METHODS[method])
    ratio = METHODS[method].get("mode") in (0, 1)
    for batch_size in (1, 3):
        reads.clear()
        monkeypatch.setattr(likelihoods, "CALL_TOKENS", {"cpu": 1})
        found, counted = run(lm, tmp_path / str(batch_size), batch_size, generate, ratio)
        assert len(reads) == 1 and reads[0] > 100
        with monkeypatch.context() as patch:
            patch.setattr(lm_eval_model, "can_share", lambda model: False)
            patch.setattr(lm_eval_model, "_is_greedy", lambda options: False)
            patch.setattr(likelihoods, "CALL_TOKENS", {"cpu": 1000})
            size = 1 if generate else batch_size
            expected, anew = run(lm, tmp_path / f"{batch_size} anew", size, generate, ratio)
        assert len(reads) == 1
        if generate:
            assert found == expected
            assert len(set(map(len, found))) > 1 and max(lm._generated_lengths) <= 12
        else:
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-5)
        assert counted.keys() == anew.keys() and "kept" in counted
        for name in anew:
            assert counted[name] == anew[name], (name, batch_size)


def test_a_batch_is_saved_whole(lm: TopThetaLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its groups of answers are in one chunk, however long each took."""
    prepare(lm, METHODS["Top-k"])
    monkeypatch.setattr(likelihoods, "CALL_TOKENS", {"cpu": 1})
    monkeypatch.setattr(cell, "CHECKPOINT_SECONDS", 0.0)
    run(lm, tmp_path, 2, generate=False, ratio=True)
    saved = [json.loads(partial.read(chunk, cell.ANSWERS)) for chunk in partial.chunks(tmp_path / "partial")]
    assert [len(chunk["answers"]) for chunk in saved] == [2 * len(ANSWERS)] * (len(QUESTIONS) // 2)


def answers(lm: TopThetaLM, shots: str = SHOTS, **options) -> list[str]:
    options = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 7} | options
    texts = [f"{shots}Question: {question}\nAnswer:" for question in QUESTIONS]
    instances = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(texts)]
    return lm.generate_until(instances, disable_tqdm=True)


def test_what_is_left_out(lm: TopThetaLM, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods whose tiles begin with a call, calibrations, beam search, prompts that are cut, shots that
    differ: all are computed as without sharing."""
    set_params(lm.model, method="skip_softmax", placement="pre-softmax", sdc="none", vmc=False)
    lm._loglikelihood_tokens(requests_of(lm), disable_tqdm=True)
    set_params(lm.model, mode=0, K=16, calibrate=True, calib_sample_frac=1.0)
    lm._loglikelihood_tokens(requests_of(lm), disable_tqdm=True)
    set_params(lm.model, mode=3, calibrate=False)
    assert len(answers(lm, "What was it? " * 700)) == len(QUESTIONS) and not reads
    found = answers(lm, num_beams=2)
    assert len(reads) == 1  # the beams begin without it
    assert lm._prefix is None and lm._begins_with is None
    monkeypatch.setattr(lm_eval_model, "can_share", lambda model: False)
    assert answers(lm, num_beams=2) == found


def test_random_replies(lm: TopThetaLM, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers give the same texts."""
    set_params(lm.model, mode=1, K=16, placement="pre-softmax", sdc="exact", vmc=True)
    options = {"do_sample": True, "temperature": 1.0}
    torch.manual_seed(0)
    found = answers(lm, **options)
    assert len(reads) == 1
    monkeypatch.setattr(lm_eval_model, "can_share", lambda model: False)
    torch.manual_seed(0)
    assert answers(lm, **options) == found


def test_the_prefix_does_not_outlive_its_call(lm: TopThetaLM, reads: list[int]) -> None:
    """Other parameters compute another one; nothing is kept."""
    found = []
    for k in (16, 40):
        set_params(lm.model, mode=1, K=k, placement="pre-softmax", sdc="exact", vmc=True)
        found.append(lm._loglikelihood_tokens(requests_of(lm), disable_tqdm=True))
        assert lm._prefix is None and not lm._lengths
    assert len(reads) == 2 and found[0] != found[1]


def settings(folder_model: str, data: Path, **changes) -> Any:
    """Q&A whose shots are the first ones: two subjects, in batches of three."""
    options = {"mode": (0,), "task": "mmlu", "data_dir": str(data), "num_fewshot": 3, "calib_samples": 4}
    return qa_settings(folder_model, **options, batch_size=3, num_samples=14, **changes)


def rows(folder: Path) -> Path:
    """Rows of MMLU's form, made up."""
    for subject in ("anatomy", "astronomy"):
        for split, count in (("dev", 3), ("validation", 6), ("test", 8)):
            path = folder / "mmlu" / subject / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            made = [
                {
                    "question": f"In {subject}, as asked in {split}, what is {n} and {n * n}, counted "
                    "once more from the beginning, and then written down for all to see?",
                    "choices": [str(n + n * n + i) for i in range(4)],
                    "answer": n % 4,
                }
                for n in range(count)
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def test_a_run_with_shared_prefixes(
    folder_model: str, here: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted and resumed, and shared by processes: the same products to the last digit; and the answers
    in the order of the questions."""
    data = rows(here / "data")
    evaluate(settings(folder_model, data, output_dir="straight"))
    assert len(reads) == 2  # subjects
    straight = only_run(here / "straight")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings(folder_model, data, output_dir="stopped"))
    stopped = only_run(here / "stopped")
    assert not list(stopped.rglob("results.json"))
    evaluate(settings(folder_model, data, output_dir="stopped"), resume=str(stopped))
    check_same(straight, stopped)
    start_processes(2, here / "logs", evaluate, settings(folder_model, data, output_dir="several"))
    check_same(straight, only_run(here / "several"))
    keys = [json.loads(line)["key"] for line in (straight / "answers.jsonl").read_text().splitlines()]
    numbers = [(key.split("/")[0], int(key.split("/")[1])) for key in keys]
    assert numbers == sorted(numbers) and len(numbers) == 14


def test_fixed_shots(
    folder_model: str, here: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that draws its examples anew for each question shows the same ones, which are read once; a
    calibration reads whole prompts. Without examples the flag does nothing, and is refused."""
    options: dict[str, Any] = {"mode": (1, 3), "num_samples": 12, "num_fewshot": 6}
    drawn = evaluate(qa_settings(folder_model, **options, output_dir="drawn"))
    assert not reads
    fixed = evaluate(qa_settings(folder_model, **options, fixed_shots=True, output_dir="fixed"))
    assert len(reads) == 2  # methods
    monkeypatch.setattr("toptheta.eval.lm_eval_model.can_share", lambda model: False)
    whole = evaluate(qa_settings(folder_model, **options, fixed_shots=True, output_dir="whole"))
    assert len(reads) == 2
    for shared, anew in zip(fixed, whole):
        assert shared.kept == anew.kept
        for one, other in zip(read_answers(str(shared.folder)), read_answers(str(anew.folder))):
            assert one.hash == other.hash
            assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-4)
    assert {a.hash for a in read_answers(str(fixed[0].folder))} != {
        a.hash for a in read_answers(str(drawn[0].folder))
    }
    with pytest.raises(UsageError, match="--fixed_shots has no effect on everyday_science"):
        evaluate(qa_settings(folder_model, mode=(3,), num_fewshot=0, fixed_shots=True))
