"""Perplexity end to end on a small folder model: the table by length, chunks, resuming."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.eval.helpers import gen_settings, only_run
from toptheta.eval.cell_params import Chosen, parse_chosen
from toptheta.eval.cli import settings_from_json
from toptheta.eval.rules import check_settings
from toptheta.eval.settings import GenSettings
from toptheta.eval.tasks.perplexity import PerplexityJob
from toptheta.models import divergence
from toptheta.models.loading import find_model, load_tokenizer
from toptheta.report.results import read_answers
from toptheta.util.errors import UsageError


def test_perplexity(folder_model: str, here_with_text: Path, capsys: pytest.CaptureFixture) -> None:
    """The table against the metric, chunks against none, calibration on other windows, a resumed run."""
    from toptheta.eval.runner import evaluate

    base = gen_settings(folder_model, dataset="perplexity", text="text.txt", num_tasks=3, decode_from=0)
    results = evaluate(base)
    printed = capsys.readouterr().out
    assert "| <= 64" in printed and "| Top-theta K=16" in printed and "(n=3)" in printed
    run = only_run(here_with_text / "products")
    for result, folder in zip(results, ("mode0_k16", "mode1_k16", "mode3")):
        rows = list(csv.DictReader((run / folder / "perplexity.csv").open()))
        assert [row["length"] for row in rows] == ["64", "128", "200"]
        tokens = [int(row["tokens"]) for row in rows]
        assert tokens == [3 * 64, 3 * 64, 3 * (199 - 128)]
        mean = sum(float(row["nll"]) * n for row, n in zip(rows, tokens)) / sum(tokens)
        assert result.metrics["ppl"].value == pytest.approx(np.exp(mean))
        assert result.metrics["ppl"].stderr > 0 and result.metrics["ppl"].count == 3
        assert result.kept["generative_decoding"] is None
    kept = [result.kept["prefill"].attn for result in results]
    assert kept[2] == 1.0 and kept[1] < 0.3 and kept[0] < 0.6

    whole = evaluate(
        gen_settings(
            folder_model, dataset="perplexity", text="text.txt", num_tasks=3, mode=(3,), prefill_chunk=None,
            batch_size=2, decode_from=0,
        )
    )  # fmt: skip
    assert whole[0].metrics["ppl"].value == pytest.approx(results[2].metrics["ppl"].value, rel=1e-4)
    again = evaluate(base, resume=str(run))
    assert [r.metrics for r in again] == [r.metrics for r in results]


def test_against_dense(folder_model: str, here_with_text: Path, capsys: pytest.CaptureFixture) -> None:
    """Half of each window is dense and not counted; metrics are those of the answers; a dense cell is 0 away
    from itself."""
    from toptheta.eval.runner import evaluate

    results = evaluate(gen_settings(folder_model, dataset="perplexity", text="text.txt", num_tasks=3))
    printed = capsys.readouterr().out
    assert "| <= 128" in printed and "<= 64" not in printed
    for header in ("KL to dense", "KL 99%", "KL 99.9%", "same top token %", "ln ppl ratio"):
        assert f"| {header}" in printed
    dense = {answer.key: answer for answer in read_answers(str(results[2].folder))}
    for result in results:
        rows = list(csv.DictReader((Path(str(result.folder)) / "perplexity.csv").open()))
        assert [(row["length"], row["tokens"]) for row in rows] == [("128", "84"), ("200", "213")]
        answers = read_answers(str(result.folder))
        for name in ("kl", "same_top", "ln_ppl_ratio"):
            scores = [answer.score[name] for answer in answers]
            metric = result.metrics[name]
            assert metric.value == pytest.approx(np.mean(scores)) and metric.count == 3
            assert metric.stderr == pytest.approx(np.std(scores, ddof=1) / 3**0.5)
        for answer in answers:
            ratio = answer.score["nll"] - dense[answer.key].score["nll"]
            assert answer.score["ln_ppl_ratio"] == pytest.approx(ratio, abs=1e-5)
        quantiles = [result.metrics[name].value for name in ("kl_q99", "kl_q99.9")]
        assert result.metrics["kl_q99"].count == 3 * 99
        if result.dense:
            assert result.metrics["kl"].value == max(quantiles) == 0.0
            assert result.metrics["same_top"].value == 1.0
        else:
            assert 0.0 < result.metrics["kl"].value < quantiles[0] <= quantiles[1]
    full = 3 * sum(range(101, 201))
    assert results[1].kept["prefill"] is None
    assert results[1].kept["generative_decoding"].attn == pytest.approx(3 * 100 * 16 / full)
    assert 0.5 < results[1].kv_bytes["generative_decoding"] < 1.0  # all of K, some of V
    assert results[2].kv_bytes["generative_decoding"] == 1.0


def test_another_text_and_another_type(
    folder_model: str, here_with_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of --calib_text calibrate; the same windows are evaluated as without it. A dense model of
    another type is a judge of its own, and what it reads is read once for all cells."""
    from toptheta.eval.runner import evaluate

    words = (here_with_text / "text.txt").read_text()
    Path("rows.jsonl").write_text("".join(json.dumps({"context": words[i:]}) + "\n" for i in (50, 90)))
    read, once = [], divergence.read_dense
    monkeypatch.setattr(divergence, "read_dense", lambda *rest: read.append(rest[0].dtype) or once(*rest))
    shared = {
        "dataset": "perplexity",
        "text": "text.txt",
        "num_tasks": 2,
        "mode": (0, 3),
    }
    plain = evaluate(gen_settings(folder_model, **shared))
    assert read == [torch.float32] * 2
    settings = gen_settings(
        folder_model, **shared, calib_text="rows.jsonl", dtype="bfloat16", reference_dtype="float32"
    )
    other = evaluate(check_settings(settings))
    assert read == [torch.float32] * 4
    for one, two in zip(plain, other):
        assert [a.hash for a in read_answers(str(one.folder))] == [
            a.hash for a in read_answers(str(two.folder))
        ]
    assert plain[1].metrics["kl"].value == 0.0 < other[1].metrics["kl"].value < 0.1
    thresholds = [(Path(str(one.folder)) / "th.txt").read_text() for one in (plain[0], other[0])]
    assert thresholds[0] != thresholds[1]


def test_shorter_calibration_windows(folder_model: str, here_with_text: Path) -> None:
    """With --calib_seq_len, rows beyond it have no sample; the same windows are evaluated. The time of dense
    attention is that of a window."""
    from toptheta.eval.runner import evaluate

    shared = {
        "dataset": "perplexity",
        "text": "text.txt",
        "num_tasks": 2,
        "mode": (0,),
        "calib_sample_frac": 1.0,
    }
    (whole,) = evaluate(gen_settings(folder_model, **shared))
    (short,) = evaluate(check_settings(gen_settings(folder_model, **shared, calib_seq_len=50)))
    lengths = []
    for one in (whole, short):
        lines = (Path(str(one.folder)) / "th.txt").read_text().splitlines()
        lengths.append(max(int(line.split(":")[1].split()[0]) for line in lines))
    assert lengths == [200, 50]
    assert [a.hash for a in read_answers(str(whole.folder))] == [
        a.hash for a in read_answers(str(short.folder))
    ]
    assert 0.0 < whole.extra["dense_window_s"] < whole.seconds["evaluation"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calib_text": "none.txt"}, "--calib_text none.txt: there is no such file"),
        (
            {"calib_text": "short.txt", "calib_samples": 3},
            "--calib_samples 3: .* short.txt has only",
        ),
        ({"calib_text": "bad.jsonl"}, "bad.jsonl has no LongBench rows"),
        ({"calib_text": "text.txt", "calib_task": "arc_easy"}, "give one of them"),
        ({"calib_seq_len": 64, "calib_task": "arc_easy"}, "--calib_seq_len 64 shortens windows of a text"),
        ({"calib_seq_len": 201}, "--calib_seq_len 201 is more than the windows' 200 tokens"),
        ({"mode": (3,), "method": ("h2o",), "decode_from": 0}, "h2o leaves prompts dense"),
        ({"vrow_popularity": True}, "add --decode_from 0"),
        ({"reference_dtype": "float8"}, "--reference_dtype is 'float8': choose one of"),
    ],
)
def test_bad_input(folder_model: str, here_with_text: Path, changes: dict, words: str) -> None:
    Path("bad.jsonl").write_text('{"question": "no context"}\n')
    words_of_text = Path("text.txt").read_text()
    Path("short.txt").write_text(words_of_text[: len(words_of_text) // 4])
    settings = gen_settings(folder_model, **{"dataset": "perplexity", "text": "text.txt"} | changes)
    with pytest.raises(UsageError, match=words):
        PerplexityJob(check_settings(settings), load_tokenizer(find_model(folder_model)))


def test_runs_of_earlier_versions(folder_model: str, here_with_text: Path) -> None:
    """They counted all tokens, and did not compare."""
    settings = gen_settings(folder_model, dataset="perplexity", text="text.txt")
    saved = {name: value for name, value in settings.to_json().items() if name != "decode_from"}
    earlier = settings_from_json(GenSettings, saved)
    assert settings.decode_from is None and earlier.decode_from == 0
    job = PerplexityJob(earlier, load_tokenizer(find_model(folder_model)))
    answers = [{"key": item.key, "nll": [1.0, 2.0, 3.0], "tokens": [64, 64, 71]} for item in job.items]
    assert set(job.outcome(answers).metrics) == {"ppl"}


@pytest.mark.parametrize(("decode_from", "words"), [(199, "leaves no token"), (-1, "at least 0")])
def test_too_much_left_dense(folder_model: str, here_with_text: Path, decode_from: int, words: str) -> None:
    settings = gen_settings(folder_model, dataset="perplexity", text="text.txt", decode_from=decode_from)
    with pytest.raises(UsageError, match=words):
        check_settings(settings)


def test_methods_with_flags_of_their_own(folder_model: str, here_with_text: Path) -> None:
    """One run of them has the results of a run for each with those flags, and one report for all."""
    from toptheta.eval.runner import evaluate

    published = {"sdc": "exact", "vmc": True, "calib_tac": True}
    budget = {"placement": "post-softmax", "vmc": True, "calib_to": "budget"}
    chosen = {
        "top_k": {"sdc": "exact", "vmc": True},
        "top_theta": published,
        "top_theta:key_copy=int4": budget,
        "streaming_llm:sinks=2": {},
    }
    base = {"dataset": "perplexity", "text": "text.txt", "num_tasks": 2, "mode": (3,), "k": (16,)}
    base |= {"sdc": "none", "vmc": False, "calib_tac": False}
    specs = [Chosen(parse_chosen(name).method, tuple(flags.items())).spec for name, flags in chosen.items()]
    together = evaluate(gen_settings(folder_model, **base, method=tuple(specs)))
    assert len({result.method for result in together}) == len({result.folder for result in together}) == 4
    assert [result.missed_keys is None for result in together] == [True, True, False, True]
    assert 0.0 < together[2].missed_keys < 0.2
    for (name, flags), one in zip(chosen.items(), together):
        settings = gen_settings(folder_model, **base | flags, method=(name,), output_dir="alone")
        (alone,) = evaluate(settings)
        assert one.metrics == alone.metrics and one.kept == alone.kept and one.kv_bytes == alone.kv_bytes
        assert one.missed_keys == alone.missed_keys
        saved, expected = (
            json.loads((Path(str(result.folder)) / "config.json").read_text())["settings"]
            for result in (one, alone)
        )
        assert {name: saved[name] for name in flags} == {name: expected[name] for name in flags}
    page = (only_run(here_with_text / "products") / "report.html").read_text()
    assert all(result.method in page for result in together)


def test_perplexity_resumes(folder_model: str, here_with_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toptheta.eval.runner import evaluate

    base = gen_settings(folder_model, dataset="perplexity", text="text.txt", num_tasks=4, mode=(1,))
    straight = evaluate(base)
    once, calls = divergence.against_dense, []

    def counting(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return once(*arguments)

    monkeypatch.setattr(divergence, "against_dense", counting)
    stopped = gen_settings(
        folder_model, dataset="perplexity", text="text.txt", num_tasks=4, mode=(1,), output_dir="stopped"
    )
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped)
    run = only_run(here_with_text / "stopped")
    assert not (run / "results.json").exists()
    saved = settings_from_json(GenSettings, json.loads((run / "run.json").read_text())["settings"])
    assert saved.needle_depths == base.needle_depths
    resumed = evaluate(saved, resume=str(run))
    assert len(calls) == 5
    assert resumed[0].metrics == straight[0].metrics and resumed[0].kept == straight[0].kept
