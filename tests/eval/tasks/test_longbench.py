"""LongBench end to end on a small folder model: rows, truncation, the chat template, ROUGE."""

import json
import zipfile
from pathlib import Path

import pytest

from tests.eval.helpers import gen_settings, only_run
from toptheta.util.errors import UsageError


def longbench_rows(folder: Path, counts: dict[str, int]) -> None:
    folder.mkdir(parents=True)
    for split, count in counts.items():
        rows = [
            {
                "input": f"What was said about {{topic}} {i}?",
                "context": f"Start {i}. " + "Ann: We should talk about it . Ben: Yes .\n" * 60 + f"End {i}.",
                "answers": [f"They talked about topic {i}."],
                "_id": f"{split}{i}",
            }
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_longbench(folder_model: str, here_with_text: Path, small_tokenizer) -> None:
    """Truncation in the middle, calibration on other rows, predictions and score."""
    from toptheta.eval.runner import evaluate
    from toptheta.eval.tasks.longbench import LongBenchJob

    longbench_rows(here_with_text / "data" / "longbench_qmsum", {"test": 3, "train": 4})
    base = gen_settings(
        folder_model,
        dataset="longbench_qmsum",
        data_dir="data",
        max_new_tokens=12,
        max_seq_len=320,
        mode=(0, 3),
    )
    job = LongBenchJob(base, small_tokenizer)
    assert [item.key for item in job.items] == ["test0", "test1", "test2"] and len(job.calibration) == 2
    for i, item in enumerate(job.items):
        assert 300 <= len(item.ids) <= 308
        text = small_tokenizer.decode(item.ids)
        assert text.startswith("You are given a meeting transcript") and f"Start {i}." in text
        assert text.endswith(f"\nQuery: What was said about {{topic}} {i}?\nAnswer:") and f"End {i}." in text
    results = evaluate(base)
    assert [r.metrics["rouge_l"].count for r in results] == [3, 3]
    run = only_run(here_with_text / "products")
    lines = [json.loads(s) for s in (run / "mode3" / "predictions.jsonl").read_text().splitlines()]
    assert {"key", "reply", "answers", "rouge_l", "prompt_tokens", "reply_tokens"} <= set(lines[0])
    together = evaluate(
        gen_settings(
            folder_model, dataset="longbench_qmsum", data_dir="data", max_new_tokens=12, max_seq_len=320,
            mode=(3,), batch_size=3, prefill_chunk=None, output_dir="together",
        )
    )  # fmt: skip
    assert together[0].metrics["rouge_l"] == pytest.approx(results[1].metrics["rouge_l"])


def test_longbench_chat(here_with_text: Path, small_tokenizer) -> None:
    """The template stays whole around a prompt that was cut, and both fit together."""
    from toptheta.eval.tasks.longbench import LongBenchJob

    longbench_rows(here_with_text / "data" / "longbench_qmsum", {"test": 3, "train": 1})
    base = gen_settings("smollm2", dataset="longbench_qmsum", data_dir="data", apply_chat_template=True,
                    max_new_tokens=12, max_seq_len=320, calib_samples=None)  # fmt: skip
    ids = LongBenchJob(base, small_tokenizer).items[0].ids
    text = small_tokenizer.decode(ids)
    assert 295 <= len(ids) <= 308 and text.startswith("<|im_start|>") and text.endswith("assistant\n")


def test_rouge_is_longbench_s() -> None:
    """As `Rouge().get_scores([p], [r], avg=True)["rouge-l"]["f"]`, the best reference, 0 for no words."""
    from rouge import Rouge

    from toptheta.eval.tasks.longbench import rouge_l

    texts = ("the cat sat on the mat", "a dog ran. the cat sat", "nothing alike")
    expected = [Rouge().get_scores([texts[0]], [text], avg=True)["rouge-l"]["f"] for text in texts]
    assert [rouge_l(texts[0], [text]) for text in texts] == expected
    assert rouge_l(texts[0], list(texts[1:])) == max(expected[1:]) > 0.3
    assert rouge_l("", [texts[0]]) == rouge_l("...", [texts[0]]) == 0.0
    words = [f"w{i}" for i in range(900)]
    assert rouge_l(" ".join(words), [" ".join(words[::2])]) == pytest.approx(2 / 3, rel=1e-6)


def test_longbench_from_the_hub(
    here_with_text: Path, small_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's zip file; without train rows the first rows calibrate and are not evaluated."""
    import huggingface_hub

    from toptheta.eval.tasks import longbench

    longbench_rows(here_with_text / "rows", {"test": 23})
    with zipfile.ZipFile("data.zip", "w") as archive:
        archive.write("rows/test.jsonl", "data/gov_report.jsonl")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: "data.zip")
    base = gen_settings("smollm2", dataset="longbench_gov_report", max_seq_len=1024, calib_samples=None)
    job = longbench.LongBenchJob(base, small_tokenizer)
    assert [item.key for item in job.items] == ["test20", "test21", "test22"] and len(job.calibration) == 20
    with pytest.raises(UsageError, match=r"data.zip has no data/qmsum.jsonl"):
        longbench.load_rows("longbench_qmsum", None)


def test_local_longbench(local_data: Path, small_tokenizer) -> None:
    from toptheta.eval.tasks.longbench import LongBenchJob

    for name, test, train in (("longbench_qmsum", 10, 6), ("longbench_gov_report", 5, 3)):
        job = LongBenchJob(
            gen_settings(
                "smollm2", dataset=name, data_dir=str(local_data), max_seq_len=8192, calib_samples=None
            ),
            small_tokenizer,
        )
        assert (len(job.items), len(job.calibration)) == (test, train)
        assert max(len(item.ids) for item in job.items) <= 8192 - 512
