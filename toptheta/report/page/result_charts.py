"""Charts of results: scores against bytes read or kept shares, perplexity by length, needles."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from toptheta.report.frames import LoadedRun
from toptheta.report.page.chart import (
    ACROSS,
    Chart,
    Choice,
    Option,
    Spec,
    cell_choice,
    families_of,
    family_colour,
    series,
    where,
)
from toptheta.report.results import DECODE, PREFILL, CellResult
from toptheta.report.tables import PAIRED, PHASE_WORDS, TEXT_METRICS, is_share


def tradeoff(run: LoadedRun) -> Chart | None:
    """Scores against bytes read or kept shares."""
    costs, scores = _costs(run.results), _scores(run.results)
    if not costs or not scores or all(one.dense for one in run.results):
        return None
    rows = pd.DataFrame({"cell": run.labels, "family": families_of(run)})
    rows["k"] = [result.k for result in run.results]
    x_options, y_options = [], []
    for i, (title, values) in enumerate(costs):
        rows[f"x{i}"] = values
        x_options.append(Option(title, {"@x": f"x{i}", "@x_title": f"{title} (% of dense attention)"}))
    for i, (title, values, errors) in enumerate(scores):
        low, high = values - errors, values + errors
        log = bool(
            (low > 0).sum() > 1 and (values >= 0).all() and values.max() > 30 * values[values > 0].min()
        )
        rows[f"y{i}"], rows[f"low{i}"], rows[f"high{i}"] = values, low, high
        if log:  # a logarithmic axis cannot show 0, such as the KL of dense attention
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
    colour = family_colour(run)
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
        "Quality against cost",
        "A score, or the difference from dense attention, against what is read or kept. Error bars are ± one "
        "standard error; the number at a point is its K; a line connects the points of a method.",
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
        if phase == PREFILL:  # nearly every V row of a prompt is kept by one of its rows
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
            found.append(series(f"{name}, difference from dense attention", pairs, is_share(name)))
    words = {name: title.removesuffix(" %") for name, title in TEXT_METRICS}
    metrics = dict.fromkeys(name for one in results for name in one.metrics)
    for name in sorted(metrics, key=lambda name: (name not in words, list(metrics).index(name))):
        pairs = [_value(one, name) for one in results]
        found.append(series(words.get(name, name), pairs, is_share(name)))
    return found


def _difference(result: CellResult, name: str) -> tuple[float, float]:
    one = result.paired.get("scores", {}).get(name)
    if one is None:
        return (0.0, 0.0) if result.dense else (np.nan, np.nan)
    return one["value"], one["stderr"] or 0.0


def _value(result: CellResult, name: str) -> tuple[float, float]:
    metric = result.metrics.get(name)
    return (np.nan, np.nan) if metric is None else (metric.value, metric.stderr or 0.0)


def by_length(run: LoadedRun) -> Chart | None:
    """Perplexity by context length, of a run that reads a text."""
    bounds = [[row["length"] for row in one.by_length] for one in run.results]
    if len(bounds[0]) < 2 or any(other != bounds[0] for other in bounds):
        return None
    base = run.results[0] if run.results[0].dense else None
    rows = []
    for label, family, one in zip(run.labels, families_of(run), run.results):
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
                "title": "context length (tokens before the predicted one)",
                "axis": {"labelAngle": 0},
            },
            "y": y,
            "color": family_colour(run),
            "detail": {"field": "cell"},
            "tooltip": [{"field": "cell"}, {"field": "lengths"}, {"field": "@y", "format": ".4~g"}],
        },
    }
    options = [Option("perplexity", {"@y": "ppl", "@y_title": "perplexity"})]
    if base:
        title = "increase of perplexity over dense attention (%)"
        options.insert(0, Option(title, {"@y": "above", "@y_title": title}))
    frame = pd.DataFrame(rows)
    note = "Each line is one method with one K."
    return Chart(
        "by_length", "Perplexity by context length", note, spec, frame, [Choice("perplexity", options)]
    )


def needles(run: LoadedRun) -> Chart | None:
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
    y = {"field": "depth", "type": "ordinal", "title": "position of the needle in the context (%)"}
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
        "transform": [where("cell"), {"calculate": "datum.found + ' of ' + datum.count", "as": "words"}],
        "encoding": {"x": x, "y": y, "tooltip": [{"field": "words", "title": "found"}]},
        "layer": [
            {"mark": "rect", "encoding": {"color": colour}},
            {"mark": {"type": "text"}, "encoding": {"text": {"field": "words"}, "color": text_colour}},
        ],
    }
    note = "A needle is a number hidden in a long text; it is found if the reply contains it."
    return Chart("needles", "Needles found", note, spec, frame, [cell_choice(run, frame)])
