"""A hash of a model's files, to recognize the same model later without reading all of a large one."""

import hashlib
from pathlib import Path
from typing import Any

from toptheta.models.loading import ModelSource

PIECES, PIECE_BYTES = 256, 4096  # of a weight file: 1 MB, at even distances
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def fingerprint(source: ModelSource, config: Any) -> str:
    """Of a hub id its commit; of a folder or a GGUF file the hash of the whole config and of names, sizes and
    PIECES pieces of the weight files. Weights that differ in a small part may have the same one."""
    if not source.is_local:
        return str(getattr(config, "_commit_hash", None) or "")
    folder, digest = Path(source.location), hashlib.sha256()
    if source.gguf_file is not None:
        files = [folder / source.gguf_file]
    else:
        files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
        digest.update((folder / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for i in range(PIECES):
                file.seek(max(0, size - PIECE_BYTES) * i // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]
