"""The main job on the small model in a few minutes: dense, Top-k and Top-theta on Q&A, then on HumanEval, in
one table.

`make demo` runs it. It calls what test_llama.py and gen_llama.py call, with the settings printed below.
"""

from typing import Any

from toptheta.eval.cli import run_main
from toptheta.eval.settings import GenSettings, QASettings

METHOD: dict[str, Any] = {
    "mode": (3, 1, 0),
    "k": (64,),
    "placement": "pre-softmax",
    "sdc": "exact",
    "vmc": True,
    "calib_tac": True,
    "calib_sample_frac": 1.0,
}
FLAGS = "--mode 3,1,0 --k 64 --sdc exact --vmc --calib_tac --calib_sample_frac 1.0"


def main() -> None:
    qa = QASettings(**METHOD, num_fewshot=12, num_samples=24, calib_samples=8)
    generation = GenSettings(
        **METHOD,
        num_tasks=4,
        calib_samples=3,
        max_seq_len=640,
        apply_chat_template=True,
        allow_code_execution=True,
    )
    print("Two jobs, as these commands would run them:")
    print(f"  python test_llama.py {FLAGS} --num_fewshot 12 --num_samples 24 --calib_samples 8")
    print(f"  python gen_llama.py {FLAGS} --num_tasks 4 --calib_samples 3 --max_seq_len 640 \\")
    print("    --apply_chat_template --allow_code_execution")

    from toptheta.eval.generate import run_generation
    from toptheta.eval.tasks.qa import run_qa
    from toptheta.models.recorder import DECODE, PREFILL
    from toptheta.report import tables as report

    answers = run_qa(qa)
    programs = run_generation(generation)
    rows = []
    for answer, program in zip(answers, programs):
        seconds = sum(answer["seconds"].values()) + sum(program["seconds"].values())
        rows.append(
            [
                answer["method"],
                report.score(answer["metrics"]["acc"]),
                report.score(program["metrics"]["pass@1"]),
                report.percent(answer["kept"], PREFILL, "attn"),
                report.percent(program["kept"], DECODE, "attn"),
                report.percent(program["kept"], DECODE, "vrow"),
                f"{seconds:.0f}",
            ]
        )
    header = [
        "method",
        "Q&A accuracy %",
        "HumanEval pass@1 %",
        "kept elements, prefill %",
        "kept elements, decode %",
        "kept V rows, decode %",
        "time s",
    ]
    print(f"\nSmolLM2-135M-Instruct: bundled Q&A task, and HumanEval\n\n{report.table(rows, header)}\n")
    print("A few questions show that it works; they cannot tell methods apart (see the standard errors).")
    for results in (answers, programs):
        print(f"Products and picture: {results[0]['folder'].rsplit('/', 1)[0]}")


if __name__ == "__main__":
    run_main(main)
