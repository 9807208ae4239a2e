"""Names of models: aliases, hub names, files and folders."""

from pathlib import Path

import pytest

from toptheta.models.loading import find_model
from toptheta.util.errors import UsageError


def test_models(tmp_path: Path) -> None:
    assert find_model("3-8").location == "meta-llama/Meta-Llama-3-8B"
    assert find_model("3-8").name == "Llama-3-8B"
    assert find_model("owner/name").location == "owner/name"
    for name, message in (
        ("3-9", "no alias"),
        ("a/b/c", "no alias"),
        (str(tmp_path / "x.gguf"), "no such file"),
        (str(tmp_path), "no config.json"),
    ):
        with pytest.raises(UsageError, match=message):
            find_model(name)
