"""Calibrated tables of a whole model: th.txt, sdc.txt and the binary table (DESIGN section 4).

th.txt and sdc.txt are the published project's formats. `calibration.safetensors` holds the same numbers with
what they were calibrated for, and loads in no time. A table that does not fit the model or its use is
refused.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from toptheta.util.errors import UsageError
from toptheta.util.files import find_file, open_text, write_bytes, write_text

BINARY_NAME = "calibration.safetensors"


@dataclass
class LayerTable:
    """One kind of calibrated value of one layer. values: `[H, L]` float64 by row length, NaN where not
    calibrated; samples: `[H, L]` int64, how many rows each value was taken from."""

    values: np.ndarray
    samples: np.ndarray


@dataclass
class LayerValues:
    """What values are compared with, of one layer: mean `[H_kv, D]` of V, scale `[H]` the mean norm of the
    projected, centred values; float32."""

    mean: np.ndarray
    scale: np.ndarray


@dataclass
class CalibrationTables:
    """Tables of all layers. theta, sdc: layer -> LayerTable (a layer left dense has none). k: K per layer,
    where known. values: layer -> LayerValues, for value-aware thresholds; th.txt has no place for them.

    meta: model, revision, placement and flags they were calibrated with; empty for the published project's
    files.
    """

    num_layers: int
    num_heads: int
    k: dict[int, int] = field(default_factory=dict)
    theta: dict[int, LayerTable] = field(default_factory=dict)
    values: dict[int, LayerValues] = field(default_factory=dict)
    sdc: dict[int, LayerTable] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)


def save_tables(tables: CalibrationTables, folder: Path | str) -> None:
    """Write th.txt, sdc.txt (where there are any) and the binary table into `folder`."""
    save_text(tables, folder)
    save_binary(tables, folder)


def save_text(tables: CalibrationTables, folder: Path | str) -> None:
    """Write th.txt and sdc.txt, where there are any, into `folder`."""
    folder = Path(folder)
    if tables.theta:
        write_text(folder / "th.txt", "".join(_lines(tables.theta, tables.k)))
    if tables.sdc:
        write_text(folder / "sdc.txt", "".join(_lines(tables.sdc, None)))


def save_binary(tables: CalibrationTables, folder: Path | str) -> None:
    """Write the binary table into `folder`."""
    arrays: dict[str, np.ndarray] = {}
    for kind, layers in (("theta", tables.theta), ("sdc", tables.sdc)):
        for layer, table in layers.items():
            used = np.flatnonzero((table.samples > 0).any(axis=0))  # calibrated lengths are few among all
            arrays[f"{kind}.{layer}.n"] = used
            arrays[f"{kind}.{layer}.values"] = np.ascontiguousarray(table.values[:, used])
            arrays[f"{kind}.{layer}.samples"] = np.ascontiguousarray(table.samples[:, used])
    for layer, values in tables.values.items():
        arrays[f"value.{layer}.mean"], arrays[f"value.{layer}.scale"] = values.mean, values.scale
    header = {
        "format": "toptheta-calibration-1",
        "num_layers": str(tables.num_layers),
        "num_heads": str(tables.num_heads),
        "k": json.dumps(tables.k),
        "meta": json.dumps(tables.meta),
    }
    write_bytes(Path(folder) / BINARY_NAME, save(arrays, metadata=header))


def read_tables(folder: Path | str, name: str = "calib_load_path") -> CalibrationTables:
    """Read the tables in `folder`, the binary one if it is there. Those of th.txt and sdc.txt are of as many
    layers and heads as their lines name. Raises UsageError when there are none, or they are damaged; `name`
    is what the user calls the folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(
            f"{name} is {str(folder)!r}, which is no folder: name one that holds th.txt or sdc.txt."
        )
    if (folder / BINARY_NAME).is_file():
        return _read_binary(folder / BINARY_NAME)
    theta_path, sdc_path = find_file(folder, "th.txt"), find_file(folder, "sdc.txt")
    if theta_path is None and sdc_path is None:
        raise UsageError(
            f"{name} is {str(folder)!r}, which holds neither th.txt nor sdc.txt: calibrate first."
        )
    tables = CalibrationTables(0, 0)
    for path, has_k in ((theta_path, True), (sdc_path, False)):
        if path is not None:
            layers, ks, sizes = _read_lines(path, has_k)
            tables.num_layers = max(tables.num_layers, sizes[0])
            tables.num_heads = max(tables.num_heads, sizes[1])
            if has_k:
                tables.theta, tables.k = layers, ks
            else:
                tables.sdc = layers
    return tables


def load_tables(
    folder: Path | str, num_layers: int, num_heads: int, name: str = "calib_load_path"
) -> CalibrationTables:
    """`read_tables` for a model of these sizes. Raises UsageError also when they are another model's."""
    tables = read_tables(folder, name)
    found = (tables.num_layers, tables.num_heads)
    knows_all = (Path(folder) / BINARY_NAME).is_file()  # the last layers of a text may be dense
    if found[1] != num_heads or (found[0] != num_layers if knows_all else found[0] > num_layers):
        raise UsageError(
            f"{name}: the tables in {str(folder)!r} are of a model with {found[0]} layers and "
            f"{found[1]} heads, but this "
            f"model has {num_layers} and {num_heads}: load tables that were calibrated on this model."
        )
    tables.num_layers = num_layers
    return tables


def check_fit(
    tables: CalibrationTables,
    kind: str,
    k_per_layer: tuple[int, ...],
    placement: str,
    layers: list[int],
    calib_to: str = "k",
) -> None:
    """Raise UsageError unless `tables` hold `kind` ('theta' or 'sdc') of `layers` for these K, this placement
    and, where they say it, this aim of calibration."""
    held = tables.theta if kind == "theta" else tables.sdc
    word = "thresholds" if kind == "theta" else "SDC table"
    missing = [layer for layer in layers if layer not in held]
    if missing:
        raise UsageError(
            f"the {word} {'lack' if kind == 'theta' else 'lacks'} layer {missing[0]} (of "
            f"{len(layers)} needed): "
            "calibrate with the K of every layer as it will be used."
        )
    for layer in layers:
        if layer in tables.k and tables.k[layer] != k_per_layer[layer]:
            raise UsageError(
                f"the {word} of layer {layer} {'were' if kind == 'theta' else 'was'} calibrated for "
                f"K={tables.k[layer]}, but K={k_per_layer[layer]} is asked for: use that K, or "
                "calibrate anew."
            )
        bad = np.argwhere(np.isnan(held[layer].values) & (held[layer].samples > 0))
        if len(bad):
            head, n = bad[0]
            raise UsageError(
                f"the {word} of layer {layer} {'have' if kind == 'theta' else 'has'} NaN for head {head} at "
                f"row length {n}: the scores that {'they were' if kind == 'theta' else 'it was'} calibrated "
                "on overflowed; calibrate anew, in a type with a wider range (--dtype bfloat16 or float32)."
            )
    aim = tables.meta.get("calib_to", "k") if tables.meta else calib_to  # th.txt does not tell
    if kind == "theta" and aim != calib_to:
        raise UsageError(
            f"the thresholds were calibrated with calib_to {aim}, but calib_to {calib_to} is asked for: use "
            "that, or calibrate anew."
        )
    known = tables.meta.get("placement")
    if known is not None and known != placement:
        raise UsageError(
            f"the {word} {'were' if kind == 'theta' else 'was'} calibrated for placement {known}, but "
            f"{placement} is "
            "asked for: use that placement, or calibrate anew."
        )
    if known is None and kind == "theta" and placement == "post-softmax":
        lowest = min(float(np.nanmin(held[layer].values)) for layer in layers)
        if lowest < 0.0:
            raise UsageError(
                f"the thresholds go down to {lowest:.3g}, so they compare scores, but placement "
                "post-softmax compares "
                "weights (0 to 1): use placement pre-softmax, or calibrate anew."
            )


def no_long_row(k: int, layer: int, longest: int) -> UsageError:
    """What to say when calibration met no row that is sparse."""
    return UsageError(
        f"calibration found no row longer than K={k} in layer {layer}: the calibration prompts had up to "
        f"{longest} tokens. Lower K, or calibrate on longer prompts (more shots)."
    )


def _lines(layers: dict[int, LayerTable], k: dict[int, int] | None) -> Iterator[str]:
    for layer, table in sorted(layers.items()):
        suffix = "" if k is None else f" {k[layer]}"
        for head in range(table.values.shape[0]):
            for n in np.flatnonzero(table.samples[head]):
                value = float(table.values[head, n])
                yield f"L{layer}_H{head}:{n} {value!r} {table.samples[head, n]}{suffix}\n"


def _read_lines(path: Path, has_k: bool) -> tuple[dict[int, LayerTable], dict[int, int], tuple[int, int]]:
    """Parse th.txt or sdc.txt: tables and K by layer, and (layers, heads) as the highest ids tell."""
    with open_text(path) as file:
        text = file.read()
    columns = ["layer", "head", "n", "value", "samples"] + (["k"] if has_k else [])
    plain = text.replace("_H", " ").replace("L", " ").replace(":", " ")
    try:
        frame = pd.read_csv(io.StringIO(plain), sep=r"\s+", header=None, names=columns)
        for column in columns:
            frame[column] = frame[column].astype(np.float64 if column == "value" else np.int64)
        if frame.empty:
            raise ValueError("it is empty")
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(
            f"{path} is not a table of lines like 'L0_H0:65 0.25 8{' 64' if has_k else ''}' "
            f"({error}): make it anew."
        ) from None
    num_heads, length = int(frame["head"].max()) + 1, int(frame["n"].max()) + 1
    layers, ks = {}, {}
    for layer in sorted(set(frame["layer"].tolist())):
        rows = frame[frame["layer"] == layer]
        values = np.full((num_heads, length), np.nan)
        samples = np.zeros((num_heads, length), dtype=np.int64)
        where = (rows["head"].to_numpy(), rows["n"].to_numpy())
        values[where] = rows["value"]
        samples[where] = rows["samples"]
        layers[layer] = LayerTable(values, samples)
        if has_k:
            if rows["k"].nunique() != 1:
                raise UsageError(
                    f"{path} mixes several K in layer {layer}: keep the lines of one K per layer."
                )
            ks[layer] = int(rows["k"].iloc[0])
    return layers, ks, (int(frame["layer"].max()) + 1, num_heads)


def _read_binary(path: Path) -> CalibrationTables:
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != "toptheta-calibration-1":
                raise UsageError(
                    f"{path} is not a calibration table of this program: remove it, or calibrate anew."
                )
            tables = CalibrationTables(
                num_layers=int(header["num_layers"]),
                num_heads=int(header["num_heads"]),
                k={int(layer): k for layer, k in json.loads(header["k"]).items()},
                meta=json.loads(header["meta"]),
            )
            for key in file.keys():
                kind, layer, what = key.split(".")
                if kind == "value" and what == "mean":
                    scale = file.get_tensor(f"value.{layer}.scale")
                    tables.values[int(layer)] = LayerValues(file.get_tensor(key), scale)
                if kind == "value" or what != "values":
                    continue
                n = file.get_tensor(f"{kind}.{layer}.n")
                values = np.full((tables.num_heads, int(n.max()) + 1), np.nan)
                samples = np.zeros(values.shape, dtype=np.int64)
                values[:, n] = file.get_tensor(key)
                samples[:, n] = file.get_tensor(f"{kind}.{layer}.samples")
                getattr(tables, kind)[int(layer)] = LayerTable(values, samples)
            return tables
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{path} cannot be read ({error}): remove it to use th.txt, or calibrate anew."
        ) from None
