"""Calibrated tables of a whole model: th.txt, sdc.txt and the binary table.

th.txt and sdc.txt are the published project's formats. `calibration.safetensors` contains the same numbers
and what they were calibrated for, and loads fast. A table that does not match the model or the parameters is
refused.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from toptheta.calibration.interpolation import MAX_FIT_LENGTH
from toptheta.util.errors import UsageError
from toptheta.util.files import find_file, one_of, write_bytes, write_text
from toptheta.util.line_files import SDC, THRESHOLDS, LineFormat, read_lines
from toptheta.util.schema import Count, parse_json, typed

BINARY_NAME = "calibration.safetensors"
_TABLE = ("n", "values", "samples")
PARTS = {"theta": _TABLE, "sdc": _TABLE, "value": ("mean", "scale")}  # of a layer, in the binary table


@dataclass
class LayerTable:
    """One kind of calibrated value of one layer. values: `[H, L]` float64 by row length, NaN where not
    calibrated; samples: `[H, L]` int64, the number of samples of each value."""

    values: np.ndarray
    samples: np.ndarray


@dataclass
class LayerValues:
    """The normalisation of values of one layer: mean, `[H_kv, D]`, the mean of V; scale, `[H]`, the mean norm
    of the projected, centred values; float32."""

    mean: np.ndarray
    scale: np.ndarray


@dataclass
class CalibrationTables:
    """Tables of all layers. theta, sdc: layer -> LayerTable (none for a layer left dense). k: K per layer,
    where known. values: layer -> LayerValues, for value-aware thresholds; th.txt does not contain them.

    meta: model, revision, placement and flags of the calibration; empty for the published project's files.
    """

    num_layers: int
    num_heads: int
    k: dict[int, int] = field(default_factory=dict)
    theta: dict[int, LayerTable] = field(default_factory=dict)
    values: dict[int, LayerValues] = field(default_factory=dict)
    sdc: dict[int, LayerTable] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)


def save_tables(tables: CalibrationTables, folder: Path | str) -> None:
    """Write th.txt and sdc.txt (if there are such tables) and the binary table into `folder`."""
    save_text(tables, folder)
    save_binary(tables, folder)


def save_text(tables: CalibrationTables, folder: Path | str) -> None:
    """Write th.txt and sdc.txt (if there are such tables) into `folder`."""
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
    """Read the tables in `folder`, the binary one if it exists. For th.txt and sdc.txt the numbers of layers
    and heads are the largest in their lines. Raises UsageError if there are no tables, or they are damaged;
    `name` is the user's name for the folder in messages."""
    return _read_tables(Path(folder), name, _Sizes())


def load_tables(
    folder: Path | str,
    num_layers: int,
    num_heads: int,
    name: str = "calib_load_path",
    max_length: int = MAX_FIT_LENGTH,
) -> CalibrationTables:
    """`read_tables` for a model of these sizes, with rows up to `max_length`. Also raises UsageError for
    tables of another model."""
    what = f"{name}: the tables in {str(folder)!r}"
    tables = _read_tables(Path(folder), name, _Sizes(max_length, (num_layers, num_heads), what))
    tables.num_layers = num_layers
    return tables


def _read_tables(folder: Path, name: str, sizes: "_Sizes") -> CalibrationTables:
    if not folder.is_dir():
        raise UsageError(
            f"{name} is {str(folder)!r}, which is not a folder: name one that has th.txt or sdc.txt."
        )
    if (folder / BINARY_NAME).is_file():
        return _read_binary(folder / BINARY_NAME, sizes)
    theta_path, sdc_path = find_file(folder, "th.txt"), find_file(folder, "sdc.txt")
    if theta_path is None and sdc_path is None:
        files = [f"*/{file}" for file in (BINARY_NAME, "th.txt*", "sdc.txt*")]
        cells = one_of("cells", folder, [*files, *(f"*/{file}" for file in files)])
        raise UsageError(
            f"{name} is {str(folder)!r}, which has neither th.txt nor sdc.txt: "
            + (f"name {cells}." if cells else "calibrate first.")
        )
    tables = CalibrationTables(0, 0)
    if theta_path is not None:
        tables.theta, tables.k = _read_lines(theta_path, THRESHOLDS, sizes)
    if sdc_path is not None:
        tables.sdc, _ = _read_lines(sdc_path, SDC, sizes)
    tables.num_layers, tables.num_heads = sizes.num_layers, sizes.num_heads
    return tables


def check_fit(
    tables: CalibrationTables,
    kind: str,
    k_per_layer: tuple[int, ...],
    placement: str,
    layers: list[int],
    calib_to: str = "k",
) -> None:
    """Raise UsageError unless `tables` contain `kind` ('theta' or 'sdc') of `layers` for these K, this
    placement and, if stored, this `calib_to`."""
    held = tables.theta if kind == "theta" else tables.sdc
    word = "thresholds" if kind == "theta" else "SDC table"
    missing = [layer for layer in layers if layer not in held]
    if missing:
        raise UsageError(
            f"the {word} {'lack' if kind == 'theta' else 'lacks'} layer {missing[0]} (of "
            f"{len(layers)} needed): "
            "calibrate with the same K for every layer as in use."
        )
    for layer in layers:
        if layer in tables.k and tables.k[layer] != k_per_layer[layer]:
            raise UsageError(
                f"the {word} of layer {layer} {'were' if kind == 'theta' else 'was'} calibrated for "
                f"K={tables.k[layer]}, not for K={k_per_layer[layer]}: use K={tables.k[layer]}, or calibrate "
                "again."
            )
        bad = np.argwhere(np.isnan(held[layer].values) & (held[layer].samples > 0))
        if len(bad):
            head, n = bad[0]
            raise UsageError(
                f"the {word} of layer {layer} {'have' if kind == 'theta' else 'has'} NaN for head {head} at "
                f"row length {n}: the scores that {'they were' if kind == 'theta' else 'it was'} calibrated "
                "on overflowed; calibrate again, in a type with a wider range (--dtype bfloat16 or float32)."
            )
        lengths = (~np.isnan(held[layer].values)).nonzero()[1]
        if kind == "sdc" and lengths.size and lengths.min() <= k_per_layer[layer]:  # sdc.txt does not tell K
            raise UsageError(
                f"the SDC table of layer {layer} has row length {lengths.min()}, so it was calibrated for a "
                f"smaller K than {k_per_layer[layer]}: use that K, or calibrate again."
            )
    aim = tables.meta.get("calib_to", "k") if tables.meta else calib_to  # th.txt does not tell
    if kind == "theta" and aim != calib_to:
        raise UsageError(
            f"the thresholds were calibrated with calib_to {aim}, not with calib_to {calib_to}: use calib_to "
            f"{aim}, or calibrate again."
        )
    known = tables.meta.get("placement")
    if known is not None and known != placement:
        raise UsageError(
            f"the {word} {'were' if kind == 'theta' else 'was'} calibrated for placement {known}, not for "
            f"{placement}: use placement {known}, or calibrate again."
        )
    if known is None and kind == "theta" and placement == "post-softmax":
        lowest = min(float(np.nanmin(held[layer].values)) for layer in layers)
        if lowest < 0.0:
            raise UsageError(
                f"the thresholds go down to {lowest:.3g}, so they were calibrated on scores, but placement "
                "post-softmax compares weights (0 to 1): use placement pre-softmax, or calibrate again."
            )


def no_long_row(k: int, layer: int, longest: int) -> UsageError:
    """The error for a calibration without a sparse row."""
    if longest == 0:
        return UsageError(
            "the calibration has seen no prompt: run prompts through the model before calibrate=False."
        )
    return UsageError(
        f"calibration found no row longer than K={k} in layer {layer}: the calibration prompts had at most "
        f"{longest} tokens. Lower K, or calibrate on longer prompts (more shots)."
    )


def _lines(layers: dict[int, LayerTable], k: dict[int, int] | None) -> Iterator[str]:
    for layer, table in sorted(layers.items()):
        suffix = "" if k is None else f" {k[layer]}"
        for head in range(table.values.shape[0]):
            for n in np.flatnonzero(table.samples[head]):
                value = float(table.values[head, n])
                yield f"L{layer}_H{head}:{n} {value!r} {table.samples[head, n]}{suffix}\n"


@dataclass
class _Sizes:
    """Sizes of tables while they are read. max_length: maximum row length; expected: layers and heads of the
    model; what: the tables' name in errors. num_layers, num_heads: the sizes read."""

    max_length: int = MAX_FIT_LENGTH
    expected: tuple[int, int] | None = None
    what: str = ""
    num_layers: int = 0
    num_heads: int = 0

    def found(self, num_layers: int, num_heads: int, exactly: bool) -> None:
        """Take the sizes of a file, which may lack the last layers unless `exactly`. Raises UsageError if
        they are not the expected ones."""
        self.num_layers = max(self.num_layers, num_layers)
        self.num_heads = num_heads
        layers, heads = self.expected or (num_layers, num_heads)
        if num_heads != heads or (num_layers != layers if exactly else num_layers > layers):
            raise UsageError(
                f"{self.what} are for a model with {num_layers} layers and {num_heads} heads, but this model "
                f"has {layers} and {heads}: load tables that were calibrated on this model."
            )

    def table(self, n: np.ndarray, heads: np.ndarray, values: np.ndarray, samples: np.ndarray) -> LayerTable:
        """A layer's table from entries `[E]`, each for a head and a row length. Raises ValueError."""
        wrong = n[(n < 1) | (n > self.max_length)]
        if wrong.size:
            raise ValueError(f"it has row length {wrong[0]}, not one from 1 to {self.max_length}")
        if np.isinf(values).any() or (samples < 1).any():  # NaN is `check_fit`'s to explain
            raise ValueError("it has a value that is infinite or has no samples")
        present = np.unique(heads)
        if len(present) < self.num_heads:
            missing = np.append(present != np.arange(len(present)), True).argmax()
            raise ValueError(f"it lacks head {missing}")
        table = LayerTable(
            np.full((self.num_heads, int(n.max()) + 1), np.nan),
            np.zeros((self.num_heads, int(n.max()) + 1), dtype=np.int64),
        )
        table.values[heads, n], table.samples[heads, n] = values, samples
        # The published project appends to th.txt when it copies one: the same may come twice, but no two.
        same = np.array_equal(table.values[heads, n], values, equal_nan=True)
        if not same or (table.samples[heads, n] != samples).any():
            raise ValueError("a head and row length come twice, with different values")
        return table


def _read_lines(path: Path, form: LineFormat, sizes: _Sizes) -> tuple[dict[int, LayerTable], dict[int, int]]:
    """th.txt or sdc.txt: tables by layer, and K by layer if the file contains it. Raises UsageError."""
    frame = read_lines(path, form)
    if frame is None:
        raise UsageError(f"{path} is empty: create it again.")
    sizes.found(int(frame["layer"].max()) + 1, int(frame["head"].max()) + 1, exactly=False)
    layers, ks = {}, {}
    for _, rows in frame.groupby("layer"):
        layer = int(rows["layer"].iloc[0])
        entries = (rows[name].to_numpy() for name in ("n", "head", list(form.columns)[3], "samples"))
        try:
            layers[layer] = sizes.table(*entries)
            if "k" in form.columns:
                (k,) = rows["k"].unique() if rows["k"].nunique() == 1 else (np.nan,)
                if k % 1 != 0:
                    raise ValueError("it mixes several K")
                ks[layer] = int(k)
        except ValueError as error:
            raise UsageError(
                f"{path}, layer {layer}: {error}; correct the lines L{layer}_..., or create the file again."
            ) from None
    return layers, ks


class _Header(TypedDict):
    """The metadata of the binary table."""

    k: dict[int, Count]
    meta: dict[str, str]


def _read_binary(path: Path, sizes: _Sizes) -> CalibrationTables:
    """The binary table. Raises UsageError."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != "toptheta-calibration-1":
                raise ValueError("it is not a calibration table of this program")
            sizes.found(int(header["num_layers"]), int(header["num_heads"]), exactly=True)
            facts = typed({name: parse_json(header[name]) for name in ("k", "meta")}, _Header)
            tables = CalibrationTables(sizes.num_layers, sizes.num_heads, facts["k"], meta=facts["meta"])
            for key in file.keys():
                kind, layer, what = key.split(".")
                if not 0 <= int(layer) < sizes.num_layers or kind not in ("theta", "sdc", "value"):
                    raise ValueError(f"it has {key}, which does not exist in this model")
                part = {name: file.get_tensor(f"{kind}.{layer}.{name}") for name in PARTS[kind]}
                if what == "values":
                    getattr(tables, kind)[int(layer)] = _binary_table(sizes, **part)
                elif what == "mean":
                    tables.values[int(layer)] = LayerValues(**part)
                    if not all(np.isfinite(one).all() for one in part.values()):
                        raise ValueError(f"{key} is not finite")
            return tables
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{path} cannot be read ({error}): remove it to use th.txt, or calibrate again."
        ) from None


def _binary_table(sizes: _Sizes, n: np.ndarray, values: np.ndarray, samples: np.ndarray) -> LayerTable:
    if n.dtype.kind != "i" or n.ndim != 1 or len(n) == 0 or samples.dtype.kind != "i":
        raise ValueError("a list of row lengths or samples is damaged")
    if not values.shape == samples.shape == (sizes.num_heads, len(n)) or (np.diff(n) <= 0).any():
        raise ValueError("row lengths, values and samples do not match")
    heads, at = samples.nonzero()  # a head may have none of a length
    return sizes.table(n[at], heads, values[heads, at], samples[heads, at])
