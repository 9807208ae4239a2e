"""Calibrate thresholds, then evaluate Top-theta, Top-k and dense attention on Q&A tasks (lm-eval).

Without arguments: the small model, dense, on the bundled task. Results: a table, products/<timestamp>/,
results-<Model>/.
"""

from toptheta.eval.cli import Parser, parse_settings, run_main, shared_flags
from toptheta.eval.settings import QASettings, settings_from_json


def make_parser() -> Parser:
    parser = Parser(prog="test_llama.py", description=__doc__.splitlines()[0])
    shared_flags(parser)
    task = parser.add_argument_group("task")
    task.add_argument(
        "--task",
        default="everyday_science",
        metavar="T[,T]",
        help="everyday_science (bundled, default), hellaswag, "
        "arc_challenge, arc_easy, mmlu, gsm8k, medmcqa, or any task of lm-eval; a list runs each",
    )
    task.add_argument(
        "--num_samples", metavar="N", help="questions to evaluate; below 1, a share (default all)"
    )
    task.add_argument(
        "--num_fewshot", metavar="N", help="examples in each prompt (default: the task's usual number)"
    )
    task.add_argument(
        "--data_dir", metavar="DIR", help="local data: DIR/<task>/<split>.jsonl with the hub's rows"
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.resume:
        from toptheta.eval.run import check_resume

        settings = settings_from_json(QASettings, check_resume(arguments.resume, "test_llama.py"))
    else:
        settings = parse_settings(QASettings, arguments)
    from toptheta.eval.tasks.qa import run_qa

    run_qa(settings, arguments.resume)


if __name__ == "__main__":
    run_main(main)
