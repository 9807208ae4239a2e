"""Answers of all cells of a task to the same questions, next to each other."""

from collections.abc import Sequence
from math import isfinite
from os.path import commonprefix
from pathlib import Path
from typing import Any

from toptheta.report.frames import LoadedRun
from toptheta.report.plots.read import read_outcomes
from toptheta.report.results import ANSWERS, Answer, CellResult, read_answers

MOST_QUESTIONS = 60
MOST_CHARACTERS = 4000  # of a text


def samples(run: LoadedRun) -> list[dict[str, Any]]:
    """Questions with the answers of all cells, the baseline's (the first cell's) first; at most
    MOST_QUESTIONS, preferring those with different answers. Empty if no answers were saved, or there are
    none, as for perplexity."""
    by_cell = {
        label: _of_cell(result)
        for label, result in zip(run.labels, run.results)
        if result.folder and (Path(result.folder) / ANSWERS).is_file()
    }
    if not by_cell:
        return []
    baseline = next(iter(by_cell))
    questions = []
    for key, (first, _) in by_cell[baseline].items():
        if first.answer is None:
            return []
        answers = []
        for label, of_cell in by_cell.items():
            one, outcome = of_cell.get(key, (None, ""))
            if one is not None and one.hash == first.hash:  # the same question, in the same words
                answers.append({"cell": label} | _shown(first, one, outcome))
        questions.append({"key": key, "question": _cut(first.question), "answers": answers})
        if isinstance(first.answer, int):
            choices = first.choices or [f"choice {i}" for i in range(len(first.loglikelihoods or ()))]
            questions[-1] |= {"choices": [_cut(one) for one in choices], "target": first.target}
        elif first.target is not None:
            questions[-1]["target"] = _cut(str(first.target))
    return _chosen(questions)


def _of_cell(result: CellResult) -> dict[str, tuple[Answer, str]]:
    """By key each answer, and the outcome of its program, if it is one."""
    answers, folder = read_answers(str(result.folder)), Path(str(result.folder))
    outcomes = read_outcomes(folder)
    words = [""] * len(answers)
    if outcomes is not None and len(outcomes) == len(answers):
        words = outcomes["result"].tolist()
    return {answer.key: (answer, word) for answer, word in zip(answers, words)}


def _shown(first: Answer, one: Answer, outcome: str) -> dict[str, Any]:
    """The page's data for an answer. same: whether it equals the baseline's; at: the position of the first
    different character; token: that of the first different token, from 1 on."""
    shown: dict[str, Any] = {"same": one.answer == first.answer, "score": one.score, "tokens": one.tokens}
    if outcome:
        shown["outcome"] = outcome
    if isinstance(one.answer, int):
        return shown | {
            "choice": one.answer,
            "logp": [round(x, 3) if isfinite(x) else None for x in one.loglikelihoods or ()],
        }
    text, base = str(one.answer), str(first.answer)
    shown["text"] = _cut(text)
    if not shown["same"]:
        shown["at"] = len(commonprefix([text, base]))
    if one.reply_ids is not None and first.reply_ids is not None and one.reply_ids != first.reply_ids:
        shown["token"] = 1 + len(commonprefix([one.reply_ids, first.reply_ids]))
    return shown


def _chosen(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def differs(question: dict[str, Any]) -> bool:
        return any(not answer["same"] for answer in question["answers"])

    order = sorted(range(len(questions)), key=lambda i: not differs(questions[i]))
    return [questions[i] for i in sorted(order[:MOST_QUESTIONS])]


def _cut(text: str | None) -> str:
    if text is None:
        return ""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} [...]"
