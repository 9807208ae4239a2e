"""From flags to image files: finds out what a run contains, draws it, and reports what is missing."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from toptheta.report.plots.flags import Request
from toptheta.report.plots.read import (
    named_layers,
    read_config,
    read_kept,
    read_sizes,
    read_thresholds,
)
from toptheta.report.plots.style import look, save_figure
from toptheta.report.results import PHASES
from toptheta.util.errors import UsageError
from toptheta.util.files import one_of


@dataclass(frozen=True)
class Run:
    """A run's folder, and the layers and heads to draw.

    layer_ids, head_ids: None means all. num_layers: 0 if unknown. placement: None if unknown.
    """

    folder: Path
    title: str
    num_layers: int
    layer_ids: tuple[int, ...] | None = None
    head_ids: tuple[int, ...] | None = None
    placement: str | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose files are read."""
        return self.layer_ids if self.layer_ids is not None else tuple(range(self.num_layers))

    @property
    def head_words(self) -> str:
        """The heads that are combined, in words."""
        if self.head_ids is None:
            return "all heads"
        if len(self.head_ids) > 6:
            return f"{len(self.head_ids)} chosen heads"
        return f"head{'s' if len(self.head_ids) > 1 else ''} {', '.join(map(str, self.head_ids))}"


@dataclass
class Drawing:
    """A figure (None: its inputs are missing), the name of its file without suffix, and sentences on what it
    lacks."""

    name: str
    figure: Figure | None = None
    notes: list[str] = field(default_factory=list)


def draw_report(request: Request, figures: Sequence[Callable[[Run], Drawing]], inputs: str) -> int:
    """Draw each of `figures` that the folder has files for, and return the exit code.

    inputs: the names of these files, for the user. 0: at least one figure was drawn; missing files are
    reported on stderr. 2: a flag is wrong, nothing can be drawn, or a file is damaged (the other figures are
    then drawn all the same).
    """
    try:
        run = open_run(request)
        drawn, failed, notes = 0, False, []
        for draw in figures:
            try:
                with look():
                    drawing = draw(run)
            except UsageError as error:
                print(error, file=sys.stderr)
                failed = True
                continue
            notes += drawing.notes
            if drawing.figure is not None:
                print(_save(drawing, request))
                drawn += 1
        if not drawn and not failed:
            cells = cells_in(run.folder)
            raise UsageError(
                f"-d/--dir is {str(run.folder)!r}, which has nothing to draw (looked for {inputs}): name "
                f"{cells or 'the folder of a run, products/<timestamp>'}, or choose other --layer-ids and "
                "--head-ids."
            )
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{error.filename} is not accessible ({error.strerror}): change its permissions, or choose "
            "another folder.",
            file=sys.stderr,
        )
        return 2
    for note in notes:
        print(note, file=sys.stderr)
    return 2 if failed else 0


def cells_in(folder: Path) -> str:
    """For errors, the cells of a run, see `one_of`."""
    return one_of("cells", folder, ["*/config.json", "*/*/config.json"])


def _save(drawing: Drawing, request: Request) -> Path:
    path = request.output / f"{drawing.name}.{request.format}"
    assert drawing.figure is not None
    try:
        save_figure(drawing.figure, path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): name another folder with --output."
        ) from None
    return path


def open_run(request: Request) -> Run:
    """Determine the model's size (from config.json, else flags, else files), and check the chosen layers and
    heads against it.

    Raises UsageError if flags and folder contradict each other, or a layer or head does not exist.
    """
    config = read_config(request.folder)
    num_layers = _size(config, "num_layers", request.layers, "--layers", request.folder)
    num_heads = _size(config, "num_heads", request.heads, "--heads", request.folder)
    if num_layers is None or (num_heads is None and request.head_ids is not None):
        found_layers, found_heads = _sizes_in_files(request.folder)
        num_layers = found_layers if num_layers is None else num_layers
        num_heads = found_heads if num_heads is None else num_heads
    _check_ids("layer", request.layer_ids, num_layers)
    _check_ids("head", request.head_ids, num_heads)
    words = [config[key] for key in ("model", "method") if isinstance(config.get(key), str)]
    title = request.title if request.title is not None else ", ".join(words) or request.folder.resolve().name
    settings = config.get("settings")
    placement = settings.get("placement") if isinstance(settings, dict) else None
    return Run(
        request.folder,
        title,
        num_layers or 0,
        request.layer_ids,
        request.head_ids,
        placement if isinstance(placement, str) else None,
    )


def spread(ids: Sequence[int], count: int = 4) -> tuple[int, ...]:
    """At most `count` of `ids`, evenly spaced, with the first and the last."""
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int))
    return tuple(ids[i] for i in chosen)


def missing_files(run: Run, names: Sequence[str], what: str, some: bool = False) -> str:
    """A sentence on missing files, without which `what` is not drawn; some: other such files exist."""
    shown, verb = (
        (names[0], "is") if len(names) == 1 else (f"{names[0]} to {names[-1]} ({len(names)} files)", "are")
    )
    effect = f"the plot is without {what}" if some else f"there is no plot of {what}"
    return f"{shown} {verb} missing or empty in {run.folder}: {effect}."


def _size(config: dict, key: str, flag_value: int | None, flag: str, folder: Path) -> int | None:
    value = config.get(key)
    if value is None:
        return flag_value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UsageError(
            f"{folder / 'config.json'}: {key} is {value!r}, but must be a number above 0: correct it."
        )
    if flag_value not in (None, value):
        raise UsageError(
            f"{flag} is {flag_value}, but {folder / 'config.json'} says {value}: leave {flag} out."
        )
    return value


def _check_ids(word: str, ids: tuple[int, ...] | None, count: int | None) -> None:
    if ids is None or count is None or ids[-1] < count:
        return
    raise UsageError(
        f"there is no {word} {ids[-1]}: the run has {count} {word}s, choose from 0 to {count - 1}."
    )


def _sizes_in_files(folder: Path) -> tuple[int | None, int | None]:
    """The numbers of layers and heads, from the highest ids in the folder; None if unknown."""
    layers = named_layers(folder)
    num_layers = max(layers) + 1 if layers else 0
    thresholds = read_thresholds(folder)
    if thresholds is not None:
        return max(num_layers, int(thresholds["layer"].max()) + 1), int(thresholds["head"].max()) + 1
    for layer in layers:
        for frame in (
            read_sizes(folder, layer),
            *(read_kept(folder, layer, "attn", phase) for phase in PHASES),
        ):
            if frame is not None:
                return num_layers, int(frame["head"].max()) + 1
    return num_layers or None, None
