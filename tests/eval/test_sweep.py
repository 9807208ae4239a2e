"""Sweeps: what is planned, skipped, resumed and run, and the table that comes out, with real runs."""

import argparse
import csv
import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import gen_llama
import test_llama
from tests.helpers.paths import ROOT
from tests.helpers.processes import Script
from toptheta.eval import sweep
from toptheta.eval.settings import GenSettings, QASettings, Settings
from toptheta.eval.sweep import Found, missing_runs, run_sweep, scan
from toptheta.eval.table_cells import TEXT_FLAGS, SweepOptions, answer_key
from toptheta.eval.table_cells import plan as cells_of
from toptheta.util.errors import UsageError

PARSERS = {"test_llama.py": test_llama.make_parser, "gen_llama.py": gen_llama.make_parser}


@pytest.fixture
def tables(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of tables with one small table, on the tiny model."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tables.json"
    flags = {"llama": folder_model, "num_fewshot": 3, "num_samples": 4, "calib_samples": 3, "device": "cpu"}
    part = {
        "script": "test_llama.py",
        "tasks": ["everyday_science"],
        "methods": ["dense", "Top-k", "Top-theta"],
        "k": [8, 16],
        "flags": {"calib_sample_frac": 1.0},
    }
    methods = {
        "dense": {"mode": 3},
        "Top-k": {"mode": 1, "sdc": "exact", "vmc": True},
        "Top-theta": {"mode": 0},
    }
    table = {"title": "A tiny model", "flags": flags, "parts": [part]}
    file.write_text(json.dumps({"methods": methods, "tables": {"tiny": table}}))
    return file


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs need not import anything first."""
    monkeypatch.setattr(sweep, "Popen", Script)


def options(tables: Path, /, **changes) -> SweepOptions:
    return SweepOptions(**({"table": "tiny", "file": str(tables)} | changes))


def plan(file: Path):
    content = json.loads(file.read_text())
    return cells_of(content["tables"]["tiny"], content, options(file), PARSERS)


def test_sweep(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture, request) -> None:
    assert run_sweep(options(tables, only="dense", jobs=2), PARSERS, ROOT) == 0
    request.getfixturevalue("quick")
    first = {p.name for p in (tmp_path / "products").iterdir()}
    assert len(first) == 2 and "tables" in first  # one run
    assert run_sweep(options(tables, jobs=2), PARSERS, ROOT) == 0
    assert "1 of 5 cells are finished, 2 runs are left" in capsys.readouterr().err
    runs = {p.name for p in (tmp_path / "products").iterdir()}
    assert len(runs) == 4 and first < runs
    folder = tmp_path / "products" / "tables" / "tiny"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert {(row["method"], row["k"]) for row in rows} == {
        ("dense", ""),
        *((m, k) for m in ("Top-k", "Top-theta") for k in ("8", "16")),
    }
    by_cell = {(r["method"], r["k"], r["metric"]): r for r in rows}
    assert float(by_cell["Top-k", "8", "acc"]["kept_attn_prefill"]) < float(
        by_cell["Top-k", "16", "acc"]["kept_attn_prefill"]
    )
    assert by_cell["dense", "", "acc"]["kept_attn_prefill"] == "1.0"
    text = (folder / "table.md").read_text()
    assert "| Top-theta | 16 " in text and "not run" not in text and "(n=4)" in text
    assert (folder / "everyday_science.png").stat().st_size > 10_000
    results = json.loads((folder / "results.json").read_text())
    assert len(results) == 5 and all("folder" not in result for result in results)
    picture = (folder / "everyday_science.png").read_bytes()
    (folder / "everyday_science.png").unlink()
    assert run_sweep(options(tables, redraw=True), PARSERS, ROOT) == 0
    assert (folder / "everyday_science.png").read_bytes() == picture
    # Fewer cells take no table's place.
    whole = (folder / "table.md").read_bytes()
    assert run_sweep(options(tables, only="dense", table_only=True), PARSERS, ROOT) == 0
    assert "the table beside it has 4 more of the cells" in capsys.readouterr().err
    assert (folder / "table.md").read_bytes() == whole
    assert len(json.loads((folder / "part" / "results.json").read_text())) == 1
    with pytest.raises(UsageError, match="--only 'dense,' has an empty part"):
        run_sweep(options(tables, only="dense,", table_only=True), PARSERS, ROOT)

    capsys.readouterr()
    assert run_sweep(options(tables, dry_run=True), PARSERS, ROOT) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "5 of 5 cells are finished, 0 runs" in printed.err
    # Another number of questions is another answer.
    assert run_sweep(options(tables, dry_run=True, samples="5"), PARSERS, ROOT) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_unfinished_runs_are_resumed_and_never_count(tables: Path, tmp_path: Path, quick: None) -> None:
    assert run_sweep(options(tables, only="Top-k*K=8"), PARSERS, ROOT) == 0
    (run,) = [p for p in (tmp_path / "products").iterdir() if p.name != "tables"]
    cells = plan(tables)
    key = next(cell.key for cell in cells if cell.name == "everyday_science Top-k K=8")
    assert key in scan(Path("products"), PARSERS).results
    (run / "results.json").unlink()  # as if it had been cut short
    found = scan(Path("products"), PARSERS)
    assert not found.results and found.unfinished == {Path("products") / run.name: ("test_llama.py", {key})}
    commands = missing_runs(cells, found, "products")
    assert commands[0] == ["test_llama.py", "--resume", f"products/{run.name}"] and len(commands) == 4
    assert ["--k", "16", "--output_dir", "products"] in [command[-4:] for command in commands]
    assert run_sweep(options(tables, only="Top-k*K=8"), PARSERS, ROOT) == 0
    assert key in scan(Path("products"), PARSERS).results
    later = run.with_name(f"{run.name}_later")
    shutil.copytree(run, later)
    assert scan(Path("products"), PARSERS).results[key].folder == f"products/{later.name}"
    kept = {"phase": "prefill", "k": 8, "mean": 8.5}
    counted = json.loads((run / "results.json").read_text()) | {"effective_k": [kept]}
    (run / "results.json").write_text(json.dumps(counted))
    found = scan(Path("products"), PARSERS)  # what counted rows says more than a later run that did not
    assert found.results[key].folder == f"products/{run.name}"
    shutil.rmtree(later)
    (run / "results.json").write_text("{half")
    assert key not in scan(Path("products"), PARSERS).results


def test_groups_and_runs_together(tables: Path) -> None:
    """Parts of a table share the rows of a group; cells that differ in --method alone are one run."""
    content = json.loads(tables.read_text())
    content["methods"] |= {"H2O": {"method": "h2o"}, "Top-p": {"method": "top_p"}, "TOVA": {"method": "tova"}}
    content["groups"] = {
        "peers": [
            {"methods": ["H2O", "TOVA"], "k": [8, 16]},
            {"methods": ["Top-p"], "k": [8], "flags": {"seed": 1}},
        ]
    }
    (part, *_) = content["tables"]["tiny"]["parts"]
    content["tables"]["tiny"]["parts"] = [
        {"script": part["script"], "tasks": part["tasks"], "group": "peers"}
    ]
    tables.write_text(json.dumps(content))
    cells = plan(tables)
    assert [(cell.method, cell.k) for cell in cells] == [
        ("H2O", 8),
        ("H2O", 16),
        ("TOVA", 8),
        ("TOVA", 16),
        ("Top-p", None),
    ]
    together, alone = missing_runs(cells, Found(), "products")
    assert together[together.index("--method") + 1] == "h2o,tova" and "8,16" in together
    assert alone[alone.index("--method") + 1] == "top_p" and alone[alone.index("--seed") + 1] == "1"
    content["groups"]["peers"][1]["flags"] = {}
    tables.write_text(json.dumps(content))
    (all_,) = missing_runs(plan(tables), Found(), "products")
    assert all_[all_.index("--method") + 1] == "top_p,h2o,tova" and "8,16" in all_  # Top-p has no K
    for jobs, expected in (
        (2, ["top_p", "h2o,tova"]),
        (3, ["top_p", "h2o", "tova"]),
        (9, ["top_p", "h2o", "tova"]),
        (None, ["top_p", "h2o", "tova"]),
    ):
        runs = missing_runs(plan(tables), Found(), "products", jobs)
        assert [run[run.index("--method") + 1] for run in runs] == expected
    content["tables"]["tiny"]["parts"][0]["group"] = "pears"
    tables.write_text(json.dumps(content))
    with pytest.raises(
        UsageError, match="reproduce.json: group 'pears' is unknown: choose for example peers"
    ):
        plan(tables)


def test_a_run_under_way_is_left_alone(tables: Path, tmp_path: Path) -> None:
    """A started run holds a lock: a second process neither resumes it nor starts the same again."""
    command = missing_runs([c for c in plan(tables) if c.method == "Top-theta"], Found(), "products")[0]
    command[command.index("--num_samples") + 1] = "90"  # long enough to look at it
    content = json.loads(tables.read_text())
    content["tables"]["tiny"]["flags"]["num_samples"] = 90
    tables.write_text(json.dumps(content))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / command[0]), *command[1:]], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        for _ in range(1800):
            if list(Path("products").glob("*/run.json")):
                break
            time.sleep(0.1)
        found = scan(Path("products"), PARSERS)
        assert len(found.under_way) == 2 and not found.unfinished
        assert len(missing_runs(plan(tables), found, "products")) == 2
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 130
    assert len(scan(Path("products"), PARSERS).unfinished) == 1


def test_keys_hold_what_changes_an_answer() -> None:
    base = QASettings(mode=(0, 1, 3), k=(64,), calib_tac=True)

    def keys(settings: Settings) -> list[str]:
        return [answer_key(settings, cell) for cell in settings.cells()]

    theta, topk, dense = keys(base)
    assert len({theta, topk, dense}) == 3
    assert keys(replace(base, output_dir="x", batch_size=4, device="cuda")) == [theta, topk, dense]
    changed = keys(replace(base, calib_tac=False, calib_samples=7.0, seed=42))
    assert changed[0] != theta and changed[1:] == [topk, dense]
    changed = keys(replace(base, sdc="exact", vmc=True, k=(32,), layerk={0: 128}))
    assert changed[0] != theta and changed[1] != topk and changed[2] == dense
    assert not set(keys(replace(base, seed=1))) & {theta, topk, dense}
    # The windows of a text that are evaluated begin behind as many as are calibrated on.
    text = GenSettings(mode=(0, 1, 3), k=(64,), dataset="perplexity", text="x", calib_samples=4)
    of_text = keys(text)
    assert keys(replace(text, calib_sample_frac=0.5, calib_text="y"))[1:] == of_text[1:]
    assert not set(keys(replace(text, calib_samples=8))) & set(of_text)


def test_texts_of_a_table(tables: Path, tmp_path: Path) -> None:
    """They lie in --data_dir; a part's name is that of its rows; --calib_text is for what is calibrated."""
    for name in ("novel.txt", "news.txt"):
        (tmp_path / name).write_text("words")
    content = json.loads(tables.read_text())
    part = {
        "name": "novel",
        "script": "gen_llama.py",
        "tasks": ["perplexity"],
        "methods": ["dense", "Top-theta"],
    }
    flags = {"text": "novel.txt", "calib_text": "news.txt"}
    content["tables"]["tiny"] = {"parts": [part | {"k": [8], "flags": flags}]}
    cells = cells_of(content["tables"]["tiny"], content, options(tables, data_dir=str(tmp_path)), PARSERS)
    assert [cell.name for cell in cells] == ["novel dense", "novel Top-theta K=8"]
    for cell in cells:
        assert str(tmp_path / "novel.txt") in cell.arguments and "--data_dir" not in cell.arguments
    assert [str(tmp_path / "news.txt") in cell.arguments for cell in cells] == [False, True]


def test_studies_of_calibration(tables: Path, tmp_path: Path) -> None:
    """Rows of one method have labels; texts may be files of Python's library; --data_dir goes to cells that
    calibrate on a task's rows, and to no other."""
    (tmp_path / "novel.txt").write_text("words")
    content = json.loads(tables.read_text())
    row = {"methods": ["dense", "Top-theta"], "k": [8]}
    content["groups"] = {
        "texts": [
            row | {"label": "code", "flags": {"calib_text": "stdlib:argparse.py"}},
            {"methods": ["Top-theta"], "k": [8], "label": "short", "flags": {"calib_seq_len": 128}},
            {
                "methods": ["Top-theta"],
                "k": [8],
                "label": "questions",
                "flags": {"calib_text": None, "calib_task": "arc_easy"},
            },
        ]
    }
    part = {"script": "gen_llama.py", "tasks": ["perplexity"], "group": "texts"}
    flags = {"text": "novel.txt", "calib_text": "stdlib:inspect.py"}
    table = content["tables"]["tiny"] = {"parts": [part | {"flags": flags}]}
    cells = cells_of(table, content, options(tables, data_dir=str(tmp_path)), PARSERS)
    assert [cell.method for cell in cells] == [
        "dense: code",
        "Top-theta: code",
        "Top-theta: short",
        "Top-theta: questions",
    ]
    dense, code, short, questions = (cell.arguments for cell in cells)
    assert argparse.__file__ in code and inspect.__file__ in short and "128" in short
    assert not {"--calib_text", "--data_dir"} & set(dense) and "--data_dir" not in code
    assert "--calib_text" not in questions and questions[questions.index("--data_dir") + 1] == str(tmp_path)
    table["parts"][0]["flags"]["calib_text"] = "stdlib:no_such_module.py"
    with pytest.raises(UsageError, match="--calib_text .*no_such_module.py: there is no such file"):
        cells_of(table, content, options(tables, data_dir=str(tmp_path)), PARSERS)


def test_methods_by_name(tables: Path) -> None:
    """A method of a table is a number or a name with options; a table's calib_task goes to those that
    calibrate."""
    content = json.loads(tables.read_text())
    content["methods"]["capped"] = {"method": "top_theta:capk", "calib_tac": True}
    content["methods"]["named"] = {"method": "top_k", "sdc": "exact", "vmc": True}
    table = content["tables"]["tiny"]
    table["flags"]["calib_task"] = "everyday_science"
    table["parts"][0]["methods"] += ["capped", "named"]
    cells = cells_of(table, content, options(tables), PARSERS)
    by_name = {cell.name: cell for cell in cells}
    assert len(cells) == 9
    # The key is the cell's, however its method was named.
    assert by_name["everyday_science named K=8"].key == by_name["everyday_science Top-k K=8"].key
    assert by_name["everyday_science capped K=8"].key != by_name["everyday_science Top-theta K=8"].key
    assert {cell.method for cell in cells if "--calib_task" in cell.arguments} == {"Top-theta", "capped"}
    for wrong in ({"vmc": True}, {"mode": 1, "method": "top_k"}):
        content["methods"]["named"] = wrong
        with pytest.raises(UsageError, match="method 'named' needs either 'method' or 'mode'"):
            cells_of(table, content, options(tables), PARSERS)
    content["methods"]["named"] = {"method": "topk"}
    with pytest.raises(UsageError, match="--method is 'topk'"):
        cells_of(table, content, options(tables), PARSERS)


def test_what_rows_are_compared_with(tables: Path, quick: None, capsys: pytest.CaptureFixture) -> None:
    """The first dense cell of a task, whether --only names it or not; never one in another type."""
    content = json.loads(tables.read_text())
    content["methods"]["half"] = {"mode": 3, "dtype": "bfloat16"}
    content["tables"]["tiny"]["parts"][0] |= {"methods": ["dense", "half", "Top-k"], "k": [8]}
    tables.write_text(json.dumps(content))

    def baselines(only: str, folder: str) -> dict[str, str]:
        assert run_sweep(options(tables, only=only), PARSERS, ROOT) == 0
        results = json.loads(Path("products/tables/tiny", folder, "results.json").read_text())
        return {one["method"]: one.get("paired", {}).get("baseline", "") for one in results}

    assert baselines("half,Top-k", "") == {"half": "", "Top-k K=8": ""}
    assert "nothing is compared with dense attention, which has not been run" in capsys.readouterr().err
    assert baselines("dense,half", "part") == {"dense": "", "half": "dense"}
    assert baselines("Top-k", "part") == {"Top-k K=8": "dense"}
    assert baselines("*", "") == {"dense": "", "half": "dense", "Top-k K=8": "dense"}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"table": "tinny"}, "choose for example tiny"),
        ({"only": "Topk"}, "choose for example Top-k"),
        ({"jobs": 0}, "--jobs is 0: give at least 1"),
        ({"file": "nowhere.json"}, "nowhere.json"),
        ({"samples": "many"}, "--samples is 'many': give a number"),
        ({"data_dir": "nowhere"}, "nowhere"),
        ({"table": None, "dry_run": True}, "--dry_run has no effect without --table"),
        ({"table": None, "jobs": 2}, "--jobs has no effect without --table"),
        ({"redraw": True, "only": "dense"}, "--only has no effect with --redraw"),
        ({"table_only": True, "dry_run": True}, "--dry_run has no effect with --table_only"),
        ({"slurm_hours": 3}, "--slurm_hours has no effect without --slurm"),
        ({"slurm": "short", "jobs": 3}, "--jobs has no effect with --slurm"),
    ],
)
def test_bad_flags(tables: Path, changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run_sweep(options(tables, **changes), PARSERS, ROOT)


@pytest.mark.parametrize("folder, words", [(None, "--data_dir is needed"), ("empty", "empty does not have")])
def test_a_missing_text(tmp_path: Path, folder: str | None, words: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=f"{words}.* longbench_gov_report/test.jsonl"):
        run_sweep(SweepOptions(table="text", data_dir=folder), PARSERS, ROOT)


def test_a_failing_run_is_named_and_the_others_go_on(
    tables: Path, quick: None, capsys: pytest.CaptureFixture
) -> None:
    content = json.loads(tables.read_text())
    content["tables"]["tiny"]["parts"][0]["k"] = [16, 100_000]  # no prompt is that long
    tables.write_text(json.dumps(content))
    assert run_sweep(options(tables), PARSERS, ROOT) == 1
    printed = capsys.readouterr()
    assert "failed with exit code 2" in printed.err and "K=100000" in printed.err
    assert "not run" in printed.out and "Top-k" in printed.out


def test_every_table_of_the_project_is_sound(tmp_path: Path) -> None:
    """Each cell of reproduce.json is a command line that the scripts accept."""
    content = json.loads((ROOT / "reproduce.json").read_text())
    for name, table in content["tables"].items():
        flags = [table.get("flags", {}), *(part.get("flags", {}) for part in table["parts"])]
        texts = {given[flag] for given in flags for flag in TEXT_FLAGS & given.keys()}
        for text in texts:
            (tmp_path / text).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / text).touch()
        data_dir = str(tmp_path) if texts else None
        cells = cells_of(table, content, SweepOptions(table=name, data_dir=data_dir), PARSERS)
        fewer = SweepOptions(table=name, data_dir=data_dir, samples="1")
        assert len(cells_of(table, content, fewer, PARSERS)) == len(cells)
        assert len({(cell.task, cell.key) for cell in cells}) == len(cells) >= 4


@pytest.mark.long
def test_slurm(tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Submission through submitit, on this machine in place of a cluster."""
    monkeypatch.setenv("SUBMITIT_CLUSTER", "local")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_sweep(options(tables, only="dense", slurm="short"), PARSERS, ROOT) == 0
    assert "test_llama.py" in capsys.readouterr().out
    for _ in range(900):
        if list(Path("products").glob("*/results.json")):
            break
        time.sleep(0.1)
    assert run_sweep(options(tables, only="dense", table_only=True), PARSERS, ROOT) == 0
    assert "dense" in capsys.readouterr().out
