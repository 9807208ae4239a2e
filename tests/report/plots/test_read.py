"""The readers of products folders: numbers, missing and damaged files."""

import gzip
import json
import time
from pathlib import Path

import pytest

from tests.report.helpers import put
from toptheta.report.plots import read
from toptheta.report.plots.read import read_results_by_task
from toptheta.util.errors import UsageError


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
        (lambda: read.read_config(tmp_path), r"config\.json is damaged \(.*, line 2"),
        (lambda: read.read_sequence_lengths(tmp_path), r"example\.csv\.gz is not a complete gzip file"),
    ):
        with pytest.raises(UsageError, match=words):
            read_it()


def test_a_million_lines_are_read_in_seconds(tmp_path: Path) -> None:
    rows = [f"_H{head}:{n} {n / 7} 8 64\n" for head in range(32) for n in range(65, 1065)]
    (tmp_path / "th.txt").write_text("".join(f"L{layer}{row}" for layer in range(32) for row in rows))
    start = time.monotonic()
    frame = read.read_thresholds(tmp_path)
    assert frame is not None and len(frame) == 1_024_000
    assert time.monotonic() - start < 15  # takes about one second; a loop over the lines takes longer


def test_results_come_by_task(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(UsageError, match=r"results\.json is missing"):
        read_results_by_task(path)
    path.write_text(json.dumps([{"method": m, "task": t} for m, t in (("a", "x"), ("b", "y"), ("c", "x"))]))
    assert [r.method for r in read_results_by_task(path)["x"]] == ["a", "c"]
    for content in ("[]", "{}", "[1]", "[{}]", "nothing"):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"results\.json"):
            read_results_by_task(path)
