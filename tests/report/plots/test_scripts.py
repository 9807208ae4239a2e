"""The plot scripts: every figure, their flags, missing and damaged inputs."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.golden import read_tables
from tests.helpers.paths import ROOT
from tests.report.helpers import LAYERS, assert_refused, make_products, put, run_script
from toptheta.calibration.tables import save_tables
from toptheta.report.plots import read
from toptheta.util.files import write_text

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_products(tmp_path_factory.mktemp("plain") / "2024-04-29_17-29-01_774054")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gzipped, without config.json and without decode."""
    return make_products(tmp_path_factory.mktemp("old") / "run", gz=True, config=False, decode=False)


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("plot_th_llama.py", ["th", "size", "kept_attn", "sequence_lengths"]),
        ("plot_gen_llama.py", ["lengths", "size_by_layer"]),
    ],
)
def test_every_figure_is_drawn(plain: Path, old: Path, tmp_path: Path, script: str, names: list[str]) -> None:
    for folder in (plain, old):
        output = tmp_path / folder.name
        result = run_script(script, "-d", folder, "-t", "A title with $5 and $6", "--output", output)
        assert result.returncode == 0, result.stderr
        assert sorted(path.name for path in output.iterdir()) == sorted(f"{name}.png" for name in names)
        assert all(path.read_bytes().startswith(PNG) for path in output.iterdir())
        assert result.stdout.splitlines() == [str(output / f"{name}.png") for name in names]
        if folder == plain:  # has all but what a flag of its own makes
            notes = result.stderr.splitlines()
            assert len(notes) == (script == "plot_th_llama.py") and all("--effective_k" in n for n in notes)


def test_formats_selection_and_default_output(tmp_path: Path) -> None:
    folder = make_products(tmp_path / "run", decode=False)
    before = set(folder.iterdir())
    for suffix, magic in (("svg", b"<?xml"), ("pdf", b"%PDF")):
        flags = ("--layer-ids", "0,5", "--head-ids", "8", "--format", suffix)
        result = run_script("plot_th_llama.py", "-d", folder, "-t", "t", *flags)
        assert result.returncode == 0, result.stderr
        assert (folder / f"th.{suffix}").read_bytes().startswith(magic)
    svg = (folder / "th.svg").read_text()
    assert "layer 5, K = 64" in svg and "head 8" in svg and "layer 1," not in svg and "head 0" not in svg
    assert len(set(folder.iterdir()) - before) == 8  # four figures twice, no temporary file left


@pytest.mark.parametrize(
    ("placement", "label"), [("pre-softmax", "score"), ("post-softmax", "softmax weight")]
)
def test_the_axis_says_what_theta_is_compared_with(tmp_path: Path, placement: str, label: str) -> None:
    folder = make_products(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["settings"] = config.get("settings", {}) | {"placement": placement}
    (folder / "config.json").write_text(json.dumps(config))
    positive = (folder / "th.txt").read_text().replace(" -", " ")  # of these, only the config tells
    (folder / "th.txt").write_text(positive)
    result = run_script("plot_th_llama.py", "-d", folder, "-t", "t", "--format", "svg")
    assert result.returncode == 0, result.stderr
    assert f"({label})" in (folder / "th.svg").read_text()


def test_scripts_start_fast_and_without_torch(plain: Path) -> None:
    start = time.monotonic()
    assert run_script("plot_gen_llama.py", "--help").returncode == 0
    assert time.monotonic() - start < 5
    code = (
        "import sys, toptheta.report.plots.thresholds\n"
        "import toptheta.report.plots.generation, toptheta.report.plots.tradeoff\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "MPLBACKEND": "TkAgg"}
    )


def test_missing_inputs_are_named_and_the_rest_is_drawn(tmp_path: Path) -> None:
    folder = make_products(tmp_path / "run", decode=False)
    (folder / "layer4.txt").unlink()
    (folder / "samples.jsonl_results.jsonl").write_text("")
    for layer in range(LAYERS):
        (folder / f"layer{layer}_kept_vrow_prefill.csv").unlink()
    result = run_script("plot_th_llama.py", "-d", folder, "-t", "t")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 4
    assert (
        "layer4.txt is missing" in result.stderr
        and "to layer5_kept_vrow_prefill.csv (6 files)" in result.stderr
    )
    result = run_script("plot_gen_llama.py", "-d", folder, "-t", "t")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2
    assert "samples.jsonl_results.jsonl is missing or empty" in result.stderr
    put(folder / "samples.jsonl_results.jsonl", '{"task_id": "a", "passed": true}\n', False)
    result = run_script("plot_gen_llama.py", "-d", folder, "-t", "t")
    assert result.returncode == 0 and "has 1 samples" in result.stderr and "has 40" in result.stderr


def test_damage_ends_with_2_and_the_rest_is_drawn(tmp_path: Path) -> None:
    folder = make_products(tmp_path / "run", decode=False)
    with (folder / "layer3.txt").open("a") as file:
        file.write("L3_H0:70 64 pref")
    lines = (folder / "layer3.txt").read_text().count("\n") + 1
    result = run_script("plot_th_llama.py", "-d", folder, "-t", "t")
    assert result.returncode == 2 and f"layer3.txt, line {lines}: " in result.stderr
    assert len(result.stdout.splitlines()) == 3 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layer-ids", "0,6"], ["there is no layer 6", "0 to 5"]),
        (["--head-ids", "9"], ["there is no head 9", "0 to 8"]),
        (["--layer-ids", "0;1"], ["--layer-ids is '0;1'"]),
        (["--layer-ids", ""], ["--layer-ids is empty"]),
        (["--format", "pdf", "--format=png"], ["--format is given 2 times"]),
        (["--head-ids=-1"], ["--head-ids is '-1'"]),
        (["--layers", "32"], ["--layers is 32", "says 6"]),
        (["--heads", "0"], ["--heads is '0'"]),
        (["--layers", "9" * 5000], ["--layers is"]),
        (["--format", "bmp"], ["--format is 'bmp'", "png, pdf, svg"]),
        (["--output", "FILE"], ["--output is", "which is a file"]),
        (["--output", "FILE/sub"], ["cannot be written", "--output"]),
        (["--colour", "red"], ["--colour", "--help"]),
    ],
)
def test_bad_flags_are_refused(plain: Path, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    (tmp_path / "file").touch()
    flags = [flag.replace("FILE", str(tmp_path / "file")) for flag in flags]
    assert_refused(run_script("plot_th_llama.py", "-d", plain, "-t", "t", *flags), *words)


def test_ids_are_checked_by_files_where_there_is_no_config(old: Path, tmp_path: Path) -> None:
    assert_refused(run_script("plot_th_llama.py", "-d", old, "--layer-ids", "6"), "the run has 6 layers")
    assert_refused(run_script("plot_gen_llama.py", "-d", old, "--head-ids", "9"), "the run has 9 heads")
    flags = ("--layer-ids", "6", "--layers", "8", "--output", tmp_path)
    assert_refused(
        run_script("plot_gen_llama.py", "-d", old, *flags, "--head-ids", "12", "--heads", "12"), "0 to 11"
    )


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    for script in ("plot_th_llama.py", "plot_gen_llama.py"):
        assert_refused(run_script(script, "-d", tmp_path / "none", "-t", "t"), "-d/--dir", "is not a folder")
        assert_refused(
            run_script(script, "-d", tmp_path, "-t", "t"), "-d/--dir", "nothing to draw", "layer<i>.txt"
        )
        assert_refused(run_script(script, "-t", "t"), "--dir", "required")


def test_a_run_of_several_cells_lists_them(tmp_path: Path) -> None:
    for cell in ("mode3", "mode0_k16", "arc_easy/mode3"):
        write_text(tmp_path / cell / "config.json", "{}")
    for script in ("plot_th_llama.py", "plot_gen_llama.py"):
        refused = run_script(script, "-d", tmp_path)
        assert_refused(refused, "name one of its cells (arc_easy/mode3, mode0_k16, mode3), or choose")
    for number in range(9):
        write_text(tmp_path / "many" / f"mode0_k{number}" / "config.json", "{}")
    assert_refused(run_script("plot_th_llama.py", "-d", tmp_path / "many"), "mode0_k7, and 1 more)")


def test_a_real_threshold_table(golden: Path, tmp_path: Path) -> None:
    tables = read_tables(golden, "pre-softmax_tac1_sigma0.1_offline-calibrated.th")
    save_tables(tables, tmp_path / "tables")
    (tmp_path / "th.txt.gz").write_bytes(gzip.compress((tmp_path / "tables" / "th.txt").read_bytes()))
    frame = read.read_thresholds(tmp_path)
    assert frame is not None and len(frame) == 171720
    assert (frame["layer"].max(), frame["head"].max(), set(frame["k"])) == (29, 8, {64.0})
    first = frame.iloc[0]
    assert (first["n"], first["samples"]) == (65, 8) and first["theta"] == tables.theta[0].values[0, 65]
    assert first["theta"] == pytest.approx(-0.8428175663238419, rel=1e-7)
    result = run_script(
        "plot_th_llama.py", "-d", tmp_path, "-t", "SmolLM2", "--head-ids", "0,1,2,3,4,5,6,7,8"
    )
    assert result.returncode == 0 and result.stdout.splitlines() == [str(tmp_path / "th.png")]
