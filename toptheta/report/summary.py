"""Summaries of a finished cell, run or sweep: printed and written tables, and plots.

Plots are imported when something is drawn, because importing matplotlib takes a second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from toptheta.report import tables
from toptheta.report.paired import paired_with_dense
from toptheta.report.results import DECODE, CellResult
from toptheta.report.sweep_tables import SweepRow, sweep_csv, sweep_markdown, with_k
from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import write_json, write_text

NO_REFERENCES: Mapping[str, CellResult] = {}


def draw_cell(result: CellResult, folder: Path) -> None:
    """The plots of a single cell, if any: needle.png."""
    if result.grid:
        from toptheta.report.plots.needle import draw_needle

        draw_needle(result.grid, folder / "needle.png", f"{result.model}, {result.method}")


def report_run(folder: Path, results: Sequence[CellResult], title: str) -> list[CellResult]:
    """Compare a run's cells with its dense cell, print the table, and write it, its JSON and plots into the
    run's folder; returns the results with the comparison."""
    results, notes = paired_with_dense(results)
    for note in notes:
        say(note)
    text, by_length = tables.results_table(results), all(result.by_length for result in results)
    if any(result.effective_k is not None for result in results):
        text += "\n\n" + tables.effective_k(results)
    heading = f"{title}, by context length in tokens" if by_length else title
    print(f"\n{heading}\n\n{text}\n")
    write_text(folder / "summary.md", f"# {heading}\n\n{text}\n")
    write_json(folder / "summary.json", [result.to_json() for result in results])
    if any(not result.dense and result.metrics and result.kept for result in results):
        from toptheta.report.plots.tradeoff import draw_tradeoff

        try:
            for left_out in draw_tradeoff(results, folder / "tradeoff.png", title):
                say(left_out)
            print(f"Plot: {folder / 'tradeoff.png'}")
        except UsageError as error:
            say(f"No plot tradeoff.png, because {error}")
    if by_length:
        from toptheta.report.plots.perplexity import draw_perplexity

        draw_perplexity(results, folder / "perplexity.png", title)
        print(f"Plot: {folder / 'perplexity.png'}")
    if any(_is_compared(result) and not result.dense for result in results):
        from toptheta.report.plots.divergence import draw_divergence

        try:
            draw_divergence({title: results}, folder / "kl.png", "KL to dense attention by KV bytes read")
            print(f"Plot: {folder / 'kl.png'}")
        except UsageError as error:
            say(f"No plot kl.png, because {error}")
    print(f"Results: {folder}")
    return results


def report_tasks(folder: Path, parts: Sequence[Path], results: Sequence[CellResult]) -> None:
    """Join the summaries of a run's tasks, each in its own folder, into that of the run."""
    write_text(
        folder / "summary.md", "\n".join((part / "summary.md").read_text(encoding="utf-8") for part in parts)
    )
    write_json(folder / "summary.json", [result.to_json() for result in results])
    say(f"All tasks: {folder / 'summary.md'}")


def write_page(folder: Path) -> None:
    """Write the report of a run, report.html, into its folder, and print its path."""
    from toptheta.report.page.build import REPORT, write_report

    write_report([folder], folder / REPORT)
    print(f"Report: {folder / REPORT}")


def report_sweep(
    folder: Path,
    title: str,
    table_name: str,
    rows: Sequence[SweepRow],
    at_vrows: Sequence[float] = (),
    references: Mapping[str, CellResult] = NO_REFERENCES,
) -> None:
    """Write table.md, table.csv, results.json and plots of a sweep into `folder`, and print the table: kl.png
    and kl_by_v_rows.png for texts that are compared with dense attention, <task>.png for each other task.
    at_vrows: see `sweep_markdown`. references: for each task the dense result that the others are
    compared with, if it is finished."""
    rows = _compared(rows, references)
    text = sweep_markdown(title, table_name, rows, at_vrows)
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", sweep_csv(rows))
    # Several texts of a table are distinguished by the table's name of the task.
    results = [replace(row.result, task=row.task, folder=None) for row in rows if row.result is not None]
    write_json(folder / "results.json", [result.to_json() for result in results])
    pictures = _draw_table(folder, title, results)
    print(text)
    say(f"Written: {', '.join(map(str, [folder / 'table.md', folder / 'table.csv', *pictures]))}")


def redraw_sweep(folder: Path, title: str) -> None:
    """Draw the plots of a sweep again from the results.json in `folder`. Raises UsageError if that file is
    missing or damaged."""
    from toptheta.report.plots.read import read_results_by_task

    results = read_results_by_task(folder / "results.json")
    pictures = _draw_table(folder, title, [one for of_task in results.values() for one in of_task])
    say(f"Written: {', '.join(map(str, pictures))}")


def saved_rows(folder: Path) -> set[tuple[str, str]]:
    """The task and method of each row in the results.json of a table. Raises UsageError if it is damaged."""
    from toptheta.report.plots.read import read_results_by_task

    path = folder / "results.json"
    found = read_results_by_task(path) if path.is_file() else {}
    return {(result.task, result.method) for results in found.values() for result in results}


def _draw_table(folder: Path, title: str, results: Sequence[CellResult]) -> list[Path]:
    """Write the plots of a table's results, and return their paths."""
    written, texts = list[Path](), dict[str, Sequence[CellResult]]()
    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        if any(_is_compared(result) for result in of_task):
            texts[task] = of_task
        elif any(not result.dense and result.kept for result in of_task):
            from toptheta.report.plots.tradeoff import draw_tradeoff

            picture = folder / f"{task}.png"
            try:
                for left_out in draw_tradeoff(of_task, picture, f"{title}: {task}"):
                    say(left_out)
                written.append(picture)
            except UsageError as error:
                say(f"{task}: no plot, because {error}")
    if texts:
        from toptheta.report.plots.divergence import KV_BYTES, V_ROWS, draw_divergence

        for name, price in (("kl.png", KV_BYTES), ("kl_by_v_rows.png", V_ROWS)):
            try:
                draw_divergence(texts, folder / name, title, price)
                written.append(folder / name)
            except UsageError as error:
                say(f"No plot {name}, because {error}")
    return written


def _is_compared(result: CellResult) -> bool:
    """Whether decode steps of a text were compared with dense attention, as kl.png shows."""
    return "kl" in result.metrics and (result.kv_bytes or {}).get(DECODE) is not None


def _compared(rows: Sequence[SweepRow], references: Mapping[str, CellResult]) -> list[SweepRow]:
    """The rows, with results named as in the table, and those of each task compared with its dense reference.
    Dense attention in another type shows the size of rounding differences."""
    found = list(rows)
    for task in dict.fromkeys(row.task for row in rows):
        places = [i for i, row in enumerate(rows) if row.task == task and row.result is not None]
        results, notes = [_named(rows[i]) for i in places], list[str]()
        if task in references:
            results, notes = paired_with_dense(results, references[task])
        for note in notes:
            say(note)
        for i, result in zip(places, results):
            found[i] = replace(rows[i], result=result)
    return found


def _named(row: SweepRow) -> CellResult:
    """A row's result, with the names that the table has for its method and task: several tasks may read
    texts."""
    assert row.result is not None
    return replace(row.result, task=row.task, method=with_k(row.method, row.k))
