"""The file of single calibration samples, for histograms: calib_samples.safetensors in a cell's folder."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from toptheta.util.errors import UsageError
from toptheta.util.files import write_bytes

SAMPLES_NAME = "calib_samples.safetensors"
Samples = dict[int, tuple[np.ndarray, np.ndarray]]  # by layer: row lengths int32 [S], values float32 [S, H]


def write_calibration_samples(folder: Path | str, samples: Samples) -> None:
    """Write the samples of a cell as arrays `{layer}.n` and `{layer}.values`."""
    arrays = {}
    for layer, (n, values) in samples.items():
        arrays[f"{layer}.n"] = np.ascontiguousarray(n, dtype=np.int32)
        arrays[f"{layer}.values"] = np.ascontiguousarray(values, dtype=np.float32)
    write_bytes(Path(folder) / SAMPLES_NAME, save(arrays))


def read_calibration_samples(folder: Path | str) -> Samples:
    """The samples of a cell: layer -> row lengths int32 `[S]`, and (K+1)-th largest scores (or weights)
    float32 `[S, H]`. Raises UsageError if the folder has none, or the file is damaged."""
    path = Path(folder) / SAMPLES_NAME
    if not path.is_file():
        raise UsageError(f"{folder} has no {SAMPLES_NAME}: calibrate with --calib_dump_samples.")
    try:
        arrays = load_file(path)
        layers = sorted(int(name.removesuffix(".n")) for name in arrays if name.endswith(".n"))
        samples = {layer: (arrays[f"{layer}.n"], arrays[f"{layer}.values"]) for layer in layers}
        for n, values in samples.values():
            if n.dtype.kind != "i" or values.ndim != 2 or n.shape != values.shape[:1]:
                raise ValueError("row lengths and values do not match")
            if (n < 1).any() or not np.isfinite(values).all():
                raise ValueError("it has a length below 1 or a value that is not finite")
        return samples
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}): remove it, and calibrate again.") from None
