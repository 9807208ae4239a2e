"""Effective K: single rows counted by every path, histograms against raw counts, the jobs and their files."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from tests.conftest import tiny_config
from tests.eval.test_cli import parse
from tests.helpers import reference
from tests.kernels.cpu.test_attend import KINDS, K, case, inputs, needs_kernel, tables
from topk_llama import set_params, update_model
from toptheta.attention import effective_k as effective
from toptheta.attention.reference import LayerSpec, sparse_attention
from toptheta.attention.rows import Rows
from toptheta.eval.cell import Cell
from toptheta.eval.settings import GenSettings, QASettings
from toptheta.kernels import registry as kernels
from toptheta.kernels.cpu import backend as cpu
from toptheta.models.control import record_statistics
from toptheta.models.recorder import DECODE, PREFILL, LayerRecord, Recorder
from toptheta.report import tables as report
from toptheta.report.plots import read
from toptheta.report.plots.flags import check_request, plot_parser
from toptheta.report.plots.report import draw_report
from toptheta.report.plots.thresholds import FIGURES, INPUTS
from toptheta.util.errors import UsageError

HEADS, SCALE = (4, 2, 16), 0.25


def slow_counts(q, k, v, rows: Rows, spec: LayerSpec, theta) -> torch.Tensor:
    """`[B, H, Q]` kept elements by the loops of tests/reference.py, 0 in padding rows."""
    batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2]
    end = rows.end(q_len, kv_len)
    visible = rows.visible(0, q_len, kv_len)
    seen = torch.zeros(batch, q_len, kv_len, dtype=torch.bool)
    seen[:, :, :end] = True if visible is None else visible[:, 0]
    kept = reference.attention(q, k, v, seen, spec, SCALE, theta)[1].sum(dim=-1)
    return kept if rows.real is None else kept * rows.real[:, None]


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_counted_alike_by_kernel_plain_path_and_loops(kind: str) -> None:
    torch.manual_seed(0)
    rows, batch, q_len, kv_len = case(kind)
    q, k, v = inputs(batch, HEADS, q_len, kv_len)
    capped = LayerSpec(0, "pre-softmax", K, "exact", vmc=True, capk=True)
    for spec in (LayerSpec(0, "pre-softmax", K), LayerSpec(0, "post-softmax", K), capped):
        theta = (0.5 * tables(spec, HEADS[0], kv_len)[0]).clamp(max=50.0)  # the loops compute exp(theta)
        plain = sparse_attention(q, k, v, rows, spec, SCALE, theta, count=True, count_rows=True)[1]
        fast = cpu.attend(q, k, v, rows, spec, SCALE, theta, count=True, count_rows=True)[1]
        slow = slow_counts(q, k, v, rows, spec, theta)
        assert slow.max() > 1 and plain.row.dtype == fast.row.dtype == torch.int32
        assert torch.equal(plain.row.long(), slow) and torch.equal(fast.row.long(), slow), spec
        assert torch.equal(slow.sum(dim=-1), plain.attn)
        for attend in (sparse_attention, cpu.attend):
            assert attend(q, k, v, rows, spec, SCALE, theta, count=True)[1].row is None

        recorder = Recorder(HEADS[0], effective_k=True)
        recorder.phase = PREFILL
        recorder.add(0, rows, K, plain, (batch, *HEADS[:2], kv_len))
        histogram = recorder.drain()[0][0].histogram
        n = rows.n if rows.real is None else rows.n * rows.real
        n = n.expand(batch, -1)[:, None].expand_as(slow)
        raw = [(int(a), int(b)) for a, b in zip(n.flatten(), slow.flatten()) if a > K]
        expected = np.zeros_like(histogram)
        for length, kept in raw:
            i = max(i for i, edge in enumerate(effective.LENGTH_EDGES) if edge <= length)
            j = max(j for j, edge in enumerate(effective.KEPT_EDGES) if edge <= kept)
            expected[i, j] += 1
            expected[i, -1] += kept
        assert raw and (histogram == expected).all()


def histogram_of(kept: np.ndarray, n: np.ndarray) -> np.ndarray:
    histogram = effective.empty_histogram()
    effective.count_rows(
        histogram, torch.from_numpy(kept)[None, None], torch.from_numpy(n)[None], torch.ones(1, len(n)) > 0
    )
    return histogram.numpy()


@pytest.mark.parametrize("scale", [20, 64, 900, 100_000])
def test_percentiles_are_within_the_stated_error(scale: int) -> None:
    rng = np.random.default_rng(scale)
    kept = rng.lognormal(np.log(scale), 0.7, size=7001).astype(np.int64).clip(1, 2**20)
    n = kept + rng.integers(0, 3 * scale, size=len(kept))
    histogram = histogram_of(kept, n)
    for low, high, part in [
        (0, effective.LONGEST, histogram.sum(axis=0)),
        *zip(effective.LENGTH_EDGES, [*effective.LENGTH_EDGES[1:], effective.LONGEST], histogram),
    ]:
        raw = kept[(n >= low) & (n < high)]
        if not len(raw):
            assert not part.any()
            continue
        found = effective.summary(part)
        assert found["rows"] == len(raw) and found["mean"] == raw.sum() / len(raw)
        for percent in effective.PERCENTS:
            exact = np.percentile(raw, percent, method="inverted_cdf")
            error = abs(found[f"p{percent}"] - exact)
            assert error <= (exact * effective.RELATIVE_ERROR if exact >= 64 else 0.0)


def test_every_count_has_a_bin_within_the_stated_error() -> None:
    counts = np.concatenate([np.arange(1, 70_000), [2**20 - 1]])
    for kept in np.array_split(counts, 500):
        found = effective.summary(histogram_of(kept, kept).sum(axis=0))
        assert found["rows"] == len(kept)
    at = np.searchsorted(effective.KEPT_EDGES, counts, side="right") - 1
    assert (np.abs(effective._MIDDLES[at] - counts)[:-1] <= counts[:-1] / 64).all()
    assert (effective._MIDDLES[at][counts < 64] == counts[counts < 64]).all()


@pytest.mark.usefixtures("path")
def test_chunks_answers_and_decode_count_every_row_once(tiny_model: LlamaForCausalLM) -> None:
    """One prefill, one in chunks with padding (a chunk of a single row too), and decode see the same rows."""
    update_model(tiny_model)
    set_params(tiny_model, mode=0, K=6, calibrate=True, calib_sample_frac=1.0)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    tiny_model(ids)
    set_params(tiny_model, calibrate=False)
    recorder = Recorder(6, effective_k=True)
    record_statistics(tiny_model, recorder)
    tiny_model(ids)
    whole = {layer: record.histogram for layer, record in recorder.drain()[0].items()}
    assert [int(h[:, :-1].sum()) for h in whole.values()] == [2 * 6 * 34] * 3

    cache, recorder.phase = DynamicCache(config=tiny_model.config), PREFILL
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[2] = 0
    mask[2, -1] = 1  # a sequence of one token: no row of it is longer than K
    padded = torch.cat([ids, ids[:1]])
    at = 0
    for chunk in padded.split([20, 19, 1], dim=1):
        at += chunk.shape[1]
        tiny_model(chunk, past_key_values=cache, attention_mask=mask[:, :at])
    parts = recorder.drain()[0]
    assert all((parts[layer].histogram == whole[layer]).all() for layer in whole)

    recorder.phase = None
    cache = DynamicCache(config=tiny_model.config)
    tiny_model(ids[:, :6], past_key_values=cache)
    for at in range(6, 40):
        tiny_model(ids[:, at : at + 1], past_key_values=cache)
    prefill, decode = recorder.drain()
    assert not prefill[0].histogram.any()
    assert sum(int(step.attn.sum()) for step in decode[2]) == whole[2][:, -1].sum()

    asked = []
    attend = kernels.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "attend", lambda *a, **b: asked.append(b["count_rows"]) or attend(*a, **b))
        record_statistics(tiny_model, Recorder(6))
        tiny_model(ids)
        record_statistics(tiny_model, None)
        tiny_model(ids)
    assert asked == [False] * 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--effective_k", "--effective_k judges thresholds: use it with --mode 0"),
        ("--effective_k --mode 1,3", "--effective_k judges thresholds: use it with --mode 0"),
        ("--effective_k --mode 0 --placement none", "--effective_k judges thresholds"),
        ("--effective_k --mode 0 --no_statistics", "--effective_k needs statistics: leave out --no_stat"),
        ("--effective_k --mode 0 --calibrate_only", "--effective_k needs an evaluation"),
    ],
)
def test_flags_that_make_no_sense(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(flags)
    assert parse("--effective_k --mode 0,3").effective_k and not parse("--mode 0").effective_k


# ---- The jobs ----


@pytest.fixture(scope="module")
def folder_model(tmp_path_factory, small_tokenizer) -> str:
    """A random two-layer model with the real tokenizer, as a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 2048, "eos_token_id": 2}
    LlamaForCausalLM(tiny_config(vocab_size=len(small_tokenizer), **sizes)).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return str(folder)


def rows_of_csv(folder: Path) -> list[dict]:
    with open(folder / "effective_k.csv") as file:
        rows = [{x: y if x == "phase" else float(y) for x, y in row.items()} for row in csv.DictReader(file)]
    assert all(tuple(row) == effective.COLUMNS for row in rows)
    return rows


def kept_lines(folder: Path, layer: int, phase: str) -> np.ndarray:
    with gzip.open(folder / f"layer{layer}_kept_attn_{phase}.csv.gz", "rt") as file:
        return np.loadtxt(file, delimiter=",", dtype=int)


def test_generation(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Counts agree with the other statistics of the same run: batches of unlike lengths, some done early."""
    from toptheta.eval.generate import run_generation

    monkeypatch.chdir(tmp_path)
    limits = {"num_tasks": 3, "max_seq_len": 230, "batch_size": 3, "calib_samples": 2}
    settings = GenSettings(
        llama=folder_model, mode=(0, 1), k=(40,), layerk={1: 24}, calib_sample_frac=1.0, device="cpu",
        effective_k=True, **limits,
    )  # fmt: skip
    results = run_generation(settings)
    run = next(tmp_path.joinpath("products").iterdir())
    assert "effective_k" not in results[1] and not (run / "mode1_k40" / "effective_k.csv").exists()
    cell = run / "mode0_k40"
    assert not (cell / "effective_k.npz").exists() and not (cell / "partial").exists()
    rows = rows_of_csv(cell)
    told = results[0]["effective_k"]
    assert json.loads((cell / "results.json").read_text())["effective_k"] == told
    assert [(one["phase"], one["k"]) for one in told] == [
        (PREFILL, 24),
        (PREFILL, 40),
        (DECODE, 24),
        (DECODE, 40),
    ]
    for layer, k in ((0, 40), (1, 24)):
        prefill = [row for row in rows if row["layer"] == layer and row["phase"] == PREFILL]
        lines = kept_lines(cell, layer, PREFILL)
        assert sum(row["rows"] for row in prefill) == (lines[:, 2] - k).sum()
        kept = sum(row["rows"] * row["mean"] for row in prefill)
        assert kept + len(lines) * k * (k + 1) // 2 == pytest.approx(lines[:, 3].sum())

        decode = [row for row in rows if row["layer"] == layer and row["phase"] == DECODE]
        lines = kept_lines(cell, layer, DECODE)
        assert len(decode) > 2 and sum(row["rows"] for row in decode) == len(lines)
        for row in decode:
            raw = lines[(lines[:, 2] >= row["n_low"]) & (lines[:, 2] <= row["n_high"])][:, 3]
            assert row["rows"] == len(raw) and row["mean"] == pytest.approx(raw.mean()) and row["k"] == k
            for percent in effective.PERCENTS:
                exact = np.percentile(raw, percent, method="inverted_cdf")
                assert row[f"p{percent}"] == pytest.approx(exact, rel=effective.RELATIVE_ERROR)
    text = (run / "summary.md").read_text()
    assert "farthest layers" in text and "farthest layers" in capsys.readouterr().out


def test_resume_adds_up(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of a batch's model calls and resumed, with a partial folder for each batch."""
    from toptheta.eval import cell as products
    from toptheta.eval import lm_eval_model as harness
    from toptheta.eval.tasks.qa import run_qa

    def settings(output: str) -> QASettings:
        return QASettings(
            llama=folder_model, mode=(0,), k=(16,), calib_tac=True, calib_sample_frac=1.0, calib_samples=3,
            num_samples=5, num_fewshot=3, device="cpu", effective_k=True, output_dir=output,
        )  # fmt: skip

    monkeypatch.chdir(tmp_path)
    drain, counted = Recorder.drain, []

    def draining(self):
        prefill, decode = drain(self)
        counted.append(sum(int(record.histogram[:, :-1].sum()) for record in prefill.values()))
        return prefill, decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "drain", draining)
        straight = run_qa(settings("straight"))
    score, calls = harness.TopThetaLM._score, []

    def scoring(self, batch):
        calls.append(1)
        found = score(self, batch)  # its rows are counted, but must not be kept: it will run again
        if len(calls) == 6:  # three calibrate
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(harness.TopThetaLM, "_score", scoring)
    monkeypatch.setattr(products, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_qa(settings("stopped"))
    stopped = next(tmp_path.joinpath("stopped").iterdir())
    assert len(list(stopped.glob("partial/*/effective_k.npz"))) == 2
    resumed = run_qa(settings("stopped"), resume=str(stopped))
    one = next(tmp_path.joinpath("straight").iterdir())
    assert (one / "effective_k.csv").read_text() == (stopped / "effective_k.csv").read_text()
    assert len(counted) == 5 and min(counted) > 0
    assert sum(row["rows"] for row in rows_of_csv(one)) == sum(counted)
    assert resumed[0]["effective_k"] == straight[0]["effective_k"] and len(rows_of_csv(one)) > 4
    assert {row["phase"] for row in rows_of_csv(one)} == {PREFILL}


def test_the_summary_names_the_farthest_layers() -> None:
    rng = np.random.default_rng(0)
    n, spreads = np.full(500, 1000), (0.05, 0.9, 0.3, 0.6, 0.1)
    histograms = {
        layer: histogram_of(np.exp(np.log(64) + width * rng.normal(size=500)).astype(np.int64), n)
        for layer, width in enumerate(spreads)
    }
    result = {"method": "Top-theta", "effective_k": effective.overall(histograms, PREFILL, (64,) * 5)}
    text = report.effective_k([result, {"method": "dense"}])
    line = text.splitlines()[-1]
    assert len(text.splitlines()) == 3 and "| prefill | 64 | 2500 |" in line
    assert line.index(" 1: ") < line.index(", 3: ") < line.index(", 2: ") and ", 4: " not in line
    assert "no evaluated row was longer" in report.effective_k([{"method": "Top-theta", "effective_k": []}])


# ---- The picture ----


def finished_cell(folder: Path, layers: int = 3, top: int = 900) -> Path:
    """A finished cell's folder, as Cell writes it, of rows of up to `top` tokens that keep about 64."""
    rng = np.random.default_rng(0)
    cell = Cell(folder, (64,) * layers, effective_k=True)
    n = rng.integers(65, top, size=3000)
    records = {
        layer: LayerRecord(
            *[np.ones((1, 1), int)] * 2,
            *[np.ones(1, int)] * 3,
            histogram=histogram_of(np.minimum(n, 64 + rng.integers(-40, 90, size=len(n))), n),
        )
        for layer in range(layers)
    }
    cell.add({"answer": 1}, records, {})
    cell.finish({"method": "Top-theta K=64"})
    config = {"num_layers": layers, "num_heads": 1, "model": "Tiny", "method": "Top-theta K=64"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plot(folder: Path, capsys: pytest.CaptureFixture, *flags: str) -> tuple[str, str]:
    """What plot_th_llama.py prints, with exit code 0: standard output and errors."""
    arguments = plot_parser("").parse_args(["-d", str(folder), "-t", "t", *flags])
    assert draw_report(check_request(arguments), FIGURES, INPUTS) == 0
    return capsys.readouterr()


def test_the_picture_is_drawn_and_the_table_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = finished_cell(tmp_path / "cell")
    frame = read.read_effective_k(folder)
    assert frame is not None and frame.to_dict("records") == rows_of_csv(folder)
    out, err = plot(folder, capsys, "--format", "svg", "--layer-ids", "0,2")
    assert str(folder / "effective_k.svg") in out.splitlines() and "effective_k" not in err
    svg = (folder / "effective_k.svg").read_text()
    assert "layer 0, K = 64" in svg and "layer 2, K = 64" in svg and "layer 1, K" not in svg
    assert "by layer, all row lengths" in svg

    (folder / "results.json").unlink()
    _, err = plot(folder, capsys)
    assert (folder / "effective_k.png").is_file() and "results.json is missing or empty" in err


def test_a_table_that_is_empty_or_damaged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = finished_cell(tmp_path / "cell")
    (folder / "sequence_lengths_per_example.csv").write_text("900\n")
    text = (folder / "effective_k.csv").read_text()
    lines = text.splitlines(keepends=True)
    (folder / "effective_k.csv").write_text(lines[0])
    assert read.read_effective_k(folder) is None
    _, err = plot(folder, capsys)
    assert "effective_k.csv is missing or empty" in err and "writes it with --effective_k" in err
    assert not (folder / "effective_k.png").exists()
    lines[3] = "0,warmup,91,107,64,5,66.0,31.0,65.0,113.0\n"
    (folder / "effective_k.csv").write_text("".join(lines))
    with pytest.raises(UsageError, match=r"effective_k\.csv, line 4: '0,warmup"):
        read.read_effective_k(folder)
