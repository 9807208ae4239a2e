"""A chart of the report: a Vega-Lite specification with its data and the reader's choices; and parts that
charts share.

A specification contains placeholders, strings that start with @; each choice gives their values. page.js
fills in the selected values and passes the result to Vega. Nothing is drawn here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from toptheta.report.frames import LoadedRun
from toptheta.report.results import DECODE, PREFILL
from toptheta.report.tables import PHASE_WORDS
from toptheta.util.files import find_file

Spec = dict[str, Any]
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#8c6bb1",
    "#7f7f00",
)  # Okabe-Ito
DENSE_COLOUR = "#808080"  # visible on white and on black
ACROSS = {"orient": "top", "gradientLength": 200, "titleLimit": 300}  # a legend above the chart
KINDS = {"attn": "attention elements", "vrow": "V rows"}


@dataclass(frozen=True)
class Option:
    """One value of a choice: its text, and the values of placeholders."""

    text: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """A reader's choice for a chart. name: choices of the same name in the charts of a part are linked."""

    name: str
    options: list[Option]


@dataclass(frozen=True)
class Chart:
    """A chart. name: its id in the page, within its part; rows: its data; note: the text below the title;
    click: fields of a mark that a click on it selects in the choices."""

    name: str
    title: str
    note: str
    spec: Spec
    rows: pd.DataFrame
    choices: list[Choice] = field(default_factory=list)
    click: tuple[str, ...] = ()


def families_of(run: LoadedRun) -> list[str]:
    """The label of each result without K; each such family has one colour."""
    return [
        label.replace(f" K={result.k}", "") if result.k is not None else label
        for label, result in zip(run.labels, run.results)
    ]


def family_colour(run: LoadedRun) -> Spec:
    """The colour of a family, the same in all charts."""
    dense = {family for family, one in zip(families_of(run), run.results) if one.dense}
    sparse = [family for family in dict.fromkeys(families_of(run)) if family not in dense]
    colours = dict.fromkeys(sorted(dense), DENSE_COLOUR)
    colours |= {family: COLOURS[i % len(COLOURS)] for i, family in enumerate(sparse)}
    return {
        "field": "family",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(colours), "range": list(colours.values())},
        "legend": {"orient": "bottom", "columns": 3, "symbolType": "circle", "symbolOpacity": 1},
    }


def cell_choice(run: LoadedRun, rows: pd.DataFrame, **more: dict[str, Any]) -> Choice:
    """The choice of a cell in `rows`, those with thresholds first and dense ones last. more: further
    placeholder values by label."""
    present = set(rows["cell"])
    places = {
        label: (one.dense, not (one.folder and find_file(one.folder, "th.txt")))
        for label, one in zip(run.labels, run.results)
        if label in present
    }
    labels = sorted(places, key=lambda label: places[label])
    return Choice("cell", [Option(label, {"@cell": label} | more.get(label, {})) for label in labels])


def phase_choice(rows: pd.DataFrame) -> Choice:
    present = set(rows["phase"])
    order = [phase for phase in (DECODE, PREFILL) if phase in present]
    return Choice("phase", [Option(PHASE_WORDS[phase], {"@phase": phase}) for phase in order])


def number_choice(name: str, rows: pd.DataFrame) -> Choice:
    numbers = sorted(int(one) for one in rows[name].unique())
    return Choice(name, [Option(f"{name} {one}", {f"@{name}": one}) for one in numbers])


def where(*names: str) -> Spec:
    return {"filter": {"and": [{"field": name, "equal": f"@{name}"} for name in names]}}


def series(
    title: str, pairs: Sequence[tuple[float, float]], share: bool
) -> tuple[str, np.ndarray, np.ndarray]:
    values, errors = (100.0 if share else 1.0) * np.array(pairs, dtype=float).T
    return (f"{title} (%)" if share else title), values, errors


def ticks(numbers: pd.Series) -> Spec:
    """An axis of whole numbers with a readable number of labels."""
    step = max(1, -(-(int(numbers.max()) + 1) // 16))
    values = list(range(0, int(numbers.max()) + 1, step))
    return {"values": values, "labelAngle": 0}
