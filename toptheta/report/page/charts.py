"""The report's charts as Vega-Lite specifications, with their data and what a reader can choose.

A specification holds placeholders, strings that start with @; a choice says what they stand for. page.js puts
in what is chosen and hands the rest to Vega. Nothing here draws.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from toptheta.report.frames import LoadedRun
from toptheta.report.page import data
from toptheta.report.results import DECODE, PREFILL, CellResult
from toptheta.report.tables import PAIRED, PHASE_WORDS, TEXT_METRICS, is_share
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


def charts(run: LoadedRun) -> Iterator[Chart]:
    """Every chart that the files of a run of one task have data for."""
    for make in (_tradeoff, _by_length, _needles, _kept, _thresholds, _by_layer, _by_row_length, _popularity):
        chart = make(run)
        if chart is not None:
            yield chart


def _families(run: LoadedRun) -> list[str]:
    """Of each result its label without K: what has one colour."""
    return [
        label.replace(f" K={result.k}", "") if result.k is not None else label
        for label, result in zip(run.labels, run.results)
    ]


def _colour(run: LoadedRun) -> Spec:
    """The colour of a family, the same in all charts."""
    dense = {family for family, one in zip(_families(run), run.results) if one.dense}
    sparse = [family for family in dict.fromkeys(_families(run)) if family not in dense]
    colours = dict.fromkeys(sorted(dense), DENSE_COLOUR)
    colours |= {family: COLOURS[i % len(COLOURS)] for i, family in enumerate(sparse)}
    return {
        "field": "family",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(colours), "range": list(colours.values())},
        "legend": {"orient": "bottom", "columns": 3, "symbolType": "circle", "symbolOpacity": 1},
    }


def _tradeoff(run: LoadedRun) -> Chart | None:
    """What was lost against what was read or kept."""
    costs, scores = _costs(run.results), _scores(run.results)
    if not costs or not scores or all(one.dense for one in run.results):
        return None
    rows = pd.DataFrame({"cell": run.labels, "family": _families(run)})
    rows["k"] = [result.k for result in run.results]
    x_options, y_options = [], []
    for i, (title, values) in enumerate(costs):
        rows[f"x{i}"] = values
        x_options.append(Option(title, {"@x": f"x{i}", "@x_title": f"{title} (% of dense)"}))
    for i, (title, values, errors) in enumerate(scores):
        low, high = values - errors, values + errors
        log = bool(
            (low > 0).sum() > 1 and (values >= 0).all() and values.max() > 30 * values[values > 0].min()
        )
        rows[f"y{i}"], rows[f"low{i}"], rows[f"high{i}"] = values, low, high
        if log:  # nothing that is zero, dense attention for one, has a place
            rows.loc[values <= 0, [f"y{i}", f"low{i}", f"high{i}"]] = np.nan
            rows[f"low{i}"] = np.fmax(rows[f"low{i}"], rows[f"y{i}"] / 10)
        rows[f"error{i}"] = errors
        names = {"@y": f"y{i}", "@low": f"low{i}", "@high": f"high{i}", "@error": f"error{i}"}
        scale = {"type": "log"} if log else {"zero": False, "nice": True}
        y_options.append(Option(title, names | {"@y_title": title, "@scale": scale}))
    x: Spec = {
        "field": "@x",
        "type": "quantitative",
        "title": "@x_title",
        "scale": {"zero": False},
        "axis": {"format": ".3~f", "tickCount": 8},
    }
    y: Spec = {"field": "@y", "type": "quantitative", "title": "@y_title", "scale": "@scale"}
    y["axis"] = {"tickCount": 6}
    colour = _colour(run)
    tooltip = [
        {"field": "cell", "title": "cell"},
        {"field": "@x", "title": "@x_title", "format": ".3~f"},
        {"field": "@y", "title": "@y_title", "format": ".4~g"},
        {"field": "@error", "title": "standard error", "format": ".2~g"},
    ]
    spec = {
        "height": 340,
        "transform": [{"filter": "isValid(datum['@x']) && isValid(datum['@y'])"}],
        "layer": [
            {
                "transform": [{"filter": "datum.k !== null"}],
                "mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.6},
                "encoding": {"x": x, "y": y, "color": colour, "order": {"field": "@x"}},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {"x": x, "y": y | {"field": "@low"}, "y2": {"field": "@high"}, "color": colour},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": colour, "tooltip": tooltip},
            },
            {
                "transform": [{"filter": "datum.k !== null"}],
                "mark": {"type": "text", "dx": 9, "dy": -9, "align": "left", "fontSize": 10},
                "encoding": {"x": x, "y": y, "text": {"field": "k"}},
            },
        ],
    }  # fmt: skip
    return Chart(
        "tradeoff",
        "What sparsity costs",
        "Bars are ± one standard error; numbers at points are K. Each line is one method.",
        spec,
        rows,
        [Choice("score", y_options), Choice("against", x_options)],
    )


def _costs(results: Sequence[CellResult]) -> list[tuple[str, np.ndarray]]:
    """What was read or kept, in % of dense attention: by title, of each result. Decode comes first."""
    found = []
    for phase in (DECODE, PREFILL):
        words = PHASE_WORDS[phase]
        quantities = {
            f"KV bytes read in {words}": [(one.kv_bytes or {}).get(phase) for one in results],
            f"elements kept in {words}": [one.kept_share(phase, "attn") for one in results],
            f"V rows kept in {words}": [one.kept_share(phase, "vrow") for one in results],
        }
        if phase == PREFILL:  # nearly every V row of a prompt is kept by some row of it
            quantities = dict(sorted(quantities.items(), key=lambda one: not one[0].startswith("elements")))
        for title, values in quantities.items():
            array = np.array(values, dtype=float)
            if np.isfinite(array).any():
                found.append((title, 100.0 * array))
    return found


def _scores(results: Sequence[CellResult]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Title, values and standard errors, of each result: differences from dense first."""
    found = []
    paired = dict.fromkeys(name for one in results for name in one.paired.get("scores", {}))
    for name in sorted(paired, key=lambda name: PAIRED.index(name) if name in PAIRED else len(PAIRED)):
        if name != "nll":
            pairs = [_difference(one, name) for one in results]
            found.append(_series(f"{name}, difference from dense", pairs, is_share(name)))
    words = {name: title.removesuffix(" %") for name, title in TEXT_METRICS}
    metrics = dict.fromkeys(name for one in results for name in one.metrics)
    for name in sorted(metrics, key=lambda name: (name not in words, list(metrics).index(name))):
        pairs = [_value(one, name) for one in results]
        found.append(_series(words.get(name, name), pairs, is_share(name)))
    return found


def _difference(result: CellResult, name: str) -> tuple[float, float]:
    one = result.paired.get("scores", {}).get(name)
    if one is None:
        return (0.0, 0.0) if result.dense else (np.nan, np.nan)
    return one["value"], one["stderr"] or 0.0


def _value(result: CellResult, name: str) -> tuple[float, float]:
    metric = result.metrics.get(name)
    return (np.nan, np.nan) if metric is None else (metric.value, metric.stderr or 0.0)


def _series(
    title: str, pairs: Sequence[tuple[float, float]], share: bool
) -> tuple[str, np.ndarray, np.ndarray]:
    values, errors = (100.0 if share else 1.0) * np.array(pairs, dtype=float).T
    return (f"{title} (%)" if share else title), values, errors


def _cells(run: LoadedRun, rows: pd.DataFrame, **more: dict[str, Any]) -> Choice:
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


def _phases(rows: pd.DataFrame) -> Choice:
    present = set(rows["phase"])
    order = [phase for phase in (DECODE, PREFILL) if phase in present]
    return Choice("phase", [Option(PHASE_WORDS[phase], {"@phase": phase}) for phase in order])


def _numbers(name: str, rows: pd.DataFrame) -> Choice:
    numbers = sorted(int(one) for one in rows[name].unique())
    return Choice(name, [Option(f"{name} {one}", {f"@{name}": one}) for one in numbers])


def _where(*names: str) -> Spec:
    return {"filter": {"and": [{"field": name, "equal": f"@{name}"} for name in names]}}


def _by_length(run: LoadedRun) -> Chart | None:
    """Perplexity by context length, of a run that reads a text."""
    bounds = [[row["length"] for row in one.by_length] for one in run.results]
    if len(bounds[0]) < 2 or any(other != bounds[0] for other in bounds):
        return None
    base = run.results[0] if run.results[0].dense else None
    rows = []
    for label, family, one in zip(run.labels, _families(run), run.results):
        for place, row in enumerate(one.by_length):
            first = row.get("first", 1 if place == 0 else one.by_length[place - 1]["length"] + 1)
            ratio = row["ppl"] / base.by_length[place]["ppl"] if base else np.nan
            lengths = f"{first:,} to {row['length']:,}"
            rows.append(
                {"cell": label, "family": family, "k": one.k, "place": place, "lengths": lengths}
                | {"ppl": row["ppl"], "above": 100.0 * (ratio - 1)}
            )
    y = {"field": "@y", "type": "quantitative", "title": "@y_title", "scale": {"zero": False}}
    order = [row["lengths"] for row in rows[: len(bounds[0])]]
    spec = {
        "height": 280,
        "mark": {"type": "line", "point": {"filled": True, "size": 60}},
        "encoding": {
            "x": {
                "field": "lengths",
                "type": "ordinal",
                "sort": order,
                "title": "tokens before the predicted one",
                "axis": {"labelAngle": 0},
            },
            "y": y,
            "color": _colour(run),
            "detail": {"field": "cell"},
            "tooltip": [{"field": "cell"}, {"field": "lengths"}, {"field": "@y", "format": ".4~g"}],
        },
    }
    options = [Option("perplexity", {"@y": "ppl", "@y_title": "perplexity"})]
    if base:
        title = "perplexity above dense's (%)"
        options.insert(0, Option(title, {"@y": "above", "@y_title": title}))
    frame = pd.DataFrame(rows)
    note = "Each line is one cell."
    return Chart("by_length", "By context length", note, spec, frame, [Choice("perplexity", options)])


def _needles(run: LoadedRun) -> Chart | None:
    rows = [
        {"cell": label} | row | {"share": 100.0 * row["found"] / row["count"]}
        for label, one in zip(run.labels, run.results)
        for row in one.grid
        if row["count"]
    ]
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    x = {"field": "length", "type": "ordinal", "title": "context length (tokens)", "axis": {"labelAngle": 0}}
    y = {"field": "depth", "type": "ordinal", "title": "depth of the needle (%)"}
    colour = {
        "field": "share",
        "type": "quantitative",
        "title": "found (%)",
        "legend": ACROSS,
        "scale": {"scheme": "viridis", "domain": [0, 100]},
    }
    text_colour = {"condition": {"test": "datum.share > 60", "value": "black"}, "value": "white"}
    spec = {
        "height": {"step": 34},
        "transform": [_where("cell"), {"calculate": "datum.found + ' of ' + datum.count", "as": "words"}],
        "encoding": {"x": x, "y": y, "tooltip": [{"field": "words", "title": "found"}]},
        "layer": [
            {"mark": "rect", "encoding": {"color": colour}},
            {"mark": {"type": "text"}, "encoding": {"text": {"field": "words"}, "color": text_colour}},
        ],
    }
    note = "A needle is a number hidden in a long text; it is found when the reply holds it."
    return Chart("needles", "Needles found", note, spec, frame, [_cells(run, frame)])


def _kept(run: LoadedRun) -> Chart | None:
    frame = data.kept_shares(run)
    if frame.empty:
        return None
    what = [
        Option(words, {"@kind": kind, "@unit": "head" if kind == "attn" else "group of heads"})
        for kind, words in KINDS.items()
        if (frame["kind"] == kind).any()
    ]
    layers = int(frame["layer"].max()) + 1
    spec = {
        "height": {"step": max(6, min(16, 480 // layers))},
        "transform": [_where("cell", "phase", "kind")],
        "mark": {"type": "rect", "cursor": "pointer"},
        "encoding": {
            "x": {"field": "head", "type": "ordinal", "title": "@unit", "axis": _ticks(frame["head"])},
            "y": {"field": "layer", "type": "ordinal", "title": "layer", "axis": _ticks(frame["layer"])},
            "color": {
                "field": "share",
                "type": "quantitative",
                "title": "kept (%)",
                "legend": ACROSS,
                "scale": {"scheme": "viridis"},
            },
            "tooltip": [
                {"field": "layer"},
                {"field": "head", "title": "@unit"},
                {"field": "share", "title": "kept (%)", "format": ".2~f"},
            ],
        },
    }
    note = "In % of what dense attention uses. A click shows the threshold of that layer and head below."
    choices = [_cells(run, frame), _phases(frame), Choice("what", what)]
    return Chart("kept", "What each head keeps", note, spec, frame, choices, ("layer", "head"))


def _ticks(numbers: pd.Series) -> Spec:
    """An axis of whole numbers with as many labels as can be read."""
    step = max(1, -(-(int(numbers.max()) + 1) // 16))
    values = list(range(0, int(numbers.max()) + 1, step))
    return {"values": values, "labelAngle": 0}


def _thresholds(run: LoadedRun) -> Chart | None:
    frame = data.threshold_points(run)
    if frame.empty:
        return None
    facts = {}
    for label in frame["cell"].unique():
        theta = frame.loc[frame["cell"] == label, "theta"]
        scores = data.placement(run, label) == "pre-softmax" or theta.min() < 0
        log = not scores and theta.min() > 0 and theta.max() > 30 * theta.min()
        title = f"threshold θ ({'score' if scores else 'weight'})"
        facts[label] = {"@scale": {"type": "log"} if log else {"zero": False}, "@y_title": title}
    x = {"field": "n", "type": "quantitative", "title": "row length n (tokens)", "scale": {"zero": False}}
    y = {"field": "theta", "type": "quantitative", "title": "@y_title", "scale": "@scale"}
    tooltip = [
        {"field": "head"},
        {"field": "n", "title": "row length", "format": ".0f"},
        {"field": "theta", "title": "threshold", "format": ".4~g"},
        {"field": "samples"},
    ]
    spec = {
        "height": 260,
        "transform": [_where("cell", "layer")],
        "layer": [
            {
                "mark": {"type": "line", "color": DENSE_COLOUR, "opacity": 0.35, "strokeWidth": 1},
                "encoding": {"x": x, "y": y, "detail": {"field": "head"}},
            },
            {
                "transform": [_where("head")],
                "mark": {
                    "type": "line",
                    "color": COLOURS[1],
                    "strokeWidth": 2,
                    "point": {"filled": True, "size": 25, "color": COLOURS[1]},
                },
                "encoding": {"x": x, "y": y, "tooltip": tooltip},
            },
        ],
    }
    note = "The chosen head; in grey the other heads of its layer. Neighbouring row lengths are averaged."
    choices = [_cells(run, frame, **facts), _numbers("layer", frame), _numbers("head", frame)]
    return Chart("thresholds", "Thresholds by row length", note, spec, frame, choices)


def _effective(x: Spec, mean: Spec, spread: Spec) -> list[Spec]:
    """Layers of both pictures of effective K: 5 to 95 %, mean, K."""
    y = {
        "field": "mean",
        "type": "quantitative",
        "title": "elements a row keeps",
        "scale": {"type": "log", "base": 2},
    }
    tooltip = [{"field": "layer"}, {"field": "words", "title": "row lengths"}, {"field": "rows"}]
    tooltip += [{"field": name, "format": ".4~g"} for name in ("k", "mean", "p5", "p95")]
    return [
        {"mark": spread, "encoding": {"x": x, "y": y | {"field": "p5"}, "y2": {"field": "p95"}}},
        {"mark": mean, "encoding": {"x": x, "y": y, "tooltip": tooltip}},
        {
            "mark": {"type": "line", "strokeDash": [5, 4], "color": DENSE_COLOUR, "strokeWidth": 1.5},
            "encoding": {"x": x, "y": y | {"field": "k"}},
        },
    ]


def _by_layer(run: LoadedRun) -> Chart | None:
    rows = [
        {"cell": label, "phase": one["phase"], "k": one["k"], "words": "all"} | layer
        for label, result in zip(run.labels, run.results)
        for one in result.effective_k or []
        for layer in one["layers"]
    ]
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    frame["p5"] = frame["p5"].clip(lower=1.0)  # a log scale has no place for less
    x = {"field": "layer", "type": "quantitative", "title": "layer", "scale": {"nice": False, "padding": 8}}
    mean = {"type": "point", "filled": True, "size": 45, "color": COLOURS[0], "opacity": 1}
    spread = {"type": "rule", "strokeWidth": 4, "opacity": 0.35, "color": COLOURS[0]}
    spec = {
        "height": 240,
        "transform": [_where("cell", "phase")],
        "layer": _effective(x, mean, spread),
    }
    note = "Mean (point) and 5 to 95 % (bar) of what single rows keep; the dashed line is K."
    return Chart(
        "effective_k", "Effective K by layer", note, spec, frame, [_cells(run, frame), _phases(frame)]
    )


def _by_row_length(run: LoadedRun) -> Chart | None:
    frame = run.effective_k
    if frame.empty:
        return None
    frame = frame.assign(n=np.sqrt(frame["n_low"] * frame["n_high"]), p5=frame["p5"].clip(lower=1.0))
    frame["words"] = [f"{low} to {high}" for low, high in zip(frame["n_low"], frame["n_high"])]
    frame = frame.drop(columns=["task", "n_low", "n_high", "p50"])
    x = {"field": "n", "type": "quantitative", "title": "row length n (tokens)", "scale": {"zero": False}}
    mean = {"type": "line", "color": COLOURS[0], "point": {"filled": True, "size": 35, "color": COLOURS[0]}}
    spread = {"type": "area", "opacity": 0.25, "color": COLOURS[0]}
    spec = {
        "height": 240,
        "transform": [_where("cell", "phase", "layer")],
        "layer": _effective(x, mean, spread),
    }
    note = "Mean (line) and 5 to 95 % (band) of what the rows of one layer keep; the dashed line is K."
    choices = [_cells(run, frame), _phases(frame), _numbers("layer", frame)]
    return Chart("effective_k_by_length", "Effective K by row length", note, spec, frame, choices)


def _popularity(run: LoadedRun) -> Chart | None:
    frame = data.popularity(run)
    if frame.empty:
        return None
    groups = sorted(set(frame["group"]) - {data.ALL_GROUPS})
    options = [Option("all groups", {"@group": data.ALL_GROUPS})]
    options += [Option(f"group {one}", {"@group": one}) for one in groups]
    layers = int(frame["layer"].max()) + 1
    spec = {
        "height": {"step": max(5, min(14, 420 // layers))},
        "transform": [_where("cell", "group")],
        "mark": {"type": "rect"},
        "encoding": {
            "x": {
                "field": "first",
                "type": "quantitative",
                "title": "position of the token (V row)",
                "scale": {"nice": False, "zero": False},
            },
            "x2": {"field": "end"},
            "y": {"field": "layer", "type": "ordinal", "title": "layer", "axis": _ticks(frame["layer"])},
            "color": {
                "field": "share",
                "type": "quantitative",
                "title": "steps that keep it (%)",
                "legend": ACROSS,
                "scale": {"scheme": "viridis", "domain": [0, 100]},
            },
            "tooltip": [
                {"field": "layer"},
                {"field": "first", "title": "from position"},
                {"field": "share", "title": "steps that keep it (%)", "format": ".1f"},
            ],
        },
    }
    note = "The first text that was generated: at how many of its decode steps some head keeps the V row."
    choices = [_cells(run, frame), Choice("group", options)]
    return Chart("popularity", "Which V rows are kept", note, spec, frame, choices)
