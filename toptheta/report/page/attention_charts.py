"""Charts of attention statistics: kept elements by layer and head, thresholds, effective K, V-row
popularity."""

import numpy as np
import pandas as pd

from toptheta.report.frames import LoadedRun
from toptheta.report.page import data
from toptheta.report.page.chart import (
    ACROSS,
    COLOURS,
    DENSE_COLOUR,
    KINDS,
    Chart,
    Choice,
    Option,
    Spec,
    cell_choice,
    number_choice,
    phase_choice,
    ticks,
    where,
)


def kept(run: LoadedRun) -> Chart | None:
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
        "transform": [where("cell", "phase", "kind")],
        "mark": {"type": "rect", "cursor": "pointer"},
        "encoding": {
            "x": {"field": "head", "type": "ordinal", "title": "@unit", "axis": ticks(frame["head"])},
            "y": {"field": "layer", "type": "ordinal", "title": "layer", "axis": ticks(frame["layer"])},
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
    note = "In % of dense attention, for each layer and head. Click a head to see its thresholds below."
    choices = [cell_choice(run, frame), phase_choice(frame), Choice("what", what)]
    return Chart("kept", "Kept by layer and head", note, spec, frame, choices, ("layer", "head"))


def thresholds(run: LoadedRun) -> Chart | None:
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
        "transform": [where("cell", "layer")],
        "layer": [
            {
                "mark": {"type": "line", "color": DENSE_COLOUR, "opacity": 0.35, "strokeWidth": 1},
                "encoding": {"x": x, "y": y, "detail": {"field": "head"}},
            },
            {
                "transform": [where("head")],
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
    note = (
        "Elements above the threshold are kept. Coloured: the selected head; grey: the other heads of its "
        "layer. A row is one query position; its length is the number of keys that it sees. Each point is a "
        "mean over neighbouring row lengths."
    )
    choices = [cell_choice(run, frame, **facts), number_choice("layer", frame), number_choice("head", frame)]
    return Chart("thresholds", "Thresholds by row length", note, spec, frame, choices)


def _effective(x: Spec, mean: Spec, spread: Spec) -> list[Spec]:
    """The layers of both effective K charts: 5th to 95th percentile, mean, K."""
    y = {
        "field": "mean",
        "type": "quantitative",
        "title": "elements kept per row",
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


def by_layer(run: LoadedRun) -> Chart | None:
    rows = [
        {"cell": label, "phase": one["phase"], "k": one["k"], "words": "all"} | layer
        for label, result in zip(run.labels, run.results)
        for one in result.effective_k or []
        for layer in one["layers"]
    ]
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    frame["p5"] = frame["p5"].clip(lower=1.0)  # a log scale cannot show less
    x = {"field": "layer", "type": "quantitative", "title": "layer", "scale": {"nice": False, "padding": 8}}
    mean = {"type": "point", "filled": True, "size": 45, "color": COLOURS[0], "opacity": 1}
    spread = {"type": "rule", "strokeWidth": 4, "opacity": 0.35, "color": COLOURS[0]}
    spec = {
        "height": 240,
        "transform": [where("cell", "phase")],
        "layer": _effective(x, mean, spread),
    }
    note = (
        "Number of elements that individual rows keep: mean (point) and 5th to 95th percentile (bar). The "
        "dashed line is K."
    )
    return Chart(
        "effective_k",
        "Effective K by layer",
        note,
        spec,
        frame,
        [cell_choice(run, frame), phase_choice(frame)],
    )


def by_row_length(run: LoadedRun) -> Chart | None:
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
        "transform": [where("cell", "phase", "layer")],
        "layer": _effective(x, mean, spread),
    }
    note = (
        "Number of elements that individual rows keep: mean (line) and 5th to 95th percentile (band). The "
        "dashed line is K."
    )
    choices = [cell_choice(run, frame), phase_choice(frame), number_choice("layer", frame)]
    return Chart("effective_k_by_length", "Effective K by row length", note, spec, frame, choices)


def popularity(run: LoadedRun) -> Chart | None:
    frame = data.popularity(run)
    if frame.empty:
        return None
    groups = sorted(set(frame["group"]) - {data.ALL_GROUPS})
    options = [Option("all groups", {"@group": data.ALL_GROUPS})]
    options += [Option(f"group {one}", {"@group": one}) for one in groups]
    layers = int(frame["layer"].max()) + 1
    spec = {
        "height": {"step": max(5, min(14, 420 // layers))},
        "transform": [where("cell", "group")],
        "mark": {"type": "rect"},
        "encoding": {
            "x": {
                "field": "first",
                "type": "quantitative",
                "title": "position of the token (V row)",
                "scale": {"nice": False, "zero": False},
            },
            "x2": {"field": "end"},
            "y": {"field": "layer", "type": "ordinal", "title": "layer", "axis": ticks(frame["layer"])},
            "color": {
                "field": "share",
                "type": "quantitative",
                "title": "decode steps that keep it (%)",
                "legend": ACROSS,
                "scale": {"scheme": "viridis", "domain": [0, 100]},
            },
            "tooltip": [
                {"field": "layer"},
                {"field": "first", "title": "from position"},
                {"field": "share", "title": "decode steps that keep it (%)", "format": ".1f"},
            ],
        },
    }
    note = "First generated text: the share of decode steps in which some head keeps the V row of a token."
    choices = [cell_choice(run, frame), Choice("group", options)]
    return Chart("popularity", "Which V rows are kept", note, spec, frame, choices)
