"""The main job on the small model in a few minutes: dense, Top-k and Top-theta on Q&A, then on HumanEval, in
one table.

`make demo` runs it. It calls what test_llama.py and gen_llama.py call, with the settings printed below.
"""

from pathlib import Path
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

    from toptheta.eval.runner import evaluate
    from toptheta.report.results import DECODE, PREFILL, CellResult
    from toptheta.report.tables import Column, build, score, share

    answers, programs = evaluate(qa), evaluate(generation)

    def seconds(pair: tuple[CellResult, CellResult]) -> float:
        return sum(sum(result.seconds.values()) for result in pair)

    columns = [
        Column("method", lambda pair: pair[0].method),
        Column("Q&A accuracy %", lambda pair: score(pair[0].metrics["acc"])),
        Column("HumanEval pass@1 %", lambda pair: score(pair[1].metrics["pass@1"])),
        Column("kept elements, prefill %", lambda pair: share(pair[0], PREFILL, "attn")),
        Column("kept elements, decode %", lambda pair: share(pair[1], DECODE, "attn")),
        Column("kept V rows, decode %", lambda pair: share(pair[1], DECODE, "vrow")),
        Column("time s", lambda pair: f"{seconds(pair):.0f}"),
    ]
    table = build(list(zip(answers, programs)), columns)
    print(f"\nSmolLM2-135M-Instruct: bundled Q&A task, and HumanEval\n\n{table}\n")
    print("A few questions show that it works; they cannot tell methods apart (see the standard errors).")
    for results in (answers, programs):
        print(f"Products and picture: {Path(str(results[0].folder)).parent}")


if __name__ == "__main__":
    run_main(main)
