"""Calibrate thresholds, then complete HumanEval tasks with Top-theta, Top-k or dense attention, and score
them.

Without --allow_code_execution the completions are saved only. Results: a table, products/<timestamp>/,
results-<Model>/.
"""

from toptheta.cli import GenSettings, Parser, parse_settings, run_main, settings_from_json, shared_flags
from toptheta.errors import UsageError


def main() -> None:
    parser = Parser(prog="gen_llama.py", description=__doc__.splitlines()[0])
    shared_flags(parser)
    task = parser.add_argument_group("generation")
    task.add_argument("--dataset", default="openai_humaneval", help="openai_humaneval (default)")
    task.add_argument("--num_tasks", metavar="N", help="how many tasks of the data set (default all)")
    task.add_argument(
        "--num_samples_per_task", default="1", metavar="N", help="completions per task (default 1)"
    )
    task.add_argument(
        "--max_seq_len", default="4096", metavar="N", help="tokens of prompt and completion (default 4096)"
    )
    task.add_argument("--prompt_prefix", default="", metavar="TEXT", help="text before every prompt")
    task.add_argument("--prompt_suffix", default="", metavar="TEXT", help="text after every prompt")
    task.add_argument(
        "--do_sample", action="store_true", help="sample tokens (temperature 0.5) instead of greedy choice"
    )
    task.add_argument(
        "--allow_code_execution", action="store_true", help="run the generated programs, in a sandbox"
    )
    task.add_argument("--score", metavar="DIR", help="generate nothing: score the completions saved in DIR")
    arguments = parser.parse_args()
    score = arguments.score
    del arguments.score

    if score:
        if not arguments.allow_code_execution:
            raise UsageError("--score runs generated programs: add --allow_code_execution to agree to that.")
        from toptheta.generate import score_folder

        score_folder(score)
        return
    if arguments.resume:
        from toptheta.run import check_resume

        settings = settings_from_json(GenSettings, check_resume(arguments.resume, "gen_llama.py"))
    else:
        settings = parse_settings(GenSettings, arguments)
    from toptheta.generate import run_generation

    run_generation(settings, arguments.resume)


if __name__ == "__main__":
    run_main(main)
