"""The cells of a table of reproduce.json, each checked like a command line."""

import fnmatch
import json
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict

from toptheta.eval.cell_params import CellParams
from toptheta.eval.cli import Parser, parse_settings
from toptheta.eval.rules import reads_rows, without_effect
from toptheta.eval.settings import (
    LONGBENCH,
    NEEDLE,
    PERPLEXITY,
    CellOptions,
    GenSettings,
    QASettings,
    Settings,
    resolve_device,
)
from toptheta.eval.tasks.lm_eval_tasks import check_task
from toptheta.methods.params import MethodOptions
from toptheta.report.sweep_tables import with_k
from toptheta.util.errors import UsageError
from toptheta.util.options import at_least, from_flags, option, options_of
from toptheta.util.schema import Count, read_json

KINDS: dict[str, type[Settings]] = {"test_llama.py": QASettings, "gen_llama.py": GenSettings}
TASK_FLAG = {"test_llama.py": "task", "gen_llama.py": "dataset"}
SAMPLES_FLAG = {"test_llama.py": "num_samples", "gen_llama.py": "num_tasks", NEEDLE: "needle_repeats"}
TEXT_FLAGS = {"text", "calib_text"}  # files of a table: in --data_dir, or of Python's library
STDLIB = "stdlib:"  # before the name of a source file of Python's standard library


@dataclass(frozen=True)
class SweepOptions:
    """The flags of reproduce.py."""

    table: str | None = option(None, "the table to run; without it, list the tables", metavar="NAME")
    dry_run: bool = option(False, "only print the commands that are left to run")
    table_only: bool = option(False, "run nothing: build the table from the finished cells")
    redraw: bool = option(False, "run nothing: draw the plots of a table again from its results.json")
    only: str | None = option(
        None, "only cells whose name (task, method, K=64) contains one of these", metavar="TEXT[,TEXT]"
    )
    samples: str | None = option(
        None,
        "questions, programs, windows, or needles at each point, instead of the table's number",
        metavar="N",
    )
    data_dir: str | None = option(None, "local data: see test_llama.py --help task", metavar="DIR")
    jobs: int = option(
        1, "runs at a time, each on its own GPU or share of the CPU cores", metavar="N", rule=at_least(1)
    )
    slurm: str | None = option(
        None, "submit the runs to this partition of a Slurm cluster", metavar="PARTITION"
    )
    slurm_hours: int = option(24, "time limit of each Slurm job (default 24)", metavar="H", rule=at_least(1))
    file: str | None = option(
        None, "the file that declares the tables (default reproduce.json next to this script)", metavar="FILE"
    )
    output_dir: str = option("products", "folder of runs and tables (default products)", metavar="DIR")


@dataclass(frozen=True)
class SweepCell:
    """One row of a table. task: its name in the table; arguments: of the script, except --k; k: None for
    methods without; dense: nothing is dropped; asked: the arguments, with the table's flags that have no
    effect on this cell alone."""

    task: str
    method: str
    k: int | None
    script: str
    arguments: tuple[str, ...]
    key: str
    dense: bool = False
    asked: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.task} {with_k(self.method, self.k)}"


class Part(TypedDict, total=False):
    """Cells of a table: each task with each method and K, or with those of a group. name: of its tasks, in
    the table; label: of the row, after its method. Keys of a group's row override those of the
    part."""

    script: str
    tasks: list[str]
    methods: list[str]
    k: list[int]
    flags: dict[str, Any]
    group: str
    name: str
    label: str


class _Table(TypedDict):
    title: str
    parts: list[Part]


class Table(_Table, total=False):
    """gpus: how many each run takes; at_vrows: shares of V rows at which the methods' KL are compared."""

    flags: dict[str, Any]
    gpus: Count
    at_vrows: list[float]


class _Tables(TypedDict):
    methods: dict[str, dict[str, Any]]
    tables: dict[str, Table]


class Tables(_Tables, total=False):
    """A file of tables. methods: by name, the flags that select each; groups: by name, rows that parts
    share."""

    groups: dict[str, list[Part]]


def read_tables(path: Path) -> Tables:
    """Raises UsageError for a file that does not declare tables."""
    try:
        return read_json(path, Tables, "correct it, or name another file with --file")
    except OSError as error:
        raise UsageError(f"--file {path} cannot be read: {error.strerror}.") from None


def choose(name: str, among: dict[str, Any], flag: str) -> Any:
    if name in among:
        return among[name]
    near = get_close_matches(name, among, n=3, cutoff=0.4) or list(among)
    raise UsageError(f"{flag} {name!r} is unknown: choose for example {', '.join(near)}.")


def _rows(part: Part, groups: dict[str, list[Part]]) -> list[dict[str, Any]]:
    """One part for each row of a part's group, which other parts may share; a part without a group stays
    alone."""
    rows = choose(part["group"], groups, "reproduce.json: group") if "group" in part else [Part()]
    found = [{**part, **row, "flags": part.get("flags", {}) | row.get("flags", {})} for row in rows]
    for one in found:
        for name in ("script", "tasks", "methods", "k"):
            if name not in one:
                raise UsageError(f"reproduce.json: a part of the table has no {name!r}: add it.")
    return found


def plan(
    table: Table,
    tables: Tables,
    options: SweepOptions,
    parsers: dict[str, Callable[[], Parser]],
) -> list[SweepCell]:
    """The cells of one of the `tables`, each checked like a command line. Raises UsageError."""
    cells, methods = [], tables["methods"]
    for part in [row for given in table["parts"] for row in _rows(given, tables.get("groups", {}))]:
        script = part["script"]
        if script not in KINDS:
            raise UsageError(f"reproduce.json: script {script!r} is not one of {', '.join(KINDS)}.")
        for task in part["tasks"]:
            if script == "test_llama.py":
                check_task(task, options.data_dir)
            for name in part["methods"]:
                method = choose(name, methods, "reproduce.json: method")
                if len(method.keys() & {"mode", "method"}) != 1:
                    raise UsageError(f"reproduce.json: method {name!r} needs either 'method' or 'mode'.")
                shared = table.get("flags", {}) | part.get("flags", {})
                flags = shared | method
                flags[TASK_FLAG[script]] = task
                samples = SAMPLES_FLAG.get(task, SAMPLES_FLAG[script])
                if options.samples is not None:
                    flags[samples] = options.samples
                for file in [name for name in flags if name in TEXT_FLAGS and flags[name] is not None]:
                    flags[file] = str(_text_file(str(flags[file]), options.data_dir))
                if options.data_dir:
                    flags["data_dir"] = options.data_dir
                flags["k"] = part["k"]
                droppable = {*shared, "data_dir", "k"} - method.keys()
                try:
                    arguments, settings = _settings(script, flags, droppable, parsers)
                except UsageError as error:  # the script names its own flag
                    if options.samples is None:
                        raise
                    raise UsageError(str(error).replace(f"--{samples} ", "--samples ", 1)) from None
                for cell in settings.cells():
                    key = answer_key(settings, cell)
                    shown = part.get("name", task)
                    row = f"{name}: {part['label']}" if "label" in part else name
                    asked = tuple(_arguments({k: v for k, v in flags.items() if k != "k"}))
                    cells.append(
                        SweepCell(shown, row, cell.k, script, arguments, key, not cell.sparse, asked)
                    )
    return cells


def _text_file(name: str, data_dir: str | None) -> Path:
    """A text of a table: in `data_dir`, or a source file of Python's standard library. Raises UsageError if
    it is missing."""
    if name.startswith(STDLIB):
        return Path(sysconfig.get_path("stdlib")) / name.removeprefix(STDLIB)
    path = Path(data_dir or ".") / name
    if not path.is_file():
        where = f"--data_dir {data_dir} does not have" if data_dir else "--data_dir is needed for"
        raise UsageError(
            f"{where} the text {name} of this table: name a folder that has it (see reproduce.md)."
        )
    return path


def _settings(
    script: str, flags: dict[str, Any], droppable: set[str], parsers: dict[str, Callable[[], Parser]]
) -> tuple[tuple[str, ...], Settings]:
    """Arguments of a script, except --k, and the resulting settings. Raises UsageError.

    droppable: flags of the whole table, which are left out where they have no effect.
    """
    kind = KINDS[script]

    def parsed(flags: dict[str, Any]) -> Any:
        return parsers[script]().parse_args(_arguments(flags))

    unused = without_effect(from_flags(kind, parsed(flags)), droppable)
    used = {name: value for name, value in flags.items() if name not in unused}
    settings = resolve_device(parse_settings(kind, parsed(used)))
    return tuple(_arguments({name: value for name, value in used.items() if name != "k"})), settings


def _arguments(flags: dict[str, Any]) -> list[str]:
    arguments = []
    for name, value in flags.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not False and value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            arguments += [f"--{name}", text]
    return arguments


def only_named(cells: list[SweepCell], only: str) -> list[SweepCell]:
    chosen: set[SweepCell] = set()
    for text in (part.strip() for part in only.split(",")):
        if not text:
            raise UsageError(f"--only {only!r} has an empty part: leave the comma out.")
        found = [c for c in cells if fnmatch.fnmatch(c.name.lower(), f"*{text.lower()}*")]
        if not found:
            words = dict.fromkeys(word for cell in cells for word in (cell.task, cell.method))
            near = get_close_matches(text, words, n=3, cutoff=0.4) or list(words)
            raise UsageError(f"--only {text!r} matches no cell: choose for example {', '.join(near)}.")
        chosen.update(found)
    return [cell for cell in cells if cell in chosen]


def answer_key(settings: Settings, cell: CellParams) -> str:
    """The key of a cell: everything that changes its answers, i.e. its method and the relevant settings."""
    method_options = [f.name for f in fields(MethodOptions)]
    of_cell = {*method_options, *(f.name for f in fields(CellOptions))}
    answering = [name for name, facts, _ in options_of(settings) if facts.answers]
    facts: dict[str, Any] = {name: getattr(settings, name) for name in answering if name not in of_cell}
    if cell.sparse:
        facts |= {name: getattr(cell, name) for name in method_options} | {"method": cell.method.spec}
    if cell.k is not None:
        facts |= {"k": cell.k, "layerk": settings.layerk}
    if not cell.needs_calibration:
        facts = {name: value for name, value in facts.items() if not name.startswith("calib_")}
        if isinstance(settings, GenSettings) and settings.dataset in (PERPLEXITY, *LONGBENCH):
            facts["left_out"] = None if settings.calib_task else settings.calib_samples  # of the entries
    if not reads_rows(settings, [cell]):
        facts.pop("data_dir", None)
    for name in ("data_dir", *TEXT_FLAGS):
        if facts.get(name):
            facts[name] = str(Path(facts[name]).resolve())
    return json.dumps(facts, sort_keys=True)
