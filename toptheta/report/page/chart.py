"""A chart of the report: a Vega-Lite specification with its data and what a reader can choose, and what
several charts share.

A specification holds placeholders, strings that start with @; a choice says what they stand for. page.js puts
in what is chosen and hands the rest to Vega. Nothing here draws.
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
DENSE_COLOUR = "#808080"  # seen on white and on black
ACROSS = {"orient": "top", "gradientLength": 200, "titleLimit": 300}  # a legend that takes no width
KINDS = {"attn": "attention elements", "vrow": "V rows"}


@dataclass(frozen=True)
class Option:
    """One value of a choice: its text, and what placeholders stand for."""

    text: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """What a reader chooses for a chart. name: of the choice in every chart of a part: charts follow each
    other's."""

    name: str
    options: list[Option]


@dataclass(frozen=True)
class Chart:
    """A picture. name: its id in the page, within its part; rows: its data; note: a sentence below the
    title; click: of a mark's fields, the choices that a click on it makes."""

    name: str
    title: str
    note: str
    spec: Spec
    rows: pd.DataFrame
    choices: list[Choice] = field(default_factory=list)
    click: tuple[str, ...] = ()


def families_of(run: LoadedRun) -> list[str]:
    """Of each result its label without K: what has one colour."""
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
    """The choice of a cell that `rows` have, those with thresholds first and dense ones last. more: by label,
    what else stands for it."""
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
    """An axis of whole numbers with as many labels as can be read."""
    step = max(1, -(-(int(numbers.max()) + 1) // 16))
    values = list(range(0, int(numbers.max()) + 1, step))
    return {"values": values, "labelAngle": 0}
