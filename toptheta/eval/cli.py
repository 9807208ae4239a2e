"""The scripts' flags, and how a script ends."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from toptheta.eval.settings import DTYPES, AnySettings, check_settings
from toptheta.methods.params import SDC_METHODS
from toptheta.util.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Errors as UsageError: one sentence, no usage dump. Flags are written out: a typo is no abbreviation."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str):
        raise UsageError(f"{message[0].upper()}{message[1:]}; {self.prog} --help lists every flag.")


def shared_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `Settings`, under the published project's names."""
    add = parser.add_argument
    group = parser.add_argument_group("method")
    add = group.add_argument
    add(
        "--mode",
        metavar="M[,M]",
        default="3",
        help="0 Top-theta, 1 Top-k, 3 dense; a list runs each (default 3)",
    )
    add(
        "--k",
        metavar="K[,K]",
        default="256",
        help="attention elements to keep per row; a list runs each (default 256)",
    )
    add(
        "--layerk",
        metavar="L:K[,L:K]",
        default="",
        help="K of single layers, e.g. 0:512,1:512; 0 leaves a layer dense",
    )
    add(
        "--placement",
        default="pre-softmax",
        metavar="WHERE",
        help="pre-softmax (default), post-softmax or none",
    )
    add(
        "--sdc",
        default="none",
        metavar="HOW",
        help=f"softmax denominator compensation: {', '.join(SDC_METHODS)}",
    )
    add(
        "--sdc_scale",
        default="1.0",
        metavar="X",
        help="factor on the compensated part of the denominator (default 1)",
    )
    add(
        "--vmc",
        action="store_true",
        help="V-mean compensation: add the mean V row, weighted by the lost mass",
    )
    add(
        "--capk",
        action="store_true",
        help="Top-theta: of what passes the threshold keep the K most recent only",
    )
    group = parser.add_argument_group("calibration of thresholds")
    add = group.add_argument
    add("--calib_tac", action="store_true", help="compute with Top-k while calibrating (recommended)")
    add(
        "--calib_add_sigma",
        default="0.0",
        metavar="X",
        help="add X standard deviations to the mean threshold",
    )
    add(
        "--calib_sample_frac",
        default="0.1",
        metavar="F",
        help="share of a prompt's rows to sample (default 0.1)",
    )
    add("--calib_samples", default=None, metavar="N", help="calibration examples; below 1, a share of them")
    add(
        "--calib_task",
        metavar="TASK",
        help="calibrate on the calibration split of this Q&A task, with its usual shots and size (default: "
        "on what is evaluated)",
    )
    add(
        "--calib_interp",
        default="nearest",
        metavar="HOW",
        help="row lengths that calibration never saw: nearest (default), linear (between calibrated ones) or "
        "fit (a smooth curve per head instead of the table; also beyond the longest)",
    )
    add(
        "--calib_smooth",
        default="0",
        metavar="W",
        help="average calibrated values over row lengths up to W tokens apart (default 0; the files keep "
        "them as they are)",
    )
    add(
        "--calib_dump_samples",
        action="store_true",
        help="also write every sample of a threshold (calib_samples.safetensors); all of them are held in "
        "memory: 4 bytes for each layer, head and sampled row of each K",
    )
    add(
        "--calib_load_path",
        default="",
        metavar="DIR",
        help="load th.txt / sdc.txt from DIR instead of calibrating",
    )
    add("--calibrate_only", action="store_true", help="calibrate, write the tables, and stop")
    group = parser.add_argument_group("model and run")
    add = group.add_argument
    add(
        "--llama",
        default="smollm2",
        metavar="MODEL",
        help="smollm2 (default), 2-7, 2-70, 34, 3-8, 3-8i, 3-70, 3-70i, 3.1-8i, a hub id, "
        "a folder or a .gguf file",
    )
    add(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ..., or auto (default): all GPUs if there are any",
    )
    add(
        "--dtype",
        default="auto",
        help=f"{', '.join(DTYPES)} (auto: float32 on CPU, the model's own on a GPU)",
    )
    add("--batch_size", default="1", metavar="N", help="prompts computed at once (default 1)")
    add("--seed", default="42", metavar="N", help="seeds subsets, row sampling and generation (default 42)")
    add("--apply_chat_template", action="store_true", help="put prompts into the model's chat template")
    add("--output_dir", default="products", metavar="DIR", help="where product folders go (default products)")
    add("--no_statistics", action="store_true", help="do not count kept elements and V rows")
    add("--vrow_popularity", action="store_true", help="also dump how often each V row is kept (large)")
    add("--effective_k", action="store_true", help="Top-theta: report what single rows keep, against K")
    add(
        "--timestamps",
        action="store_true",
        help="accepted for old commands: product folders always carry one",
    )
    add(
        "--resume", default=None, metavar="DIR", help="go on with an interrupted run; its settings are in DIR"
    )


def parse_settings(kind: type[AnySettings], namespace: argparse.Namespace) -> AnySettings:
    """Turn parsed flags into checked settings. Raises UsageError."""
    raw = dict(vars(namespace))
    raw.pop("timestamps", None)
    raw.pop("resume", None)
    raw.pop("score", None)
    raw["statistics"] = not raw.pop("no_statistics")
    raw["mode"] = _numbers("--mode", raw["mode"], int)
    raw["k"] = _numbers("--k", raw["k"], int)
    raw["layerk"] = _layerk(raw["layerk"])
    for name in ("sdc_scale", "calib_add_sigma", "calib_sample_frac"):
        raw[name] = _number(f"--{name}", raw[name], float)
    for name in ("batch_size", "seed", "num_samples_per_task", "max_seq_len", "calib_smooth"):
        if name in raw:
            raw[name] = _number(f"--{name}", raw[name], int)
    for name in ("num_fewshot", "num_tasks", "prefill_chunk", "max_new_tokens"):
        if raw.get(name) is not None:
            raw[name] = _number(f"--{name}", raw[name], int)
    for name in ("needle_lengths", "needle_depths", "needle_repeats"):  # not given: the class's default
        if name in raw:
            text = raw.pop(name)
            if text is not None:
                read = _number if name == "needle_repeats" else _numbers
                raw[name] = read(f"--{name}", text, int)
    for name in ("calib_samples", "num_samples"):
        if raw.get(name) is not None:
            raw[name] = _number(f"--{name}", raw[name], float)
    return check_settings(kind(**raw))


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's main: exit code 2 with one sentence for UsageError, 130 for Ctrl-C or SIGTERM (which a
    cluster sends before it kills: what is finished gets saved)."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        code = main() or 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output, head for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _number(flag: str, text: Any, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        word = "a whole number" if kind is int else "a number"
        raise UsageError(f"{flag} is {text!r}: give {word}.") from None


def _numbers(flag: str, text: str, kind: type) -> tuple:
    return tuple(_number(flag, part.strip(), kind) for part in text.split(","))


def _layerk(text: str) -> dict[int, int]:
    pairs: dict[int, int] = {}
    for part in filter(None, (p.strip() for p in text.strip("{} ").split(","))):
        layer, colon, k = part.partition(":")
        if not colon:
            raise UsageError(f"--layerk is {text!r}: give layer:K pairs, e.g. 0:512,1:512.")
        pairs[_number("--layerk", layer, int)] = _number("--layerk", k, int)
    return pairs
