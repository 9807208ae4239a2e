"""Checks of combinations of settings, before anything is loaded. Rules for a single setting are declared with
it, in settings.py."""

from collections.abc import Callable, Collection
from pathlib import Path

from toptheta.eval.cell_params import CellParams
from toptheta.eval.settings import (
    BUNDLED_TASK,
    HUMANEVAL,
    LONGBENCH,
    PERPLEXITY,
    AnySettings,
    GenSettings,
    QASettings,
    Settings,
)
from toptheta.methods.base import Selection
from toptheta.methods.params import check
from toptheta.util.errors import UsageError
from toptheta.util.options import check_options, options_of


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.lower()}"


# Flags that need a cell with a property, and what to say where no cell has it.
DENSE = "on dense attention: leave it out, or add --mode 0 or 1"
NO_THRESHOLDS = "without thresholds: leave it out, or add --mode 0"
NEEDING: list[tuple[set[str], Callable[[CellParams], bool], str]] = [
    ({"placement", "sdc", "vmc"}, lambda cell: not cell.method.is_dense, DENSE),
    (
        {"k", "layerk"},
        lambda cell: cell.method.uses_k,
        "on methods without a K: leave it out, or add --mode 0 or 1",
    ),
    ({"sdc_scale"}, lambda cell: cell.sdc != "none", "where no cell has SDC: leave it out, or add --sdc"),
    ({"capk", "calib_tac"}, lambda cell: cell.method.needs_thresholds, NO_THRESHOLDS),
    (
        {"when_slower"},
        lambda cell: _has_profile(cell),
        "on methods that its profiles do not cover: leave it out, or add --mode 0",
    ),
    (
        {"calib_to", "calib_layers", "calib_add_sigma", "calib_dump_samples"},
        lambda cell: cell.needs_thresholds,
        NO_THRESHOLDS,
    ),
    (
        {"calib_interp", "calib_smooth", "calib_sample_frac", "calib_task", "calib_text", "calib_seq_len"},
        lambda cell: cell.needs_calibration,
        "without calibration: leave it out, or add --mode 0 or --sdc offline-calibrated",
    ),
]
PROMPTS = {"calib_samples", "calib_task", "calib_text", "calib_seq_len", "calib_dump_samples"}
# What --calibrate_only does not come to
EVALUATING = {
    *("num_samples", "num_samples_per_task", "do_sample", "allow_code_execution", "needle_repeats"),
    *("reference_dtype", "statistics", "vrow_popularity", "when_slower", "calib_interp", "calib_smooth"),
}


def without_effect(settings: Settings, given: Collection[str]) -> dict[str, str]:
    """Of the given flags those that change nothing, in the same order, and why."""
    cells, found = settings.cells(), dict[str, str]()
    for names, needed, why in NEEDING:
        for name in names & set(given):
            if not any(name not in cell.given and needed(cell) for cell in cells):
                found[name] = why
    if settings.placement == "none":  # as good as dense
        found.pop("placement", None)
    calibrates = any(cell.needs_calibration for cell in cells)
    if settings.calib_load_path:
        found |= dict.fromkeys(PROMPTS, "with --calib_load_path, which skips calibration: leave one out")
    elif not calibrates:
        found |= {"calib_samples": "without calibration: leave it out, or add --mode 0"}
    if isinstance(settings, GenSettings) and settings.dataset in (PERPLEXITY, *LONGBENCH):
        if not settings.calib_task:
            found.pop("calib_samples", None)  # as many entries are not evaluated
    if settings.calibrate_only:
        of_rest = {"num_tasks"} if getattr(settings, "dataset", HUMANEVAL) != HUMANEVAL else set()
        found |= dict.fromkeys(
            EVALUATING | of_rest, "with --calibrate_only, which evaluates nothing: leave one out"
        )
    if not reads_rows(settings, cells):
        task = getattr(settings, "dataset", getattr(settings, "task", ""))
        found["data_dir"] = f"on {task}: leave it out, or choose a task with local rows"
    return {name: found[name] for name in given if name in found}


def _has_profile(cell: CellParams) -> bool:
    """Whether the cell's selection is one that profiles of --when_slower cover."""
    kernel = cell.layer(1).kernel
    return kernel is not None and kernel.selection == Selection.THRESHOLD and not cell.method.key_bits


def reads_rows(settings: Settings, cells: Collection[CellParams]) -> bool:
    """Whether cells evaluate or calibrate on rows that may lie in --data_dir."""
    if isinstance(settings, GenSettings):
        if settings.dataset in LONGBENCH:
            return True
    elif isinstance(settings, QASettings):
        if {task.strip() for task in settings.task.split(",")} != {BUNDLED_TASK}:
            return True
    calibrates = not settings.calib_load_path and any(cell.needs_calibration for cell in cells)
    return calibrates and settings.calib_task not in (None, BUNDLED_TASK)


def check_settings(settings: AnySettings) -> AnySettings:
    """The settings, unchanged. Raises UsageError for an invalid value or combination."""
    check_options(settings, flag)
    _check_methods(settings)
    cells = settings.cells()
    for cell in cells:
        check(cell, cell.flag)
        for names, needed, why in NEEDING:
            for name in cell.given:
                if name in names and not needed(cell):
                    raise UsageError(f"{cell.flag(name)} has no effect {why}.")
    needing = [cell for cell in cells if cell.needs_calibration]
    _check_calibration(settings, needing)
    _check_statistics(settings, cells)
    _check_folders(settings)
    if isinstance(settings, GenSettings):
        _check_generation(settings)
    return settings


def _check_folders(settings: Settings) -> None:
    data_dir = getattr(settings, "data_dir", None)
    if data_dir and not Path(data_dir).is_dir():
        raise UsageError(f"--data_dir {data_dir}: there is no such folder.")
    folder = Path(settings.output_dir)
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not nearest.is_dir():
        raise UsageError(f"--output_dir {folder}: {nearest} is not a folder; name another one.")


def _check_methods(settings: Settings) -> None:
    defaults = type(settings)()
    if settings.method and settings.mode != defaults.mode:
        raise UsageError("--method and --mode both name the method: give one of them.")
    if not settings.k or not (settings.mode or settings.method):
        raise UsageError("--k and --mode need at least one value each: nothing would be run.")
    if min(settings.k) < 1:
        raise UsageError(
            f"--k {min(settings.k)} keeps nothing: give whole numbers of at least 1 (dense is --mode 3)."
        )
    if any(k < 0 for k in settings.layerk.values()):
        raise UsageError("--layerk takes K of at least 0 (0 leaves the layer dense).")


def _check_calibration(settings: Settings, needing: list[CellParams]) -> None:
    """Flags about calibrated tables need a cell that uses such tables; needing: the cells that do."""
    if settings.calib_load_path:
        if not needing:
            raise UsageError(
                "--calib_load_path is used by --mode 0 and --sdc offline-calibrated only: add one of them, "
                "or leave it out."
            )
        if not Path(settings.calib_load_path).is_dir():
            raise UsageError(f"--calib_load_path {settings.calib_load_path}: there is no such folder.")
    budgets = [cell for cell in needing if cell.calib_to == "budget"]
    if settings.calib_dump_samples and budgets:
        raise UsageError(
            f"--calib_dump_samples saves threshold samples, and {budgets[0].flag('calib_to')} budget takes "
            "none: leave it out."
        )
    if settings.calibrate_only and (not needing or settings.calib_load_path):
        raise UsageError(
            "--calibrate_only needs something to calibrate: --mode 0 or --sdc offline-calibrated, "
            "and no --calib_load_path."
        )


def _check_statistics(settings: Settings, cells: list[CellParams]) -> None:
    if settings.vrow_popularity and not settings.statistics:
        raise UsageError("--vrow_popularity needs statistics: leave out --no_statistics.")
    if settings.effective_k:
        if not any(cell.sparse and cell.method.aims_at_k for cell in cells):
            raise UsageError(
                "--effective_k applies to thresholds only: use it with --mode 0, and not --placement none."
            )
        if not settings.statistics:
            raise UsageError("--effective_k needs statistics: leave out --no_statistics.")
        if settings.calibrate_only:
            raise UsageError("--effective_k needs an evaluation: leave out --calibrate_only.")


def _check_generation(settings: GenSettings) -> None:
    for name, facts, default in options_of(settings):
        if name == "data_dir":
            continue  # it serves --calib_task, too
        if facts.serves and settings.dataset not in facts.serves and getattr(settings, name) != default:
            raise UsageError(
                f"--{name} has no effect on --dataset {settings.dataset}: leave it out, or choose "
                f"{' or '.join(facts.serves)}."
            )
    if settings.num_samples_per_task > 1 and not settings.do_sample:
        raise UsageError("--num_samples_per_task above 1 repeats the same greedy answer: add --do_sample.")
    if settings.dataset == PERPLEXITY:
        _check_perplexity(settings)
    for name in ("text", "calib_text"):
        if getattr(settings, name) and not Path(getattr(settings, name)).is_file():
            raise UsageError(f"--{name} {getattr(settings, name)}: there is no such file.")
    if any(not 0 <= depth <= 100 for depth in settings.needle_depths):
        raise UsageError("--needle_depths are percentages: give numbers from 0 to 100.")
    for length in settings.needle_lengths:
        if not 128 <= length <= settings.max_seq_len:
            raise UsageError(
                f"--needle_lengths has {length}: give lengths from 128 to --max_seq_len "
                f"({settings.max_seq_len}), or raise --max_seq_len."
            )


def _check_perplexity(settings: GenSettings) -> None:
    if not settings.text:
        raise UsageError("--dataset perplexity needs a text: name a file with --text.")
    if settings.decode_from is not None and settings.decode_from > settings.max_seq_len - 2:
        raise UsageError(
            f"--decode_from {settings.decode_from} leaves no token to count in windows of "
            f"{settings.max_seq_len}: lower it, or raise --max_seq_len."
        )
    decode_only = [method.name for method in settings.methods() if method.decode_only]
    if settings.decode_from == 0 and decode_only:
        raise UsageError(
            f"--method {decode_only[0]} leaves prompts dense, and with --decode_from 0 the whole text is a "
            "prompt: raise --decode_from, or leave the method out."
        )
    if settings.decode_from != 0 and settings.vrow_popularity:
        raise UsageError("--vrow_popularity counts V rows in prompts only: add --decode_from 0.")
    if settings.calib_text and settings.calib_task:
        raise UsageError("--calib_text and --calib_task both name the calibration text: give one of them.")
    if settings.calib_seq_len and settings.calib_task:
        raise UsageError(
            f"--calib_seq_len {settings.calib_seq_len} shortens windows of a text, but --calib_task "
            f"{settings.calib_task} has prompts of its own: leave one out."
        )
    if settings.calib_seq_len and settings.calib_seq_len > settings.max_seq_len:
        raise UsageError(
            f"--calib_seq_len {settings.calib_seq_len} is more than the windows' {settings.max_seq_len} "
            "tokens: lower it, or raise --max_seq_len."
        )
