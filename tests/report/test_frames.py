"""toptheta.report.load: a run as pandas tables."""

import json
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.report.helpers import GROUPS, HEADS, LAYERS, make_products
from tests.report.test_compare import make_cell
from toptheta.report import load
from toptheta.report.plots.read import read_kept
from toptheta.report.results import CellResult, Kept, Metric
from toptheta.util.errors import UsageError
from toptheta.util.files import write_json


@pytest.fixture
def run(here: Path) -> Path:
    """A run of two cells, one with all files."""
    make_cell(here / "run" / "mode3", "dense", [1, 0, 1, 1])
    make_cell(here / "run" / "mode0_k64", "Top-theta K=64", [1, 1, 0, 1])
    make_products(here / "products", gz=True, config=False)
    for path in (here / "products").iterdir():
        path.rename(here / "run" / "mode0_k64" / path.name)
    return here / "run"


def test_cells(run: Path) -> None:
    loaded = load(run)
    assert loaded.labels == ("dense", "Top-theta K=64")
    assert loaded.cells["acc"].tolist() == [0.75, 0.75] and loaded.cells["dense"].tolist() == [True, False]
    assert loaded.results[1].paired["flips"]["acc"]["lost"] == 1
    result = CellResult(
        "x",
        kept={"prefill": Kept(0.25, 0.5)},
        kv_bytes={"prefill": 0.4},
        metrics={"a": Metric(1)},
        missed_keys=0.1,
    )
    write_json(run / "mode1" / "results.json", result.to_json())
    row = load(run / "mode1").cells.iloc[0]
    assert (row["kept_prefill"], row["vrows_prefill"], row["kv_bytes_prefill"]) == (0.25, 0.5, 0.4)
    assert row["missed_keys"] == 0.1


def test_tables(run: Path) -> None:
    loaded = load(run)
    assert set(loaded.kept["cell"]) == {"Top-theta K=64"} and set(loaded.kept["task"]) == {"arc_easy"}
    one = loaded.kept.query("layer == 2 and phase == 'prefill'")
    expected = read_kept(run / "mode0_k64", 2, "attn", "prefill")
    assert expected is not None
    assert (
        one[["head", "n", "kept"]].to_numpy().tolist() == expected[["head", "n", "kept"]].to_numpy().tolist()
    )
    assert loaded.vrows["group"].nunique() == GROUPS and loaded.kept["layer"].nunique() == LAYERS
    assert loaded.thresholds.groupby(["layer", "head"]).ngroups == LAYERS * HEADS
    answers = loaded.answers.pivot(index="key", columns="cell", values="acc")
    assert answers.loc["t/2"].to_dict() == {"dense": 1.0, "Top-theta K=64": 0.0}
    assert loaded.effective_k.empty
    assert loaded.config("dense") == {"dtype": "float32"}


def test_several_folders_and_tables_without_cells(run: Path) -> None:
    make_cell(run.parent / "other", "dense", [1, 0, 1, 1], "bfloat16")
    both = load(run, run.parent / "other", run / "mode3")
    assert both.labels == ("dense, float32", "dense, bfloat16", "Top-theta K=64") and len(both.results) == 3
    table = load(ROOT / "products" / "tables" / "smollm2")
    saved = json.loads((ROOT / "products" / "tables" / "smollm2" / "results.json").read_text())
    assert len(table.cells) == len(saved) and table.kept.empty


def test_what_is_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="nowhere has no finished cell"):
        load("nowhere")
    with pytest.raises(UsageError, match="there is no run to load: name its folder"):
        load()
    with pytest.raises(UsageError, match="choose from dense"):
        load(run).config("Top-k")
    (run / "mode3" / "results.json").write_text("{half")
    with pytest.raises(UsageError, match="results.json is damaged"):
        load(run)
