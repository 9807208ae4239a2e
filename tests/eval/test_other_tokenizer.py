"""Tokenizers with more tokens than the model has embeddings of."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.eval.helpers import gen_settings, qa_settings
from tests.helpers.families import make
from toptheta.eval import runner
from toptheta.util.errors import UsageError


@pytest.mark.parametrize("dataset", [None, "perplexity", "needle"])
def test_the_tokenizer_of_a_larger_model(
    dataset: str | None, small_tokenizer: Any, here_with_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("llama", vocab_size=200, max_position_embeddings=2048).save_pretrained("small")
    small_tokenizer.save_pretrained("small")
    if dataset is None:
        settings: Any = qa_settings("small", num_samples=2)
    else:
        monkeypatch.delattr(runner, "_load")  # found before the model is loaded
        text = "text.txt" if dataset == "perplexity" else ""
        settings = gen_settings("small", dataset=dataset, text=text, max_seq_len=160, mode=(1,))
    with pytest.raises(UsageError, match=r"tokenizer of small gives token \d+, but the model has only 200"):
        runner.evaluate(settings)


def test_added_tokens_that_no_text_has(
    folder_model: str, small_tokenizer: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many published models have them, for padding: then they are not used."""
    from transformers import AutoTokenizer

    shutil.copytree(folder_model, "padded")
    tokenizer = AutoTokenizer.from_pretrained(folder_model)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert tokenizer.pad_token_id == len(small_tokenizer)
    tokenizer.save_pretrained("padded")
    changes = {"dataset": "needle", "needle_lengths": (160, 200), "needle_depths": (50,), "mode": (1, 3)}
    found = [
        runner.evaluate(gen_settings(model, **changes, batch_size=2, num_tasks=None, output_dir=model[-4:]))
        for model in (folder_model, "padded")
    ]
    assert [one.metrics for one in found[0]] == [one.metrics for one in found[1]]
