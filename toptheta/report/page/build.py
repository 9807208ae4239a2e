"""Builds one HTML file from folders of runs."""

import base64
import gzip
import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from toptheta.report import tables
from toptheta.report.frames import LoadedRun, load, text_of
from toptheta.report.page.chart import Chart
from toptheta.report.page.charts import charts
from toptheta.report.page.samples import samples
from toptheta.report.results import CellResult
from toptheta.util.environment import cache_folder
from toptheta.util.files import write_text
from toptheta.util.schema import read_json

HERE = Path(__file__).resolve().parent
REPORT = "report.html"
VEGA_LITE = "6.4"  # of those that vl-convert bundles


def write_report(folders: Sequence[Path | str], path: Path | str) -> LoadedRun:
    """Write the report on runs, one HTML file that needs no network; returns the loaded runs. Raises
    UsageError as `load` does."""
    run = load(*folders)
    write_text(path, render(run))
    return run


def render(run: LoadedRun) -> str:
    """The HTML of the report."""
    parts = [_part(i, part) for i, part in enumerate(_by_task(run))]
    page_data = {part["id"]: part.pop("data") for part in parts}
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=_page_title(run, parts),
        parts=parts,
        several_models=len({result.model for result in run.results}) > 1,
        runs=[_about(folder) for folder in run.folders],
        notes=run.notes,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        data=_packed(page_data),
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        vega=Markup(_vega()),
    )


def _page_title(run: LoadedRun, parts: Sequence[dict[str, Any]]) -> str:
    """The titles of all parts; the model only once if it is the same in all of them."""
    models = {result.model for result in run.results}
    if len(models) > 1:
        return " · ".join(dict.fromkeys(part["title"] for part in parts))
    names = " · ".join(dict.fromkeys(part["task"] for part in parts))
    return ": ".join(filter(None, (*models, names)))


def _by_task(run: LoadedRun) -> list[LoadedRun]:
    """A part for each model and task, and for each text and length of windows."""
    groups: dict[Any, list[int]] = {}
    for i, result in enumerate(run.results):
        groups.setdefault((result.model, result.task, text_of(result)), []).append(i)
    return [
        LoadedRun(run.folders, tuple(run.results[i] for i in places), tuple(run.labels[i] for i in places))
        for places in groups.values()
    ]


def _part(number: int, run: LoadedRun) -> dict[str, Any]:
    """The template's data for a task, and that of its charts and samples."""
    shown = list(charts(run))
    questions = samples(run)
    first = run.results[0]
    return {
        "id": f"part{number}",
        "title": ", ".join(filter(None, (first.model, _task(first)))),
        "task": _task(first),
        "baseline": next((label for label, one in zip(run.labels, run.results) if one.dense), None),
        "compared": bool(tables.paired_columns(run.results)),
        "header": [column.header for column in _columns(run.results)],
        "rows": _table(run),
        "charts": [{"name": chart.name, "title": chart.title, "note": chart.note} for chart in shown],
        "questions": len(questions),
        "data": {"charts": [_chart_data(chart) for chart in shown], "samples": questions},
    }


def _task(result: CellResult) -> str:
    """The task in words; for a text with its file and the length of its windows."""
    text = text_of(result)
    if text is None:
        return result.task
    path, length = Path(text[0]), text[1]
    # The rows of a data set are in files with names like test.jsonl.
    name = "/".join(path.parts[-2:]) if path.suffix == ".jsonl" else path.name
    return f"{result.task} of {name} in windows of {length:,} tokens"


def _columns(results: Sequence[CellResult]) -> list[tables.Column]:
    columns = tables.metric_columns(results) + tables.paired_columns(results) + tables.kept_columns(results)
    return columns + [tables.Column("minutes", lambda one: f"{sum(one.seconds.values()) / 60:.1f}")]


def _table(run: LoadedRun) -> list[dict[str, Any]]:
    columns = _columns(run.results)
    return [
        {"label": label, "dense": result.dense, "cells": [column.text(result) for column in columns]}
        for label, result in zip(run.labels, run.results)
    ]


def _chart_data(chart: Chart) -> dict[str, Any]:
    choices = [
        {"name": one.name, "options": [{"text": o.text, "values": o.values} for o in one.options]}
        for one in chart.choices
    ]
    return {
        "name": chart.name,
        "spec": chart.spec,
        "choices": choices,
        "click": chart.click,
        "rows": {name: _column(chart.rows[name]) for name in chart.rows.columns},
    }


def _column(column: pd.Series) -> Any:
    """A column as JSON: numbers (null if missing), or a list of words and their indices."""
    if pd.api.types.is_numeric_dtype(column):
        return [None if pd.isna(value) else value for value in column.tolist()]
    codes, words = pd.factorize(column)
    return {"words": [str(word) for word in words], "codes": codes.tolist()}


def _about(folder: Path) -> dict[str, Any]:
    """Command, environment and settings of a run, from its run.json, or from that of the run that a task or
    cell belongs to. Raises UsageError if it is damaged."""
    saved: dict[str, Any] = {}
    for place in (folder, *folder.resolve().parents[:2]):
        if (place / "run.json").is_file():
            saved = read_json(place / "run.json", dict[str, Any], "correct it, or remove it")
            break
    about: dict[str, Any] = {"folder": str(folder), "command": saved.get("command")}
    for name in ("environment", "settings"):
        values = saved.get(name)
        known = values.items() if isinstance(values, dict) else ()
        about[name] = {key: value for key, value in known if value is not None}
    return about


def _packed(value: Any) -> str:
    """Compressed JSON as text that is safe in a script element: it contains no tags, whatever a model
    generated."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, bundled once for each version of vl-convert."""
    import vl_convert

    file = cache_folder() / f"vega-{version('vl-convert-python')}-{VEGA_LITE}.js"
    with suppress(OSError):  # not there yet, or the cache cannot be used: bundling takes some seconds
        return file.read_text(encoding="utf-8")
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    bundle = bundle.replace("</script", "<\\/script")
    with suppress(OSError):
        write_text(file, bundle)
    return bundle
