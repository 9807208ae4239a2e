"""Heat map of the V rows that the decode steps of one generated text keep, by token position."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from toptheta.report.plots.read import read_config, read_popularities
from toptheta.report.plots.style import COLOURS, new_figure
from toptheta.report.results import PHASES
from toptheta.util.errors import UsageError

NOT_YET = "#d0d0d0"  # tokens that a step does not see, because they are generated later
NONE_KEPT = "#ffffff"


def popularity_figure(
    folder: Path | str, layer: int, group: int, generation: int = 0, title: str | None = None
) -> Figure:
    """How many heads of a group keep each V row at each decode step, and the share of steps that keep it.

    generation: index of the generated text in the run. Raises UsageError if the file is missing, or has no
    such group or generation.
    """
    folder = Path(folder)
    decode = PHASES[1]
    name = f"layer{layer}_kept_vrow_popularities_{decode}.txt"
    groups = read_popularities(folder, layer, decode)
    if groups is None:
        raise UsageError(f"{name} is missing or empty in {folder}: generate with --vrow_popularity.")
    if group not in groups:
        raise UsageError(f"{name} in {folder} has no group {group}: choose from {_names(groups)}.")
    texts = split_generations(groups[group])
    # In a batch, the steps of its texts alternate.
    if len(texts) > 2 and np.median([len(text) for text in texts]) <= 2:
        raise UsageError(
            f"{name} in {folder} mixes the steps of several texts: generate with --batch_size 1."
        )
    if not 0 <= generation < len(texts):
        raise UsageError(
            f"{name} in {folder} has no generation {generation}: choose from 0 to {len(texts) - 1}."
        )
    return _figure(folder, layer, group, generation, texts[generation], title)


def split_generations(steps: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The decode steps of a group, in file order, divided into texts: each step of a text sees one token more
    than the one before."""
    texts: list[list[np.ndarray]] = []
    for step in steps:
        if texts and len(step) == len(texts[-1][-1]) + 1:
            texts[-1].append(step)
        else:
            texts.append([step])
    return texts


def _figure(
    folder: Path, layer: int, group: int, generation: int, steps: list[np.ndarray], title: str | None
) -> Figure:
    width, prompt = len(steps[-1]), len(steps[0]) - 1
    grid = np.full((len(steps), width), np.nan)
    for i, step in enumerate(steps):
        grid[i, : len(step)] = step
    config = read_config(folder)
    heads, groups = config.get("num_heads"), config.get("num_kv_heads")
    # Without the config, the largest number of heads that kept a row serves as the size of the group.
    size = heads // groups if heads and groups else int(np.nanmax(grid))
    if title is None:
        words = [str(config[key]) for key in ("model", "method") if key in config]
        title = ", ".join(words) or folder.resolve().name
    title = f"{title}: V rows kept in layer {layer}, group {group}, generated text {generation}"
    figure = new_figure(9.5, 6.2, title)
    top, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1.0, 3.2))

    share = 100.0 * (grid > 0).sum(axis=0) / (~np.isnan(grid)).sum(axis=0)
    top.stairs(share, np.arange(width + 1) - 0.5, fill=True, color=COLOURS[0], alpha=0.6, lw=0)
    top.set_ylim(0.0, 104.0)
    top.set_ylabel("decode steps that\nkeep the V row (%)")
    shades = [NONE_KEPT, *colormaps["viridis_r"](np.linspace(0.25, 1.0, size))]
    cmap = ListedColormap(shades).with_extremes(bad=NOT_YET)
    norm = BoundaryNorm(np.arange(size + 2) - 0.5, size + 1)
    axes.imshow(
        grid,
        cmap=cmap,
        norm=norm,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, width - 0.5, len(steps) + 0.5, 0.5),
    )
    axes.grid(False)
    axes.set_xlabel("position of the token (V row)")
    axes.set_ylabel("decode step")
    for each in (top, axes):
        each.axvline(prompt - 0.5, color="black", lw=1.0, ls="--")
    above = {"transform": top.get_xaxis_transform(), "fontsize": 8, "va": "bottom"}
    top.text(prompt - 0.5, 1.02, "← prompt  ", ha="right", **above)
    top.text(prompt - 0.5, 1.02, "  generated →", ha="left", **above)
    ticks = np.unique(np.linspace(0, size, min(size, 8) + 1).round().astype(int))
    bar = figure.colorbar(
        ScalarMappable(norm, cmap),
        ax=[top, axes],
        ticks=ticks,
        label="heads of the group that keep the V row",
    )
    bar.minorticks_off()
    return figure


def _names(ids: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ids)))
