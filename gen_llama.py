"""Calibrate thresholds, then generate with Top-theta, Top-k or dense attention, and score it.

--dataset: HumanEval (default), LongBench summaries, perplexity of a text, a needle in a haystack. Generated
programs run only with --allow_code_execution. Results: a table, products/<timestamp>/, results-<Model>/.
"""

from toptheta.eval.cli import Parser, settings_flags
from toptheta.eval.settings import GENERATION, GenSettings
from toptheta.util.errors import UsageError
from toptheta.util.program import run_main


def make_parser() -> Parser:
    parser = Parser(
        topics=True,
        prog="gen_llama.py",
        description=__doc__.splitlines()[0],
        epilog="python gen_llama.py --mode 0,3 --k 64 --sdc exact --vmc --calib_tac --allow_code_execution",
    )
    groups = settings_flags(parser, GenSettings)
    groups[GENERATION].add_argument(
        "--score", metavar="DIR", help="generate nothing: score the completions saved in DIR"
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.score is not None:
        if not arguments.allow_code_execution:
            raise UsageError("--score runs generated programs: add --allow_code_execution to allow that.")
        from toptheta.eval.cli import refuse_others
        from toptheta.eval.score import score_folder

        refuse_others(arguments, "--score", {"score", "allow_code_execution", "timestamps"})
        score_folder(arguments.score)
        return
    from toptheta.eval.start import start

    start(GenSettings, "gen_llama.py", arguments)


if __name__ == "__main__":
    run_main(main)
