"""gen_llama.py's data sets and their flags: which flag serves which data set, checked before anything is
loaded."""

import argparse
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from toptheta.util.errors import UsageError

HUMANEVAL = "openai_humaneval"
LONGBENCH = ("longbench_qmsum", "longbench_gov_report")
PERPLEXITY, NEEDLE = "perplexity", "needle"
DATASETS = (HUMANEVAL, *LONGBENCH, PERPLEXITY, NEEDLE)
TEXT_JOBS = (HUMANEVAL, *LONGBENCH, NEEDLE)  # those that show the model a prompt and read its reply

# What each flag serves; flags that all data sets take are not here.
SERVES: dict[str, tuple[str, ...]] = {
    "data_dir": LONGBENCH,
    "max_new_tokens": LONGBENCH,
    "text": (PERPLEXITY, NEEDLE),
    "needle_lengths": (NEEDLE,),
    "needle_depths": (NEEDLE,),
    "needle_repeats": (NEEDLE,),
    "num_tasks": (HUMANEVAL, *LONGBENCH, PERPLEXITY),
    "num_samples_per_task": (HUMANEVAL,),
    "do_sample": (HUMANEVAL,),
    "allow_code_execution": (HUMANEVAL,),
    "prompt_prefix": (HUMANEVAL, *LONGBENCH),
    "prompt_suffix": (HUMANEVAL, *LONGBENCH),
    "apply_chat_template": TEXT_JOBS,
}


def generation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `GenSettings` beyond the shared ones."""
    add = parser.add_argument_group("generation").add_argument
    add("--dataset", default=HUMANEVAL, help=f"{', '.join(DATASETS)} (default {HUMANEVAL})")
    add("--num_tasks", metavar="N", help="tasks, rows or windows to evaluate (default all)")
    add("--num_samples_per_task", default="1", metavar="N", help="completions per task (default 1)")
    add("--max_seq_len", default="4096", metavar="N", help="tokens of prompt and reply (default 4096)")
    add("--prefill_chunk", metavar="N", help="tokens of a prompt to compute at once (default all)")
    add("--prompt_prefix", default="", metavar="TEXT", help="text before every prompt")
    add("--prompt_suffix", default="", metavar="TEXT", help="text after every prompt")
    add("--do_sample", action="store_true", help="sample tokens (temperature 0.5) instead of greedy choice")
    add("--allow_code_execution", action="store_true", help="run the generated programs, in a sandbox")
    add("--score", metavar="DIR", help="generate nothing: score the completions saved in DIR")
    add = parser.add_argument_group("long context").add_argument
    add("--data_dir", metavar="DIR", help="longbench_*, --calib_task: folder of rows (default: the hub)")
    add("--max_new_tokens", metavar="N", help="longbench_*: tokens of a reply (default LongBench's own, 512)")
    add("--text", metavar="FILE", help="perplexity: the text; needle: the haystack (default: made up)")
    add("--needle_lengths", metavar="N[,N]", help="needle: context lengths (default 512, 1024, ... )")
    add("--needle_depths", metavar="P[,P]", help="needle: depths in %% (default 0,25,50,75,100)")
    add("--needle_repeats", metavar="N", help="needle: needles at each length and depth (default 1)")


def check_generation(settings: Any) -> None:
    """The rules of the data sets, for a `GenSettings`. Raises UsageError."""
    dataset = settings.dataset
    if dataset not in DATASETS:
        near = get_close_matches(dataset, DATASETS, n=2, cutoff=0.4)
        hint = f" (near it: {', '.join(near)})" if near else ""
        raise UsageError(f"--dataset is {dataset!r}: choose one of {', '.join(DATASETS)}{hint}.")
    defaults = type(settings)()
    for flag, served in SERVES.items():
        if flag == "data_dir" and settings.calib_task:
            continue  # the rows of that task
        if dataset not in served and getattr(settings, flag) != getattr(defaults, flag):
            raise UsageError(
                f"--{flag} has no effect on --dataset {dataset}: leave it out, or choose "
                f"{' or '.join(served)}."
            )
    if settings.num_samples_per_task > 1 and not settings.do_sample:
        raise UsageError("--num_samples_per_task above 1 repeats the same greedy answer: add --do_sample.")
    if dataset == PERPLEXITY and not settings.text:
        raise UsageError("--dataset perplexity needs a text: name a file with --text.")
    if settings.text and not Path(settings.text).is_file():
        raise UsageError(f"--text {settings.text}: there is no such file.")
    if settings.data_dir and not Path(settings.data_dir).is_dir():
        raise UsageError(f"--data_dir {settings.data_dir}: there is no such folder.")
    for flag in ("prefill_chunk", "max_new_tokens", "needle_repeats"):
        value = getattr(settings, flag)
        if value is not None and value < 1:
            raise UsageError(f"--{flag} is {value}: give at least 1.")
    if any(not 0 <= depth <= 100 for depth in settings.needle_depths):
        raise UsageError("--needle_depths are percents: give numbers from 0 to 100.")
    for length in settings.needle_lengths:
        if not 128 <= length <= settings.max_seq_len:
            raise UsageError(
                f"--needle_lengths has {length}: give lengths from 128 to --max_seq_len "
                f"({settings.max_seq_len}), or raise that."
            )


def read_text(path: str) -> str:
    """A UTF-8 text file. Raises UsageError when it is none, or empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--text {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"--text {path} is not UTF-8 text: convert it, or name another file.") from None
    if not text.strip():
        raise UsageError(f"--text {path} is empty: name a file with text.")
    return text
