"""Comparison of two runs on the same questions, question by question.

Sparse and dense attention agree on most questions, so the standard error of the mean of paired differences is
far smaller than that of either mean. Covers the numbers; tables.py and compare.py show them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import comb, isfinite, sqrt
from statistics import NormalDist, fmean, median
from typing import Any

from toptheta.report.results import Answer, CellResult, Metric, read_answers
from toptheta.util.errors import UsageError

AGAINST_DENSE = ("kl", "same_top", "ln_ppl_ratio")  # scores that already compare with dense
WITHIN = NormalDist().inv_cdf(0.975)  # standard errors on either side of a 95% interval


@dataclass(frozen=True)
class Difference:
    """The mean over questions of other - baseline. stderr: paired, None for fewer than two questions or
    clusters; clusters: their number, None if questions are not clustered."""

    value: float
    stderr: float | None
    count: int
    clusters: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval, assuming a normal distribution."""
        if self.stderr is None:
            return None
        return self.value - WITHIN * self.stderr, self.value + WITHIN * self.stderr

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        return asdict(self) | {"low": low, "high": high}


@dataclass(frozen=True)
class Flips:
    """Questions (of `count`) that only the baseline answered correctly (lost), and that only the other did
    (gained), as in arXiv 2407.09141."""

    lost: int
    gained: int
    count: int

    @property
    def p(self) -> float:
        """McNemar's exact test, two-sided: the probability of flips at least as uneven as these, if both
        directions are equally likely."""
        total = self.lost + self.gained
        fewer = sum(comb(total, i) for i in range(min(self.lost, self.gained) + 1))
        return min(1.0, 2 * fewer / 2**total)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mcnemar_p": self.p}


@dataclass(frozen=True)
class Completions:
    """Comparison of generated texts. identical: the share of replies with identical tokens; first_difference:
    for the others, the median position of the first differing token, from 1 on; None if all are identical, or
    tokens were not saved."""

    identical: Metric
    first_difference: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The differences between two runs on the same questions. scores: for each score that all answers have;
    flips: for scores that are right or wrong; target_logprob: for the log-probability (nats) of the correct
    answer, in likelihood tasks; completions: in generation tasks; text: for perplexity, the other's kl and
    same_top to dense attention in its own process, and the log ratio of the two perplexities."""

    count: int
    scores: dict[str, Difference] = field(default_factory=dict)
    flips: dict[str, Flips] = field(default_factory=dict)
    target_logprob: Difference | None = None
    completions: Completions | None = None
    text: dict[str, Metric] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"count": self.count}
        values["scores"] = {name: one.to_json() for name, one in self.scores.items()}
        values["flips"] = {name: one.to_json() for name, one in self.flips.items()}
        values["target_logprob"] = self.target_logprob and self.target_logprob.to_json()
        values["completions"] = self.completions and asdict(self.completions)
        values["text"] = {name: asdict(metric) for name, metric in self.text.items()}
        return {name: value for name, value in values.items() if value or value == 0}


def compare(
    baseline: Sequence[Answer], other: Sequence[Answer], names: tuple[str, str] = ("the first", "the second")
) -> Comparison:
    """Compare the answers of two runs. names: of the runs, for errors. Raises UsageError if their questions
    differ."""
    pairs = _pairs(baseline, other, names)
    shared = set.intersection(*(set(answer.score) for pair in pairs for answer in pair))
    scores, flips, text = dict[str, Difference](), dict[str, Flips](), dict[str, Metric]()
    for name in pairs[0][0].score:
        if name not in shared or name in AGAINST_DENSE:
            continue
        both = [(a.score[name], b.score[name]) for a, b in pairs]
        scores[name] = _difference(pairs, lambda a, b, name=name: b.score[name] - a.score[name])  # type: ignore[misc]
        if all(one in (0.0, 1.0) for pair in both for one in pair):
            flips[name] = Flips(both.count((1.0, 0.0)), both.count((0.0, 1.0)), len(pairs))
    if "nll" in scores:
        text = {
            name: _mean([b.score[name] for _, b in pairs])
            for name in AGAINST_DENSE
            if all(name in b.score for _, b in pairs)
        }
        text["ln_ppl_ratio"] = Metric(scores["nll"].value, scores["nll"].stderr, len(pairs))
    judged = [(a, b) for a, b in pairs if _target(a) is not None and _target(b) is not None]
    target = _difference(judged, lambda a, b: _target(b) - _target(a)) if judged else None  # type: ignore[operator]
    generated = all(isinstance(answer.answer, str) for pair in pairs for answer in pair)
    return Comparison(len(pairs), scores, flips, target, _completions(pairs) if generated else None, text)


def paired_with_dense(
    results: Sequence[CellResult], dense: CellResult | None = None
) -> tuple[list[CellResult], list[str]]:
    """The results, with `paired`, the comparison with `dense`, added to all others; and a message for each
    that cannot be compared. dense: None is the first dense one of the results; without any they are
    unchanged."""
    if dense is None:
        dense = next((result for result in results if result.dense and result.folder), None)
    if dense is None or not dense.folder:
        return list(results), []
    others = [result for result in results if result.folder and result.folder != dense.folder]
    if not others:
        return list(results), []
    notes: list[str] = []
    try:
        baseline = read_answers(str(dense.folder))
    except UsageError as error:
        return list(results), [f"Nothing is compared with {dense.method}: {error}"]
    compared = []
    for result in results:
        if any(result is other for other in others):
            try:
                found = compare(baseline, read_answers(str(result.folder)), (dense.method, result.method))
                paired = {"baseline": dense.method} | found.to_json()
                result = replace(result, extra=result.extra | {"paired": paired})
            except UsageError as error:
                notes.append(f"{result.method} is not compared with {dense.method}: {error}")
        compared.append(result)
    return compared, notes


def paired_difference(values: Sequence[float], clusters: Sequence[str | None] = ()) -> Difference:
    """The mean of one difference per question, with its standard error (Miller 2024, arXiv 2411.00640, for
    paired differences and clustered questions).

    clusters: for each question the id of what it shares with others, such as a passage, or None.
    """
    count, mean = len(values), fmean(values)
    rest = [value - mean for value in values]
    alone = [cluster if cluster is not None else i for i, cluster in enumerate(clusters or range(count))]
    sizes = Counter(alone)
    clustered = any(size > 1 for size in sizes.values())
    if len(sizes) < 2:
        return Difference(mean, None, count, len(sizes) if clustered else None)
    squares = sum(one * one for one in rest)
    variance = squares / (count - 1) / count
    if clustered:
        sums: dict[Any, float] = {}
        for cluster, one in zip(alone, rest):
            sums[cluster] = sums.get(cluster, 0.0) + one
        variance += (sum(one * one for one in sums.values()) - squares) / count**2
    return Difference(mean, sqrt(max(variance, 0.0)), count, len(sizes) if clustered else None)


def _pairs(
    baseline: Sequence[Answer], other: Sequence[Answer], names: tuple[str, str]
) -> list[tuple[Answer, Answer]]:
    """Both answers to each question, in the baseline's order."""
    first, second = names
    if not baseline:
        raise UsageError(f"{first} has no answers: compare runs that evaluated something.")
    answers = {answer.key: answer for answer in other}
    missing = [answer.key for answer in baseline if answer.key not in answers]
    further = answers.keys() - {answer.key for answer in baseline}
    if missing or further:
        some = missing[0] if missing else min(further)
        raise UsageError(
            f"{first} and {second} answered different questions ({len(missing)} are only in {first}, "
            f"{len(further)} only in {second}, such as {some}): compare runs with the same task, seed and "
            "number of questions."
        )
    for answer in baseline:
        if answers[answer.key].hash != answer.hash:
            raise UsageError(
                f"{first} and {second} have different prompts for {answer.key}: compare runs with the same "
                "shots, template, text and lengths."
            )
    return [(answer, answers[answer.key]) for answer in baseline]


def _difference(
    pairs: Sequence[tuple[Answer, Answer]], value: Callable[[Answer, Answer], float]
) -> Difference:
    return paired_difference([value(a, b) for a, b in pairs], [a.cluster for a, _ in pairs])


def _mean(values: Sequence[float]) -> Metric:
    found = paired_difference(values)
    return Metric(found.value, found.stderr, found.count)


def _target(answer: Answer) -> float | None:
    """Log-probability (nats) of the correct answer; None if it is not one of the choices, or -inf, whose
    difference says nothing."""
    likelihoods, target = answer.loglikelihoods, answer.target
    if likelihoods is None or isinstance(target, bool) or not isinstance(target, int):
        return None
    if not 0 <= target < len(likelihoods) or not isfinite(likelihoods[target]):
        return None
    return likelihoods[target]


def _completions(pairs: Sequence[tuple[Answer, Answer]]) -> Completions:
    same, places, known = [], [], True
    for a, b in pairs:
        if a.reply_ids is None or b.reply_ids is None:
            same.append(a.answer == b.answer)
            known = False
            continue
        same.append(a.reply_ids == b.reply_ids)
        if not same[-1]:
            agree = [x == y for x, y in zip(a.reply_ids, b.reply_ids)]
            places.append(agree.index(False) if False in agree else len(agree))
    return Completions(_mean([float(one) for one in same]), 1 + median(places) if known and places else None)
