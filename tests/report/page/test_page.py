"""The report as a file: what it holds, how large it is, and what it refuses."""

import base64
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.report.helpers import assert_refused
from tests.report.page.conftest import Report
from tests.report.test_compare import make_cell
from toptheta.report.__main__ import main
from toptheta.report.frames import load
from toptheta.report.page.build import _vega, render
from toptheta.report.page.data import ALL_GROUPS
from toptheta.report.plots.read import read_popularities, read_thresholds
from toptheta.report.results import Answer, CellResult, Metric, write_answers
from toptheta.util.files import write_json


def page_data(html: str) -> dict:
    found = re.search(r'<script id="data" type="text/plain">(.*?)</script>', html)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def rows(chart: dict) -> list[dict]:
    """A chart's data, as page.js reads it."""
    columns = {
        name: column if isinstance(column, list) else [column["words"][i] for i in column["codes"]]
        for name, column in chart["rows"].items()
    }
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def test_every_run_writes_one(report: Report) -> None:
    runs = sorted(report.path.parent.glob("products/*"))
    assert len(runs) == 3
    for run in runs:
        html = (run / "report.html").read_text()
        assert len(html) < 5_000_000 and not re.search(r'(?:src|href)="(?!#)', html.split("<script>")[0])
        command = json.loads((run / "run.json").read_text())["command"]
        assert command.startswith("python ") and command.replace("'", "&#39;") in html


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be written to does not end a run whose results are there."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path / "file" / "below"))
    without = _vega.__wrapped__()
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path / "cache"))
    assert _vega.__wrapped__() == without == next((tmp_path / "cache").iterdir()).read_text()
    assert _vega.__wrapped__() == without


def test_tables_without_rows_have_columns(report: Report, here: Path) -> None:
    """Those that a table with rows has, but for what a cell's scores are."""
    write_json(here / "results.json", CellResult("dense", metrics={"acc": Metric(1.0)}).to_json())
    none = load(here)
    for name in ("kept", "vrows", "thresholds", "effective_k", "answers"):
        bare, full = getattr(none, name), getattr(report.run, name)
        assert bare.empty and not full.empty
        assert list(bare.columns) == list(full.columns)[: len(bare.columns)], name
        assert name == "answers" or len(bare.columns) == len(full.columns), name
    assert none.kept.groupby(["cell", "layer"])["kept"].sum().empty


def test_what_is_shown_of_each_task(report: Report) -> None:
    parts = list(page_data(report.path.read_text()).values())
    names = [[chart["name"] for chart in part["charts"]] for part in parts]
    assert names == [
        ["tradeoff", "by_length", "kept", "thresholds"],
        ["tradeoff", "kept", "thresholds", "effective_k", "effective_k_by_length"],
        ["tradeoff", "kept", "thresholds", "popularity"],
    ]
    assert [len(part["samples"]) for part in parts] == [0, 4, 2]
    titles = re.findall(r'<h2 class="part-title">.*, (.*)</h2>', report.path.read_text())
    text = "perplexity of text.txt in windows of 200 tokens"
    assert titles == [text, "everyday_science", "openai_humaneval"]
    html = report.path.read_text()
    assert f"<h1>tiny-llama: {' · '.join(titles)}</h1>" in html
    assert re.findall(r'<a href="#part\d">(.*?)</a>', html) == titles
    assert html.count("Differences are paired with dense") == 2  # not for the text
    labels = [label for label, one in zip(report.run.labels, report.run.results) if one.task == "perplexity"]
    assert [label.split("K=")[-1] for label in labels] == ["dense", "8", "16", "8", "16"]


def test_thresholds_are_means_over_lengths(report: Report) -> None:
    part = page_data(report.path.read_text())["part1"]
    chart = next(one for one in part["charts"] if one["name"] == "thresholds")
    shown = [row for row in rows(chart) if (row["layer"], row["head"]) == (1, 2)]
    table = read_thresholds(Path(str(report.of_task("everyday_science")["Top-theta K=16"].folder)))
    assert table is not None
    table = table[(table["layer"] == 1) & (table["head"] == 2)]
    assert sum(row["samples"] for row in shown) == table["samples"].sum() and len(shown) <= 60
    assert shown[0]["n"] <= shown[-1]["n"] and shown[0]["n"] == pytest.approx(table["n"].min(), abs=3)
    assert table["theta"].min() - 1e-3 <= min(row["theta"] for row in shown)
    assert max(row["theta"] for row in shown) <= table["theta"].max() + 1e-3


def test_popularity_counts_steps(report: Report) -> None:
    part = page_data(report.path.read_text())["part2"]
    chart = next(one for one in part["charts"] if one["name"] == "popularity")
    shown = [row for row in rows(chart) if row["cell"] == "Top-theta K=16" and row["layer"] == 1]
    folder = Path(str(report.of_task("openai_humaneval")["Top-theta K=16"].folder))
    groups = read_popularities(folder, 1, "generative_decoding")
    assert groups is not None and {row["group"] for row in shown} == {*groups, ALL_GROUPS}
    for row in [row for row in shown if row["group"] == 0][::7]:
        shares = []
        for position in range(row["first"], row["end"]):
            kept = seen = 0
            for i, step in enumerate(groups[0]):
                if i and len(step) != len(groups[0][i - 1]) + 1:
                    break  # the next text
                if position < len(step):
                    seen += 1
                    kept += step[position] > 0
            shares.append(100 * kept / seen)
        assert row["share"] == pytest.approx(sum(shares) / len(shares), abs=0.06)


def test_each_text_has_a_part_and_its_own_dense_baseline(here: Path) -> None:
    for text, length, nll in (("novel.txt", 512, 1.0), ("reports/test.jsonl", 1024, 2.0)):
        for name, more in (("dense", 0.0), ("Top-k K=8", 0.5)):
            folder = here / Path(text).stem / name.replace(" ", "")
            extra = {"by_length": [{"length": length, "tokens": 9, "ppl": 3.0}]}
            result = CellResult(name, "Tiny", "perplexity", dense=name == "dense", extra=extra)
            write_json(folder / "results.json", result.to_json())
            write_json(folder / "config.json", {"settings": {"text": f"data/{text}", "max_seq_len": length}})
            write_answers(folder, [Answer("window0", text, None, {"nll": nll + more})])
    run = load(here / "novel", here / "test")
    assert not run.notes and len(set(run.labels)) == 4
    assert [one.paired["scores"]["nll"]["value"] for one in run.results if not one.dense] == [0.5, 0.5]
    titles = re.findall(r'<h2 class="part-title">(.*)</h2>', render(run))
    assert titles == [
        "Tiny, perplexity of novel.txt in windows of 512 tokens",
        "Tiny, perplexity of reports/test.jsonl in windows of 1,024 tokens",
    ]


def test_nothing_that_a_model_writes_becomes_markup(here: Path) -> None:
    evil = "</script><script>alert(1)</script><!--"
    for name, answer in (("dense", evil), ("Top-k K=8", evil + "x")):
        folder = here / "run" / name.replace(" ", "")
        result = CellResult(
            name, "<b>Tiny", "code", dense=name == "dense", metrics={"acc": Metric(0.5, 0.1, 1)}
        )
        write_json(folder / "results.json", result.to_json())
        write_answers(folder, [Answer("a", "1", answer, {"acc": 1.0}, question=evil)])
    html = render(load(here / "run"))
    assert "<script>alert" not in html and "<b>Tiny" not in html
    (question,) = page_data(html)["part0"]["samples"]
    assert question["question"] == evil and question["answers"][1]["at"] == len(evil)


def test_an_answer_of_likelihood_0(here: Path) -> None:
    """-inf is no number in JSON: a browser would read nothing of the page."""
    for name in ("dense", "Top-k K=8"):
        folder = here / "run" / name.replace(" ", "")
        result = CellResult(
            name, "Tiny", "questions", dense=name == "dense", metrics={"acc": Metric(1.0, 0.0, 1)}
        )
        write_json(folder / "results.json", result.to_json())
        write_answers(
            folder, [Answer("a", "1", 1, {"acc": 1.0}, target=1, loglikelihoods=[float("-inf"), -2.5])]
        )
    (question,) = page_data(render(load(here / "run")))["part0"]["samples"]
    assert [one["logp"] for one in question["answers"]] == [[None, -2.5]] * 2


def test_the_command(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    make_cell(here / "a" / "mode3", "dense", [1, 0, 1])
    make_cell(here / "a" / "mode1_k8", "Top-k K=8", [1, 1, 1])
    make_cell(here / "b", "dense", [1, 0, 1], "bfloat16")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["report", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()  # type: ignore[return-value]

    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert run("a", "--open") == (0, "Report: a/report.html\n", "")
    assert opened == [(here / "a" / "report.html").as_uri()]
    assert run("a", "b", "--output", "both.html")[0] == 0
    assert "dense, bfloat16" in Path("both.html").read_text()
    code, _, error = run("a", "nowhere")
    assert code == 2 and error.count("\n") == 1 and "nowhere has no finished cell" in error
    (here / "c").write_text("a file")
    code, _, error = run("a", "--output", "c/report.html")
    assert code == 2 and "c/report.html cannot be written" in error
    code, _, error = run("a", "--output", "/proc/x/report.html")
    assert code == 2 and "/proc/x/report.html cannot be written (no folder can be created there)" in error
    assert run("")[0] == 2 and run("a", "--output", "")[0] == 2
    (here / "a" / "run.json").write_text("{half")
    code, _, error = run("a")
    assert code == 2 and "run.json is damaged" in error
    full = [sys.executable, "-m", "toptheta.report", "--wrong"]
    env = {"PYTHONPATH": str(ROOT)}
    assert_refused(subprocess.run(full, capture_output=True, text=True, timeout=120, env=env), "--help")
    assert not list(here.rglob(".*.html*"))
