"""Calibrate thresholds, then evaluate Top-theta, Top-k and dense attention on Q&A tasks (lm-eval).

Without arguments: the small model, dense, on the bundled task. Results: a table, products/<timestamp>/,
results-<Model>/.
"""

from toptheta.eval.cli import Parser, settings_flags
from toptheta.eval.settings import QASettings
from toptheta.util.program import run_main


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
    from toptheta.eval.start import start

    start(QASettings, "test_llama.py", make_parser().parse_args())


if __name__ == "__main__":
    run_main(main)
