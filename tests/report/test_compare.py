"""compare.py: what it takes, what it writes, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest

from tests.report.helpers import assert_refused, run_script
from toptheta.report.compare import cells_of, compare_runs
from toptheta.report.plots.compare import comparison_figure
from toptheta.report.results import Answer, CellResult, Metric, write_answers
from toptheta.util.errors import UsageError
from toptheta.util.files import write_json


def make_cell(folder: Path, method: str, scores: list[float], dtype: str = "float32", shots: int = 5) -> str:
    """A finished cell, as a run leaves it."""
    accuracy = sum(scores) / len(scores)
    result = CellResult(
        method,
        "Tiny",
        "arc_easy",
        dense=method == "dense",
        metrics={"acc": Metric(accuracy, 0.1, len(scores))},
    )
    write_json(folder / "results.json", result.to_json())
    write_json(folder / "config.json", {"dtype": dtype})
    write_answers(
        folder,
        [
            Answer(f"t/{i}", f"{shots}", int(score), {"acc": score}, {}, [-2.0 + score, -1.0], 0)
            for i, score in enumerate(scores)
        ],
    )
    return str(folder)


@pytest.fixture
def runs(here: Path) -> Path:
    """A run of two cells, and one of a single cell: dense attention in bfloat16."""
    make_cell(here / "a" / "mode1_k8", "Top-k K=8", [1, 0, 0, 1, 0, 1])
    make_cell(here / "a" / "mode3", "dense", [1, 1, 1, 1, 0, 0])
    make_cell(here / "b", "dense", [1, 1, 1, 1, 0, 1], "bfloat16")
    return here


def test_cells_of_runs(runs: Path) -> None:
    assert cells_of("a") == [Path("a/mode3"), Path("a/mode1_k8")]
    assert cells_of("a/mode1_k8") == [Path("a/mode1_k8")]
    make_cell(runs / "c" / "arc_easy" / "mode3", "dense", [1])
    for wrong, words in (("nowhere", "has no finished cell"), ("c", r"one of its tasks \(arc_easy\)")):
        with pytest.raises(UsageError, match=words):
            cells_of(wrong)
    (runs / "b" / "results.json").write_text("{half")
    with pytest.raises(UsageError, match="b/results.json is damaged"):
        compare_runs(["a", "b"])


def test_what_is_written(runs: Path, capsys: pytest.CaptureFixture) -> None:
    rows = compare_runs(["a", "b"])
    assert [row.label for row in rows] == ["dense, float32", "Top-k K=8", "dense, bfloat16"]
    assert rows[0].comparison is None
    (folder,) = (runs / "products" / "compare").iterdir()
    text = (folder / "compare.md").read_text()
    assert "# Tiny, arc_easy: compared with dense, float32" in text and "- dense, bfloat16: `b`" in text
    line = next(line for line in text.splitlines() if line.startswith("| Top-k K=8"))
    assert "| 2 / 1 of 6, p=1 " in line and "| -16.7 ± 30.7 (-76.9 to +43.6)" in line
    assert line.rstrip(" |").endswith("-0.167 ± 0.307 (-0.769 to +0.436)")
    assert text.splitlines()[2] in capsys.readouterr().out
    lines = {(r["method"], r["compared"]): r for r in csv.DictReader((folder / "compare.csv").open())}
    assert set(lines) == {
        (method, name) for method in ("Top-k K=8", "dense, bfloat16") for name in ("acc", "target_logprob")
    }
    assert lines["dense, bfloat16", "acc"]["gained"] == "1"
    assert lines["dense, bfloat16", "acc"]["lost"] == "0"
    saved = json.loads((folder / "compare.json").read_text())
    assert saved[0]["compared"] is None and saved[1]["compared"]["flips"]["acc"]["lost"] == 2
    assert (folder / "compare.png").stat().st_size > 10_000


def test_the_picture_has_a_panel_for_each_score(runs: Path) -> None:
    rows = compare_runs(["a", "b"], "out")
    compared = [(row.label, row.comparison) for row in rows if row.comparison]
    figure = comparison_figure(compared, "t")
    left, right = figure.axes
    assert left.get_xlabel() == "acc, difference from the baseline\n(percentage points)"
    assert right.get_xlabel().startswith("log-probability of the correct answer")
    assert [text.get_text() for text in left.get_yticklabels()] == ["Top-k K=8", "dense, bfloat16"]
    points = [c.lines[0].get_xydata()[0].tolist() for c in left.containers]
    assert points == [[pytest.approx(-100 / 6), 0], [pytest.approx(100 / 6), 1]]


def test_the_same_label_twice(runs: Path) -> None:
    make_cell(runs / "d", "dense", [1, 1, 0, 1, 0, 0])
    labels = [row.label for row in compare_runs(["a/mode3", "d", "b"], "out")]
    assert labels == ["dense, float32, a", "dense, float32, d", "dense, bfloat16"]


def test_the_script(runs: Path) -> None:
    done = run_script("compare.py", "a", "b", "--output_dir", "out", cwd=runs)
    assert done.returncode == 0 and (runs / "out" / "compare.md").is_file(), done.stderr
    make_cell(runs / "e", "dense", [1, 1], shots=5)
    make_cell(runs / "f", "dense", [1, 1, 1, 1, 0, 0], shots=3)
    for wrong, words in (
        (["a/mode3"], "is one cell only"),
        (["a/mode3", "a/mode3"], "is one cell only"),
        (["a", "nowhere"], "nowhere has no finished cell"),
        (["a", "e"], "answered different questions"),
        (["a", "f"], "have different prompts"),
        ([], "--help lists every flag"),
        (["a", "b", "--output_dir", "/proc/x"], "/proc/x: no folder can be created there"),
        (
            ["a", "b", "--output_dir", "a/mode3/results.json/c"],
            "results.json/c: Not a directory",
        ),
    ):
        assert_refused(run_script("compare.py", *wrong, cwd=runs), "error: ", words)
    (runs / "b" / "answers.jsonl").unlink()
    assert_refused(run_script("compare.py", "a", "b", cwd=runs), "answers.jsonl is missing")


def test_programs_that_are_not_scored(runs: Path) -> None:
    write_json(
        runs / "a/mode1_k8/results.json", CellResult("Top-k K=8", "Tiny", "openai_humaneval").to_json()
    )
    (runs / "a/mode1_k8/samples.jsonl").write_text("")
    with pytest.raises(UsageError, match="first run python gen_llama.py --score a --allow_code_execution"):
        compare_runs(["a"], "out")
    assert not Path("out").exists()
