"""Top-theta on the small model in a few minutes: how close to dense attention, what is kept, how fast; then a
few questions, one generated program, and a report on all of it.

`make demo` runs it. Everything except the timing is done by gen_llama.py and test_llama.py; their commands
are printed.
"""

import copy
import statistics
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from toptheta.eval.cli import Parser
from toptheta.eval.settings import GenSettings, QASettings, Settings
from toptheta.util.files import timestamp, write_text
from toptheta.util.options import to_flags
from toptheta.util.program import run_main

MODEL = "smollm2"
K = 64
BUDGET: dict[str, Any] = {"placement": "post-softmax", "vmc": True, "calib_to": "budget"}
METHODS = (
    "top_k:sdc=exact",
    "top_theta:sdc=exact,calib_tac",  # as published: thresholds on scores, the same K for every row
    "top_theta:placement=post-softmax,calib_to=budget",  # ours: one threshold on weights
    "top_theta:placement=post-softmax,calib_to=budget,key_copy=int4",  # and a 4-bit copy of K
)
TEXT = ("types", "compound", "execmodel")  # chapters of Python's language reference, which comes with Python
WINDOW, WINDOWS = 1024, 5
PROGRAM, PROGRAM_TOKENS = 35, 512  # a HumanEval task that the small model solves, and its limit
PREFILLS, STEPS, WARM_UP = 3, 24, 128  # timed, of each method; tokens of the prompt that warms it up


def main() -> None:
    """Run the demo. It has no flags; --help says what it does."""
    Parser(prog="demo.py", description=" ".join(__doc__.split())).parse_args()
    folder = Path("products") / "demo" / timestamp()
    text = folder / "python_reference.txt"
    write_text(text, "\n\n".join(topics[name] for name in TEXT))
    model: dict[str, Any] = {"llama": MODEL, "k": (K,), "output_dir": str(folder)}
    on_text = GenSettings(
        **model,
        dataset="perplexity",
        text=str(text),
        max_seq_len=WINDOW,
        num_tasks=WINDOWS,
        method=METHODS,
        vmc=True,
        calib_samples=3,
        calib_sample_frac=1.0,
        effective_k=True,
    )
    step(1, "How close to dense attention, and what is kept", "gen_llama.py", on_text)
    from toptheta.eval.runner import evaluate

    _, on_scores, on_weights, _ = (str(one.folder) for one in evaluate(on_text, page=False))

    print(f"\n2. How fast, next to stock transformers with sdpa (medians, interleaved, K={K})\n")
    print(speed_table(text.read_text(), on_scores))

    carried = model | BUDGET | {"mode": (3, 1, 0), "calib_load_path": on_weights}
    questions = QASettings(**carried, num_fewshot=8, num_samples=4)
    step(3, "A few questions, with the thresholds of the text above", "test_llama.py", questions)
    evaluate(questions, page=False)

    program = GenSettings(
        **carried,
        task_ids=(PROGRAM,),
        max_seq_len=PROGRAM_TOKENS,
        apply_chat_template=True,
        allow_code_execution=True,
    )
    step(4, "A program, written and run in a sandbox", "gen_llama.py", program)
    evaluate(program, page=False)
    finish(folder)


def step(number: int, title: str, script: str, settings: Settings) -> None:
    flags = " ".join(to_flags(settings))
    print(f"\n{number}. {title}\n\n  python {script} {flags}\n", flush=True)


def speed_table(text: str, tables: str) -> str:
    """Prefill of a window and decode steps after it, as ratios to stock attention. Every repetition runs all
    methods, so that a busy machine slows all of them down."""
    import torch

    from toptheta.models.control import set_params
    from toptheta.models.loading import find_model, load_model, load_tokenizer
    from toptheta.models.patch import update_model
    from toptheta.report.tables import table

    source = find_model(MODEL)
    stock = load_model(source, "float32", "cpu").eval()
    ours = update_model(copy.deepcopy(stock))
    ids = load_tokenizer(source)(text, return_tensors="pt", verbose=False).input_ids
    ids, following = ids[:, :WINDOW], ids[:, WINDOW : WINDOW + STEPS + 1]
    pre = {"K": K, "placement": "pre-softmax", "sdc": "exact", "vmc": True}

    set_params(ours, mode=0, **pre, calib_load_path=tables)  # they stay with the model
    methods: dict[str, tuple[Any, Callable[[], None]]] = {
        "stock sdpa": (stock, lambda: None),
        f"Top-k K={K}": (ours, lambda: set_params(ours, mode=1, **pre)),
        f"Top-theta K={K}": (ours, lambda: set_params(ours, mode=0, **pre)),
    }
    prefill: dict[str, list[float]] = {name: [] for name in methods}
    decode: dict[str, list[float]] = {name: [] for name in methods}
    with torch.no_grad():
        caches = {}
        for model, use in methods.values():
            use()
            model(ids[:, :WARM_UP], use_cache=True, logits_to_keep=1)
        for _ in range(PREFILLS):
            for name, (model, use) in methods.items():
                use()
                seconds, out = timed(lambda: model(ids, use_cache=True, logits_to_keep=1))  # noqa: B023
                prefill[name].append(seconds)
                caches[name] = out.past_key_values
        for i in range(following.shape[1]):
            for name, (model, use) in methods.items():
                use()
                one = {"input_ids": following[:, i : i + 1], "past_key_values": caches[name]}
                seconds, _ = timed(lambda: model(**one, use_cache=True))  # noqa: B023
                if i:  # the first step warms up
                    decode[name].append(seconds)
    rows = []
    for name in methods:
        cells = []
        for times in (prefill, decode):
            median, stocks = (statistics.median(times[one]) for one in (name, "stock sdpa"))
            cells += [f"{1000 * median:.0f}", f"{median / stocks:.2f}"]
        rows.append([name, *cells])
    header = ["", f"prefill of {WINDOW:,} tokens, ms", "ratio to stock", "decode step, ms", "ratio to stock"]
    return table(rows, header)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = call()
    return time.perf_counter() - start, out


def finish(folder: Path) -> None:
    """Print the answers, and write the report on all runs of the demo."""
    from toptheta.report.page.build import write_report
    from toptheta.report.results import DECODE, PREFILL
    from toptheta.report.tables import PHASE_WORDS

    runs = sorted(path.parent for path in folder.glob("*/run.json"))
    run = write_report(runs, folder / "report.html")
    print("\n5. The answers")
    answers = run.answers.dropna(subset=["question"])
    for _, of_question in answers.groupby(["task", "key"], sort=False):
        first = of_question.iloc[0]
        print(f"\n{first['question'].removesuffix('Answer:').strip()}")
        for _, one in of_question.iterrows():
            if first["choices"]:
                verdict = "right" if one["acc"] else "wrong"
                print(f"  {one['cell']}: {first['choices'][one['answer']]} ({verdict})")
            else:
                verdict = "passes its tests" if one["passed"] else "fails its tests"
                print(f"\n  {one['cell']}, {verdict}:\n{textwrap.indent(one['answer'], '    ')}")
    print()
    for row in run.cells.query("not dense").itertuples():
        for phase in (PREFILL, DECODE):
            kept, read = getattr(row, f"kept_{phase}"), getattr(row, f"kv_bytes_{phase}")
            if kept == kept and kept is not None:
                words = (
                    f"{row.cell} on {row.task}, {PHASE_WORDS[phase]}: {100 * kept:.1f} % of the elements kept"
                )
                print(words + (f", {100 * read:.1f} % of the KV bytes read" if phase == DECODE else ""))
    print(f"\nA report on all of this, to open in a browser: {folder / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
