"""Runs on the same questions: against scipy and statsmodels, made data sets, and small cases by hand."""

from dataclasses import replace

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from toptheta.report.paired import Comparison, Flips, compare, paired_difference, paired_with_dense
from toptheta.report.results import Answer, CellResult, read_answers, write_answers
from toptheta.util.errors import UsageError


def answers(scores: list[float], **more) -> list[Answer]:
    return [Answer(f"t/{i}", f"h{i}", 0, {"acc": score}, **more) for i, score in enumerate(scores)]


def test_a_difference_is_that_of_scipy() -> None:
    draw = np.random.default_rng(0)
    for count in (2, 3, 50, 1000):
        a, b = draw.normal(size=count), draw.normal(0.3, 2.0, size=count)
        found = paired_difference((b - a).tolist())
        expected = stats.ttest_rel(b, a)
        assert found.value / found.stderr == pytest.approx(expected.statistic)
        assert (found.count, found.clusters) == (count, None)
        assert found.interval == pytest.approx(stats.norm.interval(0.95, found.value, found.stderr))
    single = paired_difference([0.5])
    assert single.value == 0.5 and single.stderr is None and single.interval is None


def test_clusters_are_those_of_statsmodels() -> None:
    """Its variance without small-sample factors, and Bessel's for the questions' own part."""
    draw = np.random.default_rng(1)
    groups = np.sort(draw.integers(0, 30, size=200))
    values = draw.normal(size=200) + draw.normal(size=30)[groups]
    found = paired_difference(values.tolist(), [f"passage {g}" for g in groups])
    fit = sm.OLS(values, np.ones(200)).fit()
    robust = fit.get_robustcov_results("cluster", groups=groups, use_correction=False)
    own = np.var(values, ddof=1) / 200 - np.var(values) / 200
    assert found.stderr == pytest.approx((robust.bse[0] ** 2 + own) ** 0.5)
    assert found.clusters == len(set(groups)) and found.stderr > 1.5 * paired_difference(values).stderr
    mixed = paired_difference([1.0, 0.0, 0.0, 1.0], [None, None, "a", "a"])
    assert mixed.clusters == 3
    assert paired_difference([1.0, 0.0], ["a", "a"]).stderr is None
    assert paired_difference([1.0, 0.0, 3.0], ["a", "b", "c"]) == paired_difference([1.0, 0.0, 3.0])


@pytest.mark.parametrize("lost", [0, 1, 5, 40, 700])
@pytest.mark.parametrize("gained", [0, 1, 6, 55, 640])
def test_mcnemar(lost: int, gained: int) -> None:
    expected = mcnemar([[100, lost], [gained, 100]], exact=True).pvalue
    assert Flips(lost, gained, 2000).p == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("clustered", [False, True])
def test_intervals_cover_the_truth(clustered: bool) -> None:
    """95% intervals of 2,000 made data sets: a method that flips answers, and one that also misreads whole
    passages."""
    draw = np.random.default_rng(2)
    passages, each = (80, 4) if clustered else (200, 1)
    right, kept, gained, misread = 0.6, 0.9, 0.05, 0.15 if clustered else 0.0
    truth = (1 - misread) * (right * (kept - 1) + (1 - right) * gained) - misread * right
    covered = 0
    for _ in range(2000):
        shape = (passages, each)
        a = draw.random(shape) < right
        b = np.where(a, draw.random(shape) < kept, draw.random(shape) < gained)
        b &= draw.random((passages, 1)) >= misread
        names = np.repeat(np.arange(passages), each).astype(str).tolist()
        found = paired_difference((b.astype(float) - a).ravel().tolist(), names)
        low, high = found.interval
        covered += low <= truth <= high
    assert 0.93 < covered / 2000 < 0.97


def test_by_hand() -> None:
    """Eight questions: one lost, two gained; the right answer's log-probability; order plays no part."""
    a = answers([1, 1, 1, 1, 0, 0, 0, 0], loglikelihoods=[-1.0, -2.0], target=1)
    b = answers([1, 1, 1, 0, 1, 1, 0, 0], loglikelihoods=[-1.0, -2.5], target=1)
    found = compare(a, b[::-1])
    assert found.count == 8 and found.scores["acc"].value == pytest.approx(1 / 8)
    assert found.scores["acc"].stderr == pytest.approx(np.std([0, 0, 0, -1, 1, 1, 0, 0], ddof=1) / 8**0.5)
    assert found.flips == {"acc": Flips(1, 2, 8)} and found.flips["acc"].p == 1.0
    assert found.target_logprob.value == -0.5 and found.target_logprob.stderr == 0.0
    assert found.completions is None and found.text == {}
    saved = found.to_json()
    assert saved["flips"]["acc"] == {"lost": 1, "gained": 2, "count": 8, "mcnemar_p": 1.0}
    assert saved["scores"]["acc"]["low"] < 1 / 8 < saved["scores"]["acc"]["high"]
    for target in (None, "text", 2, True):
        unknown = [replace(answer, target=target) for answer in a]
        assert compare(unknown, b).target_logprob is None
    impossible = [replace(b[0], loglikelihoods=[-1.0, float("-inf")]), *b[1:]]
    assert compare(a, impossible).target_logprob.count == 7  # a difference from 0 is none
    shares = compare(answers([0.5, 1.0]), answers([1.0, 0.0]))
    assert shares.scores["acc"].value == -0.25 and shares.flips == {}
    assert compare(answers([1.0], cluster="a"), answers([0.0], cluster="a")).scores["acc"].stderr is None


def test_completions() -> None:
    def replies(*ids: list[int] | None) -> list[Answer]:
        return [Answer(f"t/{i}", "h", str(one), {}, reply_ids=one) for i, one in enumerate(ids)]

    a = replies([1, 2, 3], [1, 2, 3], [1, 2], [5])
    b = replies([1, 2, 3], [1, 9, 3], [1, 2, 3], [6])
    found = compare(a, b).completions
    assert found.identical.value == 0.25 and found.identical.count == 4
    assert found.first_difference == 2  # of 2, 3 and 1
    assert compare(a, a).completions.first_difference is None
    without = compare(replies(None, None), replies(None, None)).completions
    assert without.identical.value == 1.0 and without.first_difference is None


def test_texts() -> None:
    def windows(nll: list[float], kl: float) -> list[Answer]:
        return [Answer(f"w{i}", "h", None, {"nll": x, "kl": kl, "same_top": 0.9}) for i, x in enumerate(nll)]

    found = compare(windows([3.0, 4.0], 0.0), windows([3.2, 4.1], 0.5))
    assert set(found.scores) == {"nll"} and found.flips == {}
    assert found.text["kl"].value == 0.5 and found.text["same_top"].value == pytest.approx(0.9)
    assert found.text["ln_ppl_ratio"].value == pytest.approx(0.15)
    assert found.text["ln_ppl_ratio"].stderr == pytest.approx(0.05)


def test_other_questions_are_refused() -> None:
    a = answers([1.0, 0.0, 1.0])
    for other, words in (
        (a[:2], "1 are only in dense, 0 only in Top-k, such as t/2"),
        ([*a, Answer("t/9", "h", 0, {})], "1 only in Top-k, such as t/9"),
        ([a[0], replace(a[1], hash="x"), a[2]], "have different prompts for t/1"),
        ([], "3 are only in dense"),
    ):
        with pytest.raises(UsageError, match=words) as raised:
            compare(a, other, ("dense", "Top-k"))
        assert str(raised.value).count(". ") == 0 and str(raised.value).endswith(".")
    with pytest.raises(UsageError, match="dense has no answers"):
        compare([], a, ("dense", "Top-k"))


def test_paired_with_dense(tmp_path) -> None:
    """The first dense cell is the baseline; others, dense ones of another type too, are compared with it."""
    scores = {"dense": [1, 1, 0], "bfloat16": [1, 0, 0], "Top-k": [0, 1, 0]}
    results = []
    for name, values in scores.items():
        write_answers(tmp_path / name, answers(values))
        results.append(CellResult(name, dense=name != "Top-k", folder=str(tmp_path / name)))
    found, notes = paired_with_dense([results[2], *results[:2]])
    assert notes == [] and found[1].paired == {}
    assert {one.method: one.paired["flips"]["acc"]["lost"] for one in (found[0], found[2])} == {
        "Top-k": 1,
        "bfloat16": 1,
    }
    assert CellResult.from_json(found[0].to_json()).paired == found[0].paired
    write_answers(tmp_path / "Top-k", answers([1, 1]))
    found, notes = paired_with_dense(results)
    assert found[2].paired == {} and "Top-k is not compared with dense" in notes[0] and len(notes) == 1
    (tmp_path / "dense" / "answers.jsonl").unlink()
    found, notes = paired_with_dense(results)
    assert found == results and "Nothing is compared with dense" in notes[0]
    assert paired_with_dense(results[2:]) == (results[2:], [])


def test_answers_keep_what_is_compared(tmp_path) -> None:
    kept = [Answer("t/0", "h", "text", {"f1": 0.5}, {"reply": 2}, reply_ids=[4, 5], cluster="a")]
    write_answers(tmp_path, kept)
    assert read_answers(tmp_path) == kept
    assert compare(kept, kept).to_json()["completions"]["identical"]["value"] == 1.0
    assert Comparison(0).to_json() == {"count": 0}
