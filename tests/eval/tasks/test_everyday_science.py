"""The bundled questions: format, balance, no repeats."""

import json
from collections import Counter

import pytest

from tests.helpers.paths import ROOT

FOLDER = ROOT / "toptheta" / "eval" / "tasks" / "everyday_science"


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows(split: str) -> None:
    found = rows(split)
    assert len(found) == 100 and len({row["id"] for row in found}) == 100
    longest = 0
    for row in found:
        assert set(row) == {"id", "question", "choices", "answerKey"}
        texts = row["choices"]["text"]
        assert row["choices"]["label"] == ["A", "B", "C", "D"] and len({t.lower() for t in texts}) == 4, row[
            "id"
        ]
        assert 4 <= len(row["question"].split()) <= 35 and row["question"][-1] == "?", row["id"]
        assert not any("of the above" in text.lower() or not text.strip() for text in texts)
        right = texts["ABCD".index(row["answerKey"])]
        longest += all(len(right) > len(text) for text in texts if text != right)
    assert Counter(row["answerKey"] for row in found) == dict.fromkeys("ABCD", 25)
    assert longest <= 40  # else "take the longest" would be a good guess


def test_no_question_twice() -> None:
    questions = [
        " ".join(row["question"].lower().split()) for split in ("train", "test") for row in rows(split)
    ]
    assert len(set(questions)) == 200


def test_prompt_length(small_tokenizer) -> None:
    """25 examples make about 1,000 tokens, so that K = 64 leaves out most keys."""
    shots = [
        f"Question: {row['question']}\nChoices: {'; '.join(row['choices']['text'])}\n"
        f"Answer: {row['choices']['text']['ABCD'.index(row['answerKey'])]}"
        for row in rows("train")[:25]
    ]
    assert 850 < len(small_tokenizer("\n\n".join(shots)).input_ids) < 1150
