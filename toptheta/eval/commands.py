"""The console scripts of the installed package. In a checkout the root scripts do the same.

A command imports what it needs when it runs, so that --help and wrong flags respond at once.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb

from toptheta.eval.cli import Parser
from toptheta.util.errors import UsageError
from toptheta.util.program import run_main

# The files of lm-eval that check its flags
LM_EVAL_CHECKS = [os.path.join("lm_eval", name) for name in ("_cli", "config", "evaluator.py")]


def qa() -> None:
    """toptheta-qa: test_llama.py."""
    import test_llama

    _run(test_llama.main)


def gen() -> None:
    """toptheta-gen: gen_llama.py."""
    import gen_llama

    _run(gen_llama.main)


def compare() -> None:
    """toptheta-compare, and compare.py."""
    _run(_compare)


def calibration() -> None:
    """toptheta-calibration: converts calibrations."""
    from toptheta.eval.calibration_files import main

    _run(main)


def lm_eval() -> None:
    """toptheta-eval: lm-eval's own command line, with `--model toptheta`."""
    _run(_lm_eval)


def _run(main: Callable[[], int | None]) -> None:
    """`run_main`, with a message if packages of the extra `eval` are missing."""

    def guarded() -> int | None:
        try:
            return main()
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("toptheta"):
                raise
            raise UsageError(
                f"the package {error.name} is not installed: run pip install 'toptheta[eval]'."
            ) from None

    run_main(guarded)


def _compare() -> None:
    parser = Parser(
        prog=Path(sys.argv[0]).name,
        description="Compare runs on the same questions, question by question. The first is the baseline.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN[/CELL]", help="folders of runs or of their cells")
    parser.add_argument(
        "--output_dir", metavar="DIR", help="folder of the results (default products/compare/<timestamp>)"
    )
    arguments = parser.parse_args()
    from toptheta.report.compare import compare_runs

    compare_runs(arguments.runs, arguments.output_dir)


def _lm_eval() -> None:
    from lm_eval.__main__ import cli_evaluate

    import toptheta.eval.harness_model  # noqa: F401  (registers the model)

    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        # What lm-eval's checks of its flags say, and libraries of a hub that they cannot reach: they raise it
        # without the number of a system's error. Another error is none of the user's: it keeps its traceback.
        raised_in = extract_tb(error.__traceback__)[-1].filename
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno is None:
            raise UsageError(
                f"{text.rstrip('.')}: connect to the network, or name what is on this machine."
            ) from None
        if isinstance(error, UsageError) or not any(part in raised_in for part in LM_EVAL_CHECKS):
            raise
        raise UsageError(text) from None
