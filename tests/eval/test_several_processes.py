"""A run that several processes share: the same thresholds, answers and products as of one, also when one of
them is killed and others go on."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.eval.helpers import gen_settings, only_run, qa_settings
from tests.helpers.processes import run
from toptheta.calibration.tables import load_tables
from toptheta.eval.runner import evaluate
from toptheta.eval.settings import Settings


def products(folder: Path) -> dict[str, Any]:
    """What a run has found, but for times: by file, the lines of large ones in the order of the alphabet."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "results.json":
            result = json.loads(path.read_text())
            found[name] = {key: value for key, value in result.items() if key not in ("seconds", "folder")}
        elif path.name.endswith(".gz"):
            found[name] = sorted(gzip.decompress(path.read_bytes()).splitlines())
        elif path.suffix in (".jsonl", ".csv"):
            found[name] = sorted(path.read_bytes().splitlines())
        elif path.name == "th.txt":
            found[name] = len(path.read_text().splitlines())
    return found


def check_same(one: Path, several: Path) -> None:
    expected, found = products(one), products(several)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    for path in one.rglob("th.txt"):
        tables, others = (
            load_tables(folder, 2, 6) for folder in (path.parent, several / path.parent.relative_to(one))
        )
        for kind in ("theta", "sdc"):
            for layer, table in getattr(tables, kind).items():
                other = getattr(others, kind)[layer]
                np.testing.assert_array_equal(other.samples, table.samples)
                np.testing.assert_allclose(other.values, table.values, rtol=1e-6)


def settings_of(kind: str, model: str) -> Settings:
    if kind == "qa":
        return qa_settings(model, mode=(0,), k=(16, 24), calib_tac=False, batch_size=2)
    if kind == "in order":  # of SDC's samples
        return qa_settings(model, mode=(0,), sdc="offline-calibrated", calib_tac=False)
    return gen_settings(model, dataset="needle", needle_lengths=(160,), batch_size=2, calib_samples=3)


@pytest.mark.parametrize(("kind", "count"), [("qa", 3), ("in order", 2), ("needle", 2)])
def test_the_same_as_one_process(kind: str, count: int, folder_model: str, here: Path) -> None:
    evaluate(settings_of(kind, folder_model))
    one = only_run(here / "products").rename(here / "one")
    started = run(count, here / "logs", evaluate, settings_of(kind, folder_model))
    several = only_run(here / "products")
    check_same(one, several)
    assert json.loads((several / "run.json").read_text())["world_size"] == count
    assert "Run folder" in started.printed(0) and "Run folder" not in started.printed(1)
