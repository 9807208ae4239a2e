"""Texts and rows from which the long-context tasks cannot be made."""

from pathlib import Path

import pytest

from tests.eval.helpers import gen_settings
from toptheta.util.errors import UsageError


def test_data_that_makes_no_sense(here_with_text: Path, folder_model: str) -> None:
    from toptheta.eval.runner import evaluate

    (here_with_text / "short.txt").write_text("A few words.")
    (here_with_text / "latin.txt").write_bytes("Müller".encode("latin-1"))
    (here_with_text / "bad" / "longbench_qmsum").mkdir(parents=True)
    (here_with_text / "bad" / "longbench_qmsum" / "test.jsonl").write_text('{"input": "x"}\n')
    for changes, message in (
        ({"dataset": "perplexity", "text": "short.txt"}, "fewer than two windows"),
        ({"dataset": "perplexity", "text": "latin.txt"}, "not UTF-8"),
        ({"dataset": "perplexity", "text": "text.txt", "calib_samples": 90}, "leaves none to evaluate"),
        (
            {"dataset": "perplexity", "text": "text.txt", "max_seq_len": 4096},
            "model's context of 2048 tokens",
        ),
        ({"dataset": "needle", "text": "short.txt"}, "fewer than the longest context"),
        (
            {"dataset": "longbench_qmsum", "data_dir": ".", "max_seq_len": 900},
            "has neither longbench_qmsum/test.jsonl",
        ),
        (
            {"dataset": "longbench_qmsum", "data_dir": "bad", "max_seq_len": 900},
            "test.jsonl, line 1: .* missing required field context",
        ),
        ({"dataset": "longbench_qmsum", "data_dir": "bad"}, "leaves -312 tokens"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(gen_settings(folder_model, **changes))
