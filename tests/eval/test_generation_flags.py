"""Flags of the generation tasks that make no sense."""

from pathlib import Path

import pytest

from tests.eval.helpers import gen_settings
from toptheta.eval.cli import settings_from_json
from toptheta.eval.settings import GenSettings
from toptheta.util.errors import UsageError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "needles"}, "did you mean needle"),
        ({"dataset": "perplexity"}, "name a file with --text"),
        ({"dataset": "perplexity", "text": "nowhere.txt"}, "there is no such file"),
        ({"dataset": "perplexity", "text": "text.txt", "do_sample": True}, "--do_sample has no effect"),
        ({"dataset": "longbench_qmsum", "text": "text.txt"}, "--text has no effect"),
        ({"dataset": "longbench_qmsum", "data_dir": "nowhere"}, "no such folder"),
        ({"dataset": "needle", "needle_depths": (50, 101)}, "from 0 to 100"),
        ({"dataset": "needle", "needle_lengths": (256,)}, "--needle_lengths has 256"),
        ({"prefill_chunk": 0}, "--prefill_chunk is 0"),
        ({"needle_repeats": 2}, "--needle_repeats has no effect on --dataset openai_humaneval"),
    ],
)
def test_flags_that_make_no_sense(here_with_text: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_from_json(GenSettings, gen_settings("smollm2", **changes).to_json())
