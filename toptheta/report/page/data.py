"""The data of the report's charts: files of a run, reduced to a size that fits a page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toptheta.report.frames import LoadedRun
from toptheta.report.plots.popularity import split_generations
from toptheta.report.plots.read import (
    named_layers,
    read_config,
    read_kept,
    read_popularities,
    read_thresholds,
)
from toptheta.report.results import DECODE, PHASES, CellResult

THRESHOLD_POINTS = 30_000  # of a part: some 700 kB
POPULARITY_POINTS = 20_000
ALL_GROUPS = -1


def sparse_folders(run: LoadedRun) -> Iterator[tuple[str, Path, CellResult]]:
    """Label, folder and result of each sparse cell whose files exist."""
    for label, result in zip(run.labels, run.results):
        if not result.dense and result.folder and Path(result.folder).is_dir():
            yield label, Path(result.folder), result


def placement(run: LoadedRun, label: str) -> str | None:
    """The placement in a cell's config.json, or None."""
    folder = next(folder for one, folder, _ in sparse_folders(run) if one == label)
    return (read_config(folder).get("settings") or {}).get("placement")


def kept_shares(run: LoadedRun) -> pd.DataFrame:
    """cell, phase, kind ('attn', 'vrow'), layer, head (of 'vrow' the group), share (% of dense attention).
    Files are read layer by layer, because those of a large model do not fit into memory."""
    rows = []
    for label, folder, _ in sparse_folders(run):
        for layer in named_layers(folder):
            for kind, unit in (("attn", "head"), ("vrow", "group")):
                for phase in PHASES:
                    frame = read_kept(folder, layer, kind, phase)
                    if frame is None:
                        continue
                    sums = frame.groupby(unit)[["kept", "full"]].sum()
                    shares = (100.0 * sums["kept"] / sums["full"]).round(2)
                    rows += [
                        (label, phase, kind, layer, i, share) for i, share in zip(sums.index.tolist(), shares)
                    ]
    return pd.DataFrame(rows, columns=["cell", "phase", "kind", "layer", "head", "share"])


def threshold_points(run: LoadedRun) -> pd.DataFrame:
    """cell, layer, head, n, theta, samples: means over neighbouring row lengths, at most
    about THRESHOLD_POINTS."""
    parts = []
    found = [(label, read_thresholds(folder)) for label, folder, _ in sparse_folders(run)]
    present = [(label, frame) for label, frame in found if frame is not None]
    for label, frame in present:
        heads = frame.groupby(["layer", "head"]).ngroups
        bins = int(np.clip(THRESHOLD_POINTS // (heads * len(present)), 4, 60))
        lengths = np.sort(frame["n"].unique())
        edges = lengths[np.linspace(0, len(lengths), min(bins, len(lengths)) + 1).astype(int)[:-1]]
        frame["bin"] = np.searchsorted(edges, frame["n"], side="right")
        of_bins = frame.groupby(["layer", "head", "bin"], as_index=False)
        points = of_bins.agg(n=("n", "mean"), theta=("theta", "mean"), samples=("samples", "sum"))
        points["n"], points["theta"] = points["n"].round(1), _significant(points["theta"])
        points.insert(0, "cell", label)
        parts.append(points.drop(columns="bin"))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def popularity(run: LoadedRun) -> pd.DataFrame:
    """cell, layer, group (ALL_GROUPS: their mean), first and end (positions of V rows, end excluded), share
    (%): of the decode steps of the first text that see a V row, those in which a head keeps it."""
    shares: dict[tuple[str, int, int], np.ndarray] = {}
    for label, folder, _ in sparse_folders(run):
        for layer in named_layers(folder):
            groups = read_popularities(folder, layer, DECODE) or {}
            for group, steps in groups.items():
                shares[label, layer, group] = _share_of_steps(split_generations(steps)[0])
            if groups:
                of_layer = [shares[label, layer, group] for group in groups]
                shares[label, layer, ALL_GROUPS] = np.mean(of_layer, axis=0)
    rows: list[dict[str, Any]] = []
    bins = int(np.clip(POPULARITY_POINTS // max(1, len(shares)), 20, 120))
    for (label, layer, group), share in shares.items():
        edges = np.unique(np.linspace(0, len(share), min(bins, len(share)) + 1).astype(int))
        for first, end in zip(edges[:-1].tolist(), edges[1:].tolist()):
            mean = round(float(share[first:end].mean()), 1)
            rows.append(
                {"cell": label, "layer": layer, "group": group, "first": first, "end": end, "share": mean}
            )
    return pd.DataFrame(rows)


def _share_of_steps(steps: list[np.ndarray]) -> np.ndarray:
    """`[N]` %, of the steps (each `[n]`, n growing) that see a V row, those that keep it."""
    kept, seen = np.zeros(len(steps[-1])), np.zeros(len(steps[-1]))
    for step in steps:
        kept[: len(step)] += step > 0
        seen[: len(step)] += 1
    return 100.0 * kept / seen


def _significant(values: pd.Series, digits: int = 4) -> pd.Series:
    return values.map(lambda value: float(f"{value:.{digits}g}"))
