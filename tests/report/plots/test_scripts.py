"""The plot scripts and their readers, on synthetic products folders and a real threshold table."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.paths import ROOT, SHARED
from toptheta.report.plots import read
from toptheta.util.errors import UsageError

REAL_TABLE = SHARED / "golden/calibration/pre-softmax_tac1_sigma0.1_offline-calibrated.th.txt.gz"
LAYERS, HEADS, GROUPS, K = 6, 9, 3, 64
PNG = b"\x89PNG\r\n\x1a\n"


def put(path: Path, text: str, gz: bool) -> None:
    if gz:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def make_products(folder: Path, gz: bool = False, config: bool = True, decode: bool = True) -> Path:
    """A products folder as a run leaves it: layers differ, prefill keeps about K, decode scatters more."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lengths = rng.integers(70, 420, size=40)
    lines = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            theta = (
                0.4 * layer
                - 0.2 * head
                + 3.0 * (1 - K / np.arange(K + 1, 420))
                + 0.2 * rng.normal(size=420 - K - 1)
            )
            samples = rng.integers(1, 9, size=len(theta))
            lines += [
                f"L{layer}_H{head}:{n} {t!r} {s} {K}\n"
                for n, t, s in zip(range(K + 1, 420), theta.tolist(), samples)
            ]
    put(folder / "th.txt", "".join(lines), gz)

    phases = ("prefill", "generative_decoding") if decode else ("prefill",)
    for layer in range(LAYERS):
        sizes = []
        for phase in phases:
            attn, vrow = [], []
            for length in lengths:
                for n in [length] if phase == "prefill" else range(length + 1, length + 6):
                    for head in range(HEADS):
                        ratio = (1.1 - 0.5 * layer / LAYERS) * np.exp(
                            (0.1 if phase == "prefill" else 0.3) * rng.normal()
                        )
                        full = n * (n + 1) // 2 if phase == "prefill" else n
                        topk = min(n, K) if phase != "prefill" else K * (K + 1) // 2 + (n - K) * K
                        kept = max(1, min(full, round(ratio * topk)))
                        sizes.append(f"L{layer}_H{head}:{n} {K} {phase} {kept / topk}\n")
                        attn.append(f"{layer},{head},{n},{kept},{full}\n")
                    vrow += [
                        f"{layer},{g},{n},{round(n * rng.uniform(0.6, 1.0))},{n}\n" for g in range(GROUPS)
                    ]
            put(folder / f"layer{layer}_kept_attn_{phase}.csv", "".join(attn), gz)
            put(folder / f"layer{layer}_kept_vrow_{phase}.csv", "".join(vrow), gz)
        put(folder / f"layer{layer}.txt", "".join(sizes), gz)

    put(folder / "sequence_lengths_per_example.csv", "".join(f"{n}\n" for n in lengths), gz)
    completions = rng.integers(10, 200, size=len(lengths))
    put(
        folder / "prompt_completion_lengths_per_sample.csv",
        "".join(f"{p} {c}\n" for p, c in zip(lengths, completions)),
        gz,
    )
    outcomes = [
        {"task_id": f"HumanEval/{i}", "passed": bool(c < 90), "result": "passed"}
        for i, c in enumerate(completions)
    ]
    put(folder / "samples.jsonl_results.jsonl", "".join(json.dumps(row) + "\n" for row in outcomes), gz)
    if config:
        settings = {
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "num_kv_heads": GROUPS,
            "model": "Tiny",
            "method": "Top-theta",
        }
        (folder / "config.json").write_text(json.dumps({**settings, "k_per_layer": [K] * LAYERS}))
    return folder


def run_script(name: str, *args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one sentence, without a traceback, that has all `words`."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


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


@pytest.mark.parametrize("gz", [False, True])
def test_readers_give_the_numbers(tmp_path: Path, gz: bool) -> None:
    put(tmp_path / "th.txt", "L0_H0:65 -0.25 8 64\nL31_H12:66 1e-05 3 64.0\n", gz)
    frame = read.read_thresholds(tmp_path)
    assert frame is not None
    assert frame.to_dict("list") == {
        "layer": [0, 31],
        "head": [0, 12],
        "n": [65, 66],
        "theta": [-0.25, 1e-05],
        "samples": [8, 3],
        "k": [64.0, 64.0],
    }

    put(
        tmp_path / "layer1.txt",
        "L1_H61:129 512 prefill 1.0\nL1_H0:130 512 generative_decoding 0.0077\r\n\n",
        gz,
    )
    frame = read.read_sizes(tmp_path, 1)
    assert frame is not None
    assert frame["phase"].tolist() == ["prefill", "generative_decoding"]
    assert frame.drop(columns="phase").to_dict("list") == {
        "layer": [1, 1],
        "head": [61, 0],
        "n": [129, 130],
        "k": [512, 512],
        "ratio": [1.0, 0.0077],
    }

    put(tmp_path / "layer1_kept_vrow_prefill.csv", "1,0,100,60,100\n1,1,100,75,100\n", gz)
    frame = read.read_kept(tmp_path, 1, "vrow", "prefill")
    assert frame is not None
    assert frame["group"].tolist() == [0, 1] and frame["kept"].tolist() == [60, 75]
    assert read.named_layers(tmp_path) == [1]

    put(tmp_path / "sequence_lengths_per_example.csv", "120\n77\n", gz)
    put(tmp_path / "prompt_completion_lengths_per_sample.csv", "100 20\n50 7\n", gz)
    put(
        tmp_path / "samples.jsonl_results.jsonl", '{"task_id": "a", "passed": true, "result": "passed"}\n', gz
    )
    lengths, samples = read.read_sequence_lengths(tmp_path), read.read_completion_lengths(tmp_path)
    outcomes = read.read_outcomes(tmp_path)
    assert lengths is not None and lengths["n"].tolist() == [120, 77]
    assert samples is not None and samples["total"].tolist() == [120, 57]
    assert outcomes is not None and outcomes.to_dict("list") == {
        "task_id": ["a"],
        "passed": [True],
        "result": ["passed"],
    }


def test_readers_take_missing_and_empty_files_for_none(tmp_path: Path) -> None:
    (tmp_path / "th.txt").write_text("\n")
    (tmp_path / "samples.jsonl_results.jsonl").write_text("")
    assert read.read_thresholds(tmp_path) is None and read.read_sizes(tmp_path, 0) is None
    assert read.read_outcomes(tmp_path) is None and read.read_config(tmp_path) == {}


def test_a_repeated_threshold_counts_once(tmp_path: Path) -> None:
    (tmp_path / "th.txt").write_text("L0_H0:65 0.1 8 64\nL0_H0:65 0.2 9 64\n")
    frame = read.read_thresholds(tmp_path)
    assert frame is not None and frame["theta"].tolist() == [0.2]


@pytest.mark.parametrize(
    "line",
    [
        "L0_H0:66 0.3",
        "L0_H0:66 0.3 8 64 7",
        "L0_H0:66 0.3 8 64 7 7",
        "L0_H0:66 zero 8 64",
        "L0_H0:66 nan 8 64",
        "L0_H0:66 inf 8 64",
        "L-1_H0:66 0.3 8 64",
        "L0_H0:6.5 0.3 8 64",
        "L0_H0:66666666666666666666 0.3 8 64",
        '"L0_H0:66 0.3 8 64',
        "\0\0\0\0",
        "\xff\xfe",
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_line_is_named(tmp_path: Path, line: str, place: int) -> None:
    lines = ["L0_H0:65 0.25 8 64", "L0_H1:65 0.25 8 64"]
    lines.insert(place, line)
    (tmp_path / "th.txt").write_text("\n".join(lines) + "\n", encoding="latin-1")
    with pytest.raises(UsageError, match=rf"th\.txt, line {place + 1}: "):
        read.read_thresholds(tmp_path)


def test_other_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "layer2.txt").write_text("L2_H0:65 64 prefill 1.0\nL3_H0:65 64 prefill 1.0\n")
    (tmp_path / "layer3.txt").write_text("L3_H0:65 64 warmup 1.0\n")
    (tmp_path / "layer2_kept_attn_prefill.csv").write_text("2,0,100,60,100\n\n2,0,100,-60,100\n")
    (tmp_path / "samples.jsonl_results.jsonl").write_text(
        '{"task_id": "a", "passed": true}\n{"task_id": "b"}\n'
    )
    (tmp_path / "config.json").write_text('{"num_layers": 30,\n}')
    (tmp_path / "sequence_lengths_per_example.csv.gz").write_bytes(gzip.compress(b"12\n" * 99)[:-9])
    for read_it, words in (
        (lambda: read.read_sizes(tmp_path, 2), r"layer2\.txt, line 2"),
        (lambda: read.read_sizes(tmp_path, 3), r"layer3\.txt, line 1"),
        (lambda: read.read_kept(tmp_path, 2, "attn", "prefill"), r"prefill\.csv, line 3"),
        (lambda: read.read_outcomes(tmp_path), r"results\.jsonl, line 2"),
        (lambda: read.read_config(tmp_path), r"config\.json, line 2"),
        (lambda: read.read_sequence_lengths(tmp_path), r"example\.csv\.gz is not a whole gzip file"),
    ):
        with pytest.raises(UsageError, match=words):
            read_it()


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
        (["--layer-ids", "0,6"], ["--layer-ids names 6", "0 to 5"]),
        (["--head-ids", "9"], ["--head-ids names 9", "0 to 8"]),
        (["--layer-ids", "0;1"], ["--layer-ids is '0;1'"]),
        (["--layer-ids", ""], ["--layer-ids is ''"]),
        (["--head-ids=-1"], ["--head-ids is '-1'"]),
        (["--layers", "32"], ["--layers is 32", "says 6"]),
        (["--heads", "0"], ["--heads is '0'"]),
        (["--layers", "9" * 5000], ["--layers is"]),
        (["--format", "bmp"], ["--format is 'bmp'", "png, pdf, svg"]),
        (["--output", "FILE"], ["--output is", "which is a file"]),
        (["--output", "FILE/sub"], ["cannot write", "--output"]),
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
        assert_refused(run_script(script, "-d", tmp_path / "none", "-t", "t"), "-d/--dir", "is no folder")
        assert_refused(
            run_script(script, "-d", tmp_path, "-t", "t"), "-d/--dir", "nothing to draw", "layer<i>.txt"
        )
        assert_refused(run_script(script, "-t", "t"), "--dir", "required")


def test_a_real_threshold_table(tmp_path: Path) -> None:
    if not REAL_TABLE.is_file():
        pytest.skip(f"no real threshold table at {REAL_TABLE}: the synthetic ones cover the format")
    (tmp_path / "th.txt.gz").write_bytes(REAL_TABLE.read_bytes())
    frame = read.read_thresholds(tmp_path)
    assert frame is not None and len(frame) == 171720
    assert (frame["layer"].max(), frame["head"].max(), set(frame["k"])) == (29, 8, {64.0})
    first = frame.iloc[0]
    assert (first["n"], first["samples"]) == (65, 8) and first["theta"] == -0.8428175663238419
    result = run_script(
        "plot_th_llama.py", "-d", tmp_path, "-t", "SmolLM2", "--head-ids", "0,1,2,3,4,5,6,7,8"
    )
    assert result.returncode == 0 and result.stdout.splitlines() == [str(tmp_path / "th.png")]


def test_a_million_lines_are_read_in_seconds(tmp_path: Path) -> None:
    rows = [f"_H{head}:{n} {n / 7} 8 64\n" for head in range(32) for n in range(65, 1065)]
    (tmp_path / "th.txt").write_text("".join(f"L{layer}{row}" for layer in range(32) for row in rows))
    start = time.monotonic()
    frame = read.read_thresholds(tmp_path)
    assert frame is not None and len(frame) == 1_024_000
    assert time.monotonic() - start < 15  # takes about one second; a loop over the lines takes longer
