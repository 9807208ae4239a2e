"""Scoring of saved HumanEval completions, separately from generating them."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from toptheta.eval.sandbox.run import isolation_notice
from toptheta.eval.tasks.humaneval import scoring
from toptheta.report.paired import paired_with_dense
from toptheta.report.results import ANSWERS, CellResult, read_answers, read_result, write_answers
from toptheta.report.summary import report_run, write_page
from toptheta.report.tables import results_table
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import write_json, write_text
from toptheta.util.schema import parse_json, typed


def score_folder(folder: str) -> None:
    """Score the saved completions of a run or of one cell, and print the table. Raises UsageError."""
    root = Path(folder)
    candidates = [root / "samples.jsonl", *root.glob("*/samples.jsonl")]
    found = sorted(path.parent for path in candidates if path.is_file())
    if not found:
        raise UsageError(
            f"--score {folder} has no samples.jsonl, nor do its sub-folders; name a folder of gen_llama.py."
        )
    notice = isolation_notice()
    if notice:
        say(notice)
    by_run: dict[Path, list[CellResult]] = {}
    for path in found:
        samples, per_task = _samples(path / "samples.jsonl")
        say(f"\n{path}")
        metrics, rows = scoring.score_samples(samples, scoring.load_problems(), range(1, per_task + 1))
        write_text(path / scoring.RESULTS, scoring.result_lines(rows))
        _score_answers(path, rows)
        results_file = path / "results.json"
        result = read_result(results_file) if results_file.is_file() else CellResult(path.name)
        together = scoring.judged_together(rows)
        for count in together.values():
            say(f"{count} of {len(rows)} programs ran with their tests, and could forge their success.")
        extra = {name: value for name, value in result.extra.items() if name != "judged_together"}
        result = replace(result, metrics=metrics, extra=extra | together)
        write_json(results_file, result.to_json())
        run = path if (path / "run.json").is_file() else path.parent
        by_run.setdefault(run, []).append(replace(result, folder=str(path)))
    for run, of_run in by_run.items():
        summary = run / "summary.md"
        if len(of_run) == len(list(run.glob("**/samples.jsonl"))) and summary.is_file():
            # From now on the run's table and report show the scores.
            title = summary.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            report_run(run, of_run, title)
            write_page(run)
        else:
            print("\n" + results_table(paired_with_dense(of_run)[0]))


class Sample(TypedDict):
    task_id: str
    completion: str


def _samples(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The samples of a file, and the number per task. Raises UsageError."""
    samples = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line.strip():
                samples.append(parse_json(line))
                typed(samples[-1], Sample)
        except ValueError as error:
            raise UsageError(
                f"{path}, line {number} is damaged ({error}): a line is JSON with task_id and completion."
            ) from None
    if not samples:
        raise UsageError(f"{path} is empty: there is nothing to score, so name another run.")
    return samples, len(samples) // len({sample["task_id"] for sample in samples})


def _score_answers(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Add to answers.jsonl, if it exists, which samples passed; the samples of a task are in order."""
    if not (folder / ANSWERS).is_file():
        return
    passed, seen = dict[str, float](), dict[str, int]()
    for row in rows:
        number = seen[row["task_id"]] = seen.get(row["task_id"], -1) + 1
        passed[f"{row['task_id']}#{number}"] = float(row["passed"])
    answers = read_answers(folder)
    known = [a for a in answers if a.key in passed]
    scored = {a.key: replace(a, score=a.score | {"passed": passed[a.key]}) for a in known}
    write_answers(folder, [scored.get(answer.key, answer) for answer in answers])
