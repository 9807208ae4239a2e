"""Convert the tables of a run or of the published project to a shareable calibration, and back to th.txt and
sdc.txt.

A run's cell contains the settings of its calibration; for th.txt and sdc.txt alone the flags give them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from toptheta.calibration.artefact import FORMAT, OPTIONS, SHAPING, Calibration, CalibrationConfig
from toptheta.calibration.tables import CalibrationTables, read_tables, save_text
from toptheta.eval.cli import Parser
from toptheta.methods.base import of_mode
from toptheta.methods.compensation import SDC_METHODS
from toptheta.methods.params import PLACEMENTS, AttentionParams, check
from toptheta.report.results import read_result
from toptheta.util.errors import UsageError
from toptheta.util.program import run_main
from toptheta.util.schema import read_json

TEXT, ARTEFACT = "text", "calibration"
VERSIONS = ("toptheta", "torch", "transformers")


class _CellConfig(TypedDict):
    mode: int | None
    settings: dict[str, Any]


class CellConfig(_CellConfig, total=False):
    """The keys read from a cell's config.json; files of earlier versions lack some of them."""

    name: str
    model: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    k_per_layer: list[int] | None
    calib_task: str
    environment: dict[str, Any]


def make_parser() -> Parser:
    parser = Parser(
        prog="toptheta-calibration",
        description="Convert a run's folder, or th.txt and sdc.txt, to a calibration for the hub, and back.",
    )
    parser.add_argument("source", metavar="FROM", help="a folder, or the hub id of a calibration")
    parser.add_argument("target", metavar="DIR", help="the folder to write")
    add = parser.add_argument
    add(
        "--to",
        choices=(ARTEFACT, TEXT),
        required=True,
        help="calibration: calibration.safetensors, config.json, README.md; text: th.txt, sdc.txt",
    )
    add("--base_model", metavar="ID", help="the model's hub id (default: its name, where the source has it)")
    add("--text", metavar="WORDS", help="name of the calibration text (default: the run's task)")
    group = parser.add_argument_group("settings that th.txt and sdc.txt do not contain")
    group.add_argument("--num_layers", type=int, metavar="N", help="number of layers, if the last are dense")
    group.add_argument("--placement", choices=PLACEMENTS[:2], help="what is compared (required)")
    group.add_argument("--sdc", choices=SDC_METHODS, help="default: offline-calibrated with sdc.txt")
    group.add_argument("--vmc", action="store_true", help="with V-mean compensation")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    source, target = arguments.source, Path(arguments.target)
    if target.exists() and not target.is_dir():
        raise UsageError(f"DIR {target} is a file: name a folder.")
    of_text = ("num_layers", "placement", "sdc", "vmc")  # the config.json of a run's cell contains them
    if arguments.to == TEXT:
        ignored: tuple[str, ...] = (*of_text, "base_model", "text")
    else:
        ignored = of_text if _config_json(Path(source)) else ()
    for name in ignored:
        if not any(getattr(arguments, name) is absent for absent in (None, False)):
            raise UsageError(f"--{name} has no effect here: leave it out.")
    if arguments.to == TEXT:
        if Path(source).is_dir():
            tables = read_tables(source, "FROM")
        else:
            from toptheta.models.sharing import find_calibration

            tables = find_calibration(source).tables
        save_text(tables, target)
        written = [name for name, layers in (("th.txt", tables.theta), ("sdc.txt", tables.sdc)) if layers]
    else:
        if is_calibration(source):
            raise UsageError(f"FROM {source} already is a calibration in that format.")
        options = {"placement": arguments.placement, "sdc": arguments.sdc, "vmc": arguments.vmc}
        calibration = of_run(
            source, options, arguments.num_layers, arguments.base_model or "", arguments.text or ""
        )
        there = target / "config.json"
        if there.is_file() and read_json(there, dict, "name another folder").get("format") != FORMAT:
            raise UsageError(f"DIR {target} has a config.json, which would be replaced: name another folder.")
        calibration.save(target)
        written = ["calibration.safetensors", "config.json", "README.md"]
    print(f"{target}: {', '.join(written)}")


def is_calibration(folder: Path | str) -> bool:
    """Whether a folder is a shareable calibration, not one of a run."""
    return _config_json(Path(folder)).get("format") == FORMAT


def of_run(
    source: str,
    options: Mapping[str, Any],
    num_layers: int | None = None,
    base_model: str = "",
    text: str = "",
    name: str = "FROM",
) -> Calibration:
    """The calibration in the folder of a run's cell, or of th.txt and sdc.txt alone.

    options: for the latter, placement (required), sdc and vmc; num_layers: for the latter, if it is more than
    in their lines. base_model, text: instead of the cell's. name: of the folder, for errors. Raises
    UsageError if something is missing, damaged or does not match.
    """
    from toptheta.models.sharing import sampled, used

    tables = read_tables(source, name)
    cell = _config_json(Path(source))
    if not cell and options.get("placement") is None:
        raise UsageError(
            f"{name} {source} has no config.json of a run, so --placement is needed: give pre-softmax for "
            "thresholds on scores, post-softmax for thresholds on weights."
        )
    if num_layers is not None and (tables.meta or num_layers < tables.num_layers):
        raise UsageError(
            f"--num_layers {num_layers} has no effect, because {name} {source} has {tables.num_layers} "
            "layers: leave it out."
        )
    tables.num_layers = max(tables.num_layers, num_layers or cell.get("num_layers", 0))
    params = _params(f"{name} {source}", tables, cell, options)
    rows, longest = sampled(tables)
    environment = cell.get("environment", {})
    return Calibration(
        tables,
        CalibrationConfig(
            format=FORMAT,
            base_model=base_model or tables.meta.get("model") or cell.get("model", ""),
            revision=tables.meta.get("revision", ""),
            model_type="",
            num_layers=tables.num_layers,
            num_heads=tables.num_heads,
            num_kv_heads=cell.get("num_kv_heads", 0),
            head_dim=cell.get("head_dim", 0),
            params=used(params, tables.num_layers),
            calibrated_with={key: tables.meta[key] for key in SHAPING if key in tables.meta},
            text=text or tables.meta.get("task") or cell.get("calib_task", ""),
            rows=rows,
            longest=longest,
            measured=_measured(Path(source) / "results.json"),
            versions={key: environment[key] for key in VERSIONS if key in environment},
        ),
    )


def _config_json(folder: Path) -> dict[str, Any]:
    """config.json of a run's cell or of a calibration; empty if there is none. Raises UsageError for a
    different file of that name."""
    path, remedy = folder / "config.json", "name another folder, or remove the file"
    if not path.is_file():
        return {}
    config = read_json(path, dict[str, Any], remedy)
    return config if config.get("format") == FORMAT else read_json(path, CellConfig, remedy)


def _params(
    source: str, tables: CalibrationTables, cell: dict[str, Any], options: Mapping[str, Any]
) -> AttentionParams:
    """The parameters that belong to the tables. Raises UsageError if they are unknown or do not match."""
    from toptheta.models.control import check_tables

    ks = cell.get("k_per_layer") or [tables.k.get(layer, 0) for layer in range(tables.num_layers)]
    if not any(ks):
        raise UsageError(f"{source} has only sdc.txt, which does not contain K: add its th.txt.")
    if cell:
        given = {name: cell["settings"][name] for name in OPTIONS if name in cell["settings"]}
        method = tables.meta.get("method") or cell.get("name") or of_mode(cell["mode"]).name
    else:
        sdc = options.get("sdc") or ("offline-calibrated" if tables.sdc else "none")
        given = {"placement": options["placement"], "sdc": sdc, "vmc": options.get("vmc", False)}
        method = "top_theta" if tables.theta else "top_k"
    params = check(AttentionParams().changed(given | {"method": method, "K": ks}), lambda name: f"--{name}")
    layers = sorted(tables.theta.keys() | tables.sdc.keys())
    try:
        check_tables(layers, params, params.k_per_layer(tables.num_layers), tables)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    return params


def _measured(path: Path) -> dict[str, Any]:
    """A run's results in the form of a calibration's config."""
    if not path.is_file():
        return {}
    result = read_result(path)
    measured: dict[str, Any] = {}
    if "kl" in result.metrics:
        kl, same = result.metrics["kl"], result.metrics["same_top"]
        measured["kl"] = {"mean": kl.value, "stderr": kl.stderr, "texts": kl.count, "same_top": same.value}
    if result.effective_k:
        rows = [{name: x for name, x in one.items() if name != "layers"} for one in result.effective_k]
        measured["effective_k"] = rows
    if result.missed_keys is not None:
        measured["missed_keys"] = result.missed_keys
    return measured


if __name__ == "__main__":
    run_main(main)
