"""Calibrate thresholds, then evaluate Top-theta, Top-k and dense attention on Q&A tasks (lm-eval).

Without arguments: the small model, dense, on the bundled task. Results: a table, products/<timestamp>/,
results-<Model>/.
"""

from toptheta.eval.cli import Parser, parse_settings, resumed_settings, run_main, settings_flags
from toptheta.eval.settings import QASettings


def make_parser() -> Parser:
    parser = Parser(
        topics=True,
        prog="test_llama.py",
        description=__doc__.splitlines()[0],
        epilog="python test_llama.py --mode 0,1,3 --k 32,64 --sdc exact --vmc --calib_tac",
    )
    settings_flags(parser, QASettings)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.resume:
        from toptheta.eval.run import check_resume

        settings = resumed_settings(QASettings, check_resume(arguments.resume, "test_llama.py"), arguments)
    else:
        settings = parse_settings(QASettings, arguments)
    from toptheta.eval.runner import evaluate

    evaluate(settings, arguments.resume)


if __name__ == "__main__":
    run_main(main)
