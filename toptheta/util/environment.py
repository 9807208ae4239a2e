"""The environment of a run: versions, device, and the cache folder."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where built kernels and unpacked models are kept: $TOPTHETA_CACHE, else the user's cache folder."""
    if os.environ.get("TOPTHETA_CACHE"):
        return Path(os.environ["TOPTHETA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toptheta"


def environment(device: str) -> dict[str, Any]:
    """Versions, git commit and device that a run depends on, for config.json."""
    import torch

    import toptheta

    try:
        root = Path(toptheta.__file__).parent.parent
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:
        commit = ""
    name = torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else cpu_name()
    return {
        "toptheta": toptheta.__version__,
        "git_commit": commit or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "lm_eval": version("lm_eval"),
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
