"""Damaged files: whatever is in them, a UsageError or what a slow reading finds too, and nothing else.

`pytest tests/eval/test_fuzz.py --fuzz 10000` tries as many inputs of each format; the usual suite fewer.
"""

import json
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import numpy as tensors

from toptheta.calibration.artefact import FORMAT, Calibration, CalibrationConfig
from toptheta.calibration.kept_samples import (
    SAMPLES_NAME,
    read_calibration_samples,
    write_calibration_samples,
)
from toptheta.calibration.tables import (
    BINARY_NAME,
    CalibrationTables,
    LayerTable,
    LayerValues,
    load_tables,
    save_tables,
)
from toptheta.eval import score, table_cells
from toptheta.eval.cell import ANSWERS, Cell
from toptheta.eval.cli import settings_from_json
from toptheta.eval.run import check_resume
from toptheta.eval.settings import GenSettings
from toptheta.eval.table_cells import SweepOptions
from toptheta.eval.tasks.rows import SCHEMAS, read_rows
from toptheta.eval.tasks.texts import text_of
from toptheta.kernels import profile
from toptheta.methods.params import AttentionParams
from toptheta.models.sharing import find_calibration, used
from toptheta.report.plots import read
from toptheta.report.results import Answer, CellResult, Kept, Metric, read_answers, read_result, write_answers
from toptheta.util import files
from toptheta.util.errors import UsageError

WORDS = [
    b"nan", b"inf", b"-Infinity", b"-1", b"0", b"1", b"1e400", b"-0.0", b".5", b"1e5", b"64.5", b"99999999",
    b"99999999999999999999", b"\xff", b"\x00", b"\n", b"\r", b"\t", b" ", b"", b"{", b"[", b"]", b"}", b",",
    b"#", b"null", b"true", b'"', b'"x"', b"[]", b"{}", b"[" * 5000, b"1_0", b"0x1", b"+1", b"L", b"_H", b":",
    b"L0_H0:9 0.5 2 6",
]  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["word", "word", "insert", "overwrite", "remove", "cut", "double"]),
        st.integers(0, 1 << 16),
        st.sampled_from(WORDS) | st.binary(max_size=4),
    ),
    min_size=1,
    max_size=4,
)
WORD = re.compile(rb"-?[\w.+]+|[^\s\w]")


def damaged(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """data: with words replaced or doubled, bytes inserted, overwritten or removed, or the end cut off."""
    for kind, place, new in edits:
        at = place % (len(data) + 1)
        if kind in ("word", "double"):
            found = list(WORD.finditer(data)) if kind == "word" else list(re.finditer(rb"[^\n]+\n?", data))
            if found:
                match = found[place % len(found)]
                middle = new if kind == "word" else match[0] * 2
                data = data[: match.start()] + middle + data[match.end() :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "remove":
            data = data[:at] + data[at + len(new) + 1 :]
        else:
            data = data[:at] + new + data[at + (len(new) if kind == "overwrite" else 0) :]
    return data


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Callable[[bytes, Callable[[bytes], None]], None]:
    def run(good: bytes, check: Callable[[bytes], None], share: int = 1) -> None:
        """Call `check`, which may raise UsageError, with damaged forms of what is good; with that it must
        not. share: a part of the usual number of inputs is enough."""
        check(good)
        refused, count = 0, request.config.getoption("--fuzz") // share

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(EDITS)
        def try_one(edits: list[tuple[str, int, bytes]]) -> None:
            nonlocal refused
            try:
                check(damaged(good, edits))
            except UsageError as error:
                refused += 1
                assert len(str(error)) > 20 and "Traceback" not in str(error)

        try_one()
        assert refused > count / 10

    return run


def same(a: Any, b: Any) -> bool:
    """Whether two values of JSON are the same, numbers by value."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return not isinstance(a, (str, bool)) and not isinstance(b, (str, bool)) and float(a) == float(b)
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def finite(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def some_tables() -> CalibrationTables:
    tables = CalibrationTables(3, 2, {0: 6, 2: 6}, meta={"placement": "pre-softmax"})
    for layer in (0, 2):
        values, samples = np.full((2, 12), np.nan), np.zeros((2, 12), dtype=np.int64)
        values[:, [7, 9, 11]] = np.array([[-0.25, 1e-5, 3.0], [0.5, 2.25, 7.125]]) + layer
        samples[:, [7, 9, 11]] = [4, 3, 1]
        tables.theta[layer] = LayerTable(values, samples)
        tables.sdc[layer] = LayerTable(abs(values), samples)
        tables.values[layer] = LayerValues(np.ones((1, 4), np.float32), np.ones(2, np.float32))
    return tables


@pytest.mark.parametrize("kind", ["th", "sdc"])
def test_lines_of_tables(kind: str, tmp_path: Path, fuzz: Callable) -> None:
    save_tables(some_tables(), tmp_path)
    (tmp_path / BINARY_NAME).unlink()
    (tmp_path / ("sdc.txt" if kind == "th" else "th.txt")).unlink()
    path = tmp_path / f"{kind}.txt"
    number = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
    line = re.compile(
        rf"L\+?(\d+)_H\+?(\d+):\+?(\d+) {number} \+?(\d+)" + (rf" {number}" if kind == "th" else ""), re.I
    )

    def check(data: bytes) -> None:
        path.write_bytes(data)
        tables = load_tables(tmp_path, 3, 2)
        held = tables.theta if kind == "th" else tables.sdc
        found = {
            (layer, head, n): (table.values[head, n], table.samples[head, n])
            for layer, table in held.items()
            for head, n in zip(*table.samples.nonzero())
        }
        expected = {}
        for text in data.decode("latin-1").splitlines():
            if text.strip(" \t\0"):
                match = line.fullmatch(" ".join(text.split()))
                assert match, text
                layer, head, n, samples = (int(match[i]) for i in (1, 2, 3, 5))
                assert expected.setdefault((layer, head, n), (float(match[4]), samples)) == (
                    float(match[4]),
                    samples,
                )
                assert kind == "sdc" or float(match[6]) == tables.k[layer] >= 0
        assert found == expected and all(samples >= 1 and math.isfinite(v) for v, samples in found.values())
        assert all(0 <= layer < 3 for layer in held) and all(
            table.values.shape[0] == 2 for table in held.values()
        )

    fuzz(path.read_bytes(), check)


def test_binary_tables(tmp_path: Path, fuzz: Callable) -> None:
    save_tables(some_tables(), tmp_path)
    path = tmp_path / BINARY_NAME

    def check(data: bytes) -> None:
        path.write_bytes(data)
        tables, arrays = load_tables(tmp_path, 3, 2), tensors.load(data)
        for kind, held in (("theta", tables.theta), ("sdc", tables.sdc)):
            assert {f"{kind}.{layer}.n" for layer in held} == {
                name for name in arrays if name.startswith(kind) and name.endswith("n")
            }
            for layer, table in held.items():
                n, samples = arrays[f"{kind}.{layer}.n"], arrays[f"{kind}.{layer}.samples"]
                np.testing.assert_array_equal(table.samples[:, n], samples)
                values = np.where(samples > 0, arrays[f"{kind}.{layer}.values"], np.nan)
                np.testing.assert_array_equal(table.values[:, n], values)
                assert table.samples.sum() == samples.sum() and samples.min() >= 0

    fuzz(path.read_bytes(), check)


def test_results(tmp_path: Path, fuzz: Callable) -> None:
    result = CellResult(
        "Top-theta K=64", "tiny", "arc_easy", "top_theta", 0, 64, num_fewshot=3, seconds={"evaluation": 2.5},
        metrics={"acc": Metric(0.5, 0.1, 20)}, kept={"prefill": Kept(0.25, 0.5), "generative_decoding": None},
        extra={"grid": [{"length": 64, "depth": 0, "found": 1, "count": 1}], "by_length": []},
    )  # fmt: skip
    path = tmp_path / "results.json"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        read, saved = read_result(path).to_json(), json.loads(data)
        assert finite(read)
        for name, value in saved.items():
            if name == "metrics":
                for metric, fields in value.items():
                    assert same(read[name][metric]["value"], fields["value"])
            elif name != "kept" and value is not None:
                assert same(read[name], value)

    fuzz(json.dumps(result.to_json(), indent=1).encode(), check)


def test_answers(tmp_path: Path, fuzz: Callable) -> None:
    write_answers(
        tmp_path,
        [
            Answer("arc/1", "ab", 1, {"acc": 1.0}, {"prompt": 9}, [-2.5, -1.5], 1, cluster="c"),
            Answer("arc/2", "cd", "a text", {"em": 0.0}, {"prompt": 9, "reply": 2}, reply_ids=[4, 5]),
            Answer("arc/3", "ef", None, {"nll": 2.5}),
        ],
    )
    path = tmp_path / "answers.jsonl"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        answers = read_answers(tmp_path)
        saved = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
        assert len({answer.key for answer in answers}) == len(answers) == len(saved)
        for answer, one in zip(answers, saved):
            written = answer.to_json()
            known = {name: value for name, value in one.items() if name in written and value is not None}
            assert all(same(written[name], value) for name, value in known.items())
            assert finite(answer.score)

    fuzz(path.read_bytes(), check)


def test_run_json(tmp_path: Path, fuzz: Callable) -> None:
    saved = {"script": "gen_llama.py", "settings": GenSettings(mode=(0, 1), layerk={1: 8}).to_json()}

    def check(data: bytes) -> None:
        (tmp_path / "run.json").write_bytes(data)
        found = settings_from_json(GenSettings, check_resume(str(tmp_path), "gen_llama.py"))
        again = json.loads(json.dumps(found.to_json()))
        for name, value in json.loads(data)["settings"].items():
            if name == "layerk":
                value = {str(int(layer)): k for layer, k in value.items()}
            assert same(again[name], value)
        assert finite(again)

    fuzz(json.dumps(saved, indent=1).encode(), check)


def test_chunks(tmp_path: Path, fuzz: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged chunk is no error: what it held is done again."""
    monkeypatch.setattr(files, "flush", lambda path: None)
    cell = Cell(tmp_path)
    for n in range(3):
        cell.add({str(n): [float(-n), True]}, {}, {})
    cell.checkpoint()
    (path,) = (tmp_path / "partial").iterdir()
    answers = dict(cell.answers)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        again = Cell(tmp_path)
        assert again.answers in ({}, answers)
        if not again.answers:
            assert not path.exists()
            raise UsageError("It was removed, and is computed again.")
        with zipfile.ZipFile(path) as chunk:
            assert json.loads(chunk.read(ANSWERS))["answers"] == again.answers

    fuzz(path.read_bytes(), check)


def test_what_more_inputs_found(tmp_path: Path) -> None:
    """A run without any K, a chunk that is an archive of nothing, a shared calibration that is nested too
    deeply, a letter of a line's beginning within its number, and a word that pandas takes for one."""
    settings = GenSettings(mode=(0, 1)).to_json() | {"k": []}
    (tmp_path / "run.json").write_text(json.dumps({"script": "gen_llama.py", "settings": settings}))
    with pytest.raises(UsageError, match="--k and --mode need at least one value each"):
        settings_from_json(GenSettings, check_resume(str(tmp_path), "gen_llama.py"))
    chunk = tmp_path / "partial" / "00000.zip"
    chunk.parent.mkdir()
    zipfile.ZipFile(chunk, "w").close()
    assert Cell(tmp_path).answers == {} and not chunk.exists()
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="is damaged or not of this format"):
        find_calibration(tmp_path)
    (tmp_path / "layer1.txt").write_text("L1_H0:130 64 prefill 1.05\nL1_H1:130 64 prefill 1.L1\n")
    with pytest.raises(UsageError, match="line 2"):
        read.read_sizes(tmp_path, 1)
    (tmp_path / "sequence_lengths_per_example.csv").write_text("120\ntrue\n")
    with pytest.raises(UsageError, match="line 2"):
        read.read_sequence_lengths(tmp_path)
    header = "layer,phase,n_low,n_high,k,rows,mean,p5,p50,p95\n"
    line = "3,prefill,91,107,64,1530,66.2,31.0,65.0,113.0\n"
    (tmp_path / "effective_k.csv").write_text(header + line)
    frame = read.read_effective_k(tmp_path)
    assert frame is not None and frame["n_high"].tolist() == [107]
    for damaged in (line.replace("107", "true"), line.replace("64", f"6{header.strip()}4")):
        (tmp_path / "effective_k.csv").write_text(header + damaged)
        with pytest.raises(UsageError, match="line 2"):
            read.read_effective_k(tmp_path)


@pytest.mark.parametrize("task", ["arc_easy", "other"])
def test_rows(task: str, fuzz: Callable) -> None:
    rows = [
        {
            "question": f"What is {n}?",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "B",
            "id": n,
        }
        for n in range(3)
    ]

    def check(data: bytes) -> None:
        found = read_rows(data.splitlines(keepends=True), Path("rows.jsonl"), SCHEMAS.get(task))
        assert found == [json.loads(line) for line in data.splitlines() if line.strip()] and finite(found)
        for row in found:
            assert isinstance(row, dict) and (task == "other") <= (row.keys() == found[0].keys())
            assert task == "other" or row["answerKey"] in row["choices"]["label"]

    fuzz("".join(json.dumps(row) + "\n" for row in rows).encode(), check)


def test_kept_counts(tmp_path: Path, fuzz: Callable) -> None:
    """What the report reads of a layer."""
    path = tmp_path / "layer1_kept_attn_prefill.csv"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        frame = read.read_kept(tmp_path, 1, "attn", "prefill")
        if frame is not None:
            assert np.isfinite(frame.to_numpy()).all() and (frame.to_numpy() >= 0).all()
            assert (frame["layer"] == 1).all() and frame.shape[1] == 5

    fuzz(b"".join(b"1,%d,100,60.5,100\n" % head for head in range(4)), check)


def test_a_calibration_under_way(tiny_model: Any, tmp_path: Path, fuzz: Callable) -> None:
    from tests.helpers.calibration import prompts
    from topk_llama import set_params, update_model
    from toptheta.eval.checkpoint import Checkpoint
    from toptheta.models.calibrate import calibrations

    update_model(tiny_model)
    set_params(tiny_model, mode=0, K=6, sdc="offline-calibrated", calibrate=True)
    saved = Checkpoint(tmp_path, tiny_model)
    with saved.counting(["one"]):
        tiny_model(prompts(1)[0])
    saved.save()

    def check(data: bytes) -> None:
        saved.path.write_bytes(data)
        checkpoint = Checkpoint(tmp_path, tiny_model)
        checkpoint.load()
        state = tensors.load(data)
        assert checkpoint.done == set(bytes(state["done"]).decode().split())
        for layer, one in calibrations(tiny_model).items():
            for name, value in one.state().items():
                if name != "generator":  # which takes what it is given, but for some bits
                    np.testing.assert_array_equal(value.numpy(), state[f"{layer}/{name}"])

    fuzz(saved.path.read_bytes(), check, share=20)  # large: most damages are of its numbers


def test_calibration_samples(tmp_path: Path, fuzz: Callable) -> None:
    samples = {
        layer: (np.array([7, 9, 9], np.int32), np.array([[0.5, -1.0], [2.0, 3.0], [1.0, 0.0]], np.float32))
        for layer in (0, 2)
    }
    write_calibration_samples(tmp_path, samples)
    path = tmp_path / SAMPLES_NAME

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found, arrays = read_calibration_samples(tmp_path), tensors.load(data)
        assert {f"{layer}.n" for layer in found} == {name for name in arrays if name.endswith(".n")}
        for layer, (n, values) in found.items():
            np.testing.assert_array_equal(n, arrays[f"{layer}.n"])
            np.testing.assert_array_equal(values, arrays[f"{layer}.values"])
            assert (n >= 1).all() and np.isfinite(values).all() and len(n) == len(values)

    fuzz(path.read_bytes(), check)


def test_a_shared_calibration(tmp_path: Path, fuzz: Callable) -> None:
    tables = some_tables()
    params = used(AttentionParams().changed({"method": "top_theta", "K": [6, 0, 6], "sdc": "exact"}), 3)
    sizes = {"num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    config = CalibrationConfig(FORMAT, "owner/model", "abc", "llama", **sizes, params=params, rows=8)
    Calibration(tables, config).save(tmp_path)
    path = tmp_path / "config.json"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = asdict(find_calibration(tmp_path).config)
        assert finite(found)
        for name, value in json.loads(data).items():
            assert name not in found or same(found[name], value)

    fuzz(path.read_bytes(), check)


EFFECTIVE = "layer,phase,n_low,n_high,k,rows,mean,p5,p50,p95\n"
OF_REPORTS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "layer1.txt": ("L1_H{}:130 64 prefill 1.05\n", lambda folder: read.read_sizes(folder, 1)),
    "layer1_kept_vrow_prefill.csv": (
        "1,{},100,60.5,100\n",
        lambda folder: read.read_kept(folder, 1, "vrow", "prefill"),
    ),
    "effective_k.csv": (
        "{},prefill,91,107,64,1530,66.2,31.0,65.0,113.0\n",
        lambda folder: read.read_effective_k(folder),
    ),
    "sequence_lengths_per_example.csv": ("12{}\n", read.read_sequence_lengths),
    "prompt_completion_lengths_per_sample.csv": ("131 7{}\n", read.read_completion_lengths),
}


@pytest.mark.parametrize("name", OF_REPORTS)
def test_what_reports_read(name: str, tmp_path: Path, fuzz: Callable) -> None:
    line, reader = OF_REPORTS[name]
    good = "".join(line.format(i) for i in range(4))
    header = EFFECTIVE if name.startswith("effective") else ""

    def check(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        frame = reader(tmp_path)
        numbers = re.findall(rb"[\d.]+(?:[eE][+-]?\d+)?", data.replace(header.strip().encode(), b""))
        if frame is None:
            assert not numbers
            return
        if "total" in frame:
            frame = frame.drop(columns="total")
        found = frame.select_dtypes("number").to_numpy(float)
        assert np.isfinite(found).all() and (found >= 0).all()
        np.testing.assert_array_equal(found.ravel(), np.array(numbers, float))

    fuzz((header + good).encode(), check)


def test_popularities(tmp_path: Path, fuzz: Callable) -> None:
    def check(data: bytes) -> None:
        (tmp_path / "layer1_kept_vrow_popularities_prefill.txt").write_bytes(data)
        found = read.read_popularities(tmp_path, 1, "prefill") or {}
        lines = [line for line in data.decode("latin-1").splitlines() if line.strip()]
        assert len(lines) == sum(map(len, found.values()))
        for line in lines:
            group, n, counts = re.fullmatch(r"\s*1,(\d+),(\d+),\[(.*)\]\s*", line).groups()  # type: ignore[union-attr]
            first = found[int(group)].pop(0)
            assert first.tolist() == [float(one) for one in counts.split(",")] and len(first) == int(n)
            assert np.isfinite(first).all()

    fuzz(b"".join(b"1,%d,3,[3, 0, 1]\n" % (i % 2) for i in range(4)), check)


def test_outcomes_of_programs(tmp_path: Path, fuzz: Callable) -> None:
    rows = [{"task_id": f"HumanEval/{i}", "passed": i > 0, "result": "passed", "x": [1]} for i in range(3)]

    def check(data: bytes) -> None:
        (tmp_path / "samples.jsonl_results.jsonl").write_bytes(data)
        frame = read.read_outcomes(tmp_path)
        lines = data.decode("utf-8", "replace").split("\n")
        saved = [json.loads(line) for line in lines if line.strip()]
        assert (frame is None) == (not saved)
        if frame is not None:
            wanted = [[one["task_id"], one["passed"], one.get("result", "")] for one in saved]
            assert frame.to_numpy().tolist() == wanted

    fuzz("".join(json.dumps(row) + "\n" for row in rows).encode(), check)


def test_completions(tmp_path: Path, fuzz: Callable) -> None:
    path = tmp_path / "samples.jsonl"
    rows = [{"task_id": f"HumanEval/{i // 2}", "completion": "    return 1\n"} for i in range(4)]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        samples, _ = score._samples(path)
        assert samples == [json.loads(line) for line in data.splitlines() if line.strip()]
        assert all(isinstance(sample[name], str) for sample in samples for name in rows[0])

    fuzz("".join(json.dumps(row) + "\n" for row in rows).encode(), check)


def test_texts_of_rows(tmp_path: Path, fuzz: Callable) -> None:
    path = tmp_path / "rows.jsonl"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        text = text_of(str(path), "--text")
        rows = [json.loads(line) for line in re.split(r"\r\n|\r|\n", data.decode()) if line.strip()]
        assert text == "\n\n".join(row["context"] for row in rows)

    rows = [{"context": "Once\u2028upon a time", "length": i} for i in range(3)]
    fuzz("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), check)


def test_results_of_tables(tmp_path: Path, fuzz: Callable) -> None:
    path = tmp_path / "summary.json"
    results = [CellResult(f"Top-k K={k}", "tiny", task, k=k) for k in (8, 16) for task in ("a", "b")]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        tasks = read.read_results_by_task(path)
        saved = json.loads(data)
        assert isinstance(saved, list)
        for task, found in tasks.items():
            of_task = [one for one in saved if one.get("task", "") == task]
            assert [one.method for one in found] == [one["method"] for one in of_task]
            assert all(finite(one.to_json()) for one in found)

    fuzz(json.dumps([result.to_json() for result in results], indent=1).encode(), check)


def test_configs(tmp_path: Path, fuzz: Callable) -> None:
    config = {"num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "settings": {"placement": "pre-softmax"}}

    def check(data: bytes) -> None:
        (tmp_path / "config.json").write_bytes(data)
        found = read.read_config(tmp_path)
        assert same(found, json.loads(data)) and finite(found)
        assert all(value >= 0 for name, value in found.items() if name in config and "num" in name)

    fuzz(json.dumps(config, indent=1).encode(), check)


def test_files_of_tables(tmp_path: Path, fuzz: Callable) -> None:
    import gen_llama

    text = tmp_path / "t.txt"
    text.write_text("A text.")
    flags = {"text": str(text), "max_seq_len": 128, "num_tasks": 3}
    part = {"script": "gen_llama.py", "tasks": ["perplexity"], "group": "all", "flags": flags}
    tables = {
        "methods": {"dense": {"mode": 3}, "Top-theta": {"mode": 0, "sdc": "exact", "vmc": True}},
        "groups": {"all": [{"methods": ["dense", "Top-theta"], "k": [16, 64]}]},
        "tables": {"one": {"title": "A table", "flags": {"llama": "smollm2"}, "parts": [part]}},
    }
    path, options = tmp_path / "tables.json", SweepOptions()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found, saved = table_cells.read_tables(path), json.loads(data)
        for name, table in found["tables"].items():
            cells = table_cells.plan(table, found, options, {"gen_llama.py": gen_llama.make_parser})
            assert table["title"] == saved["tables"][name]["title"]
            assert {cell.script for cell in cells} <= {"gen_llama.py"}

    fuzz(json.dumps(tables, indent=1).encode(), check)


def test_profiles(tmp_path: Path, fuzz: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path))
    kind = profile.Kind("decode", 4, 64, "bfloat16")
    entries = [profile.Entry(kind, "scores", 8, n, kept, 0.5) for n in (1024, 4096) for kept in (0.1, 1.0)]
    key = {"gpu": "a GPU"}
    path = profile.save(profile.Profile(key, {"decode": {"keys": 64}}, entries, {"seconds": 2}))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = profile.load(key)
        if found is not None:
            assert finite(asdict(found)) and same(asdict(found)["entries"], json.loads(data)["entries"])

    fuzz(path.read_bytes(), check)
