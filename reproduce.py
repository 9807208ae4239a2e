"""Run the unfinished cells of a table, then build the table and its plots.

The tables are declared in reproduce.json: methods by name, and for each table its tasks, methods, K and
flags. Cells are runs of test_llama.py and gen_llama.py; any finished run under --output_dir with the same
settings counts.
"""

from pathlib import Path

import gen_llama
import test_llama
from toptheta.eval.cli import Parser
from toptheta.util.options import add_flags, from_flags
from toptheta.util.program import run_main


def main() -> int:
    # Not at the top: these import torch, and Ctrl-C meanwhile ends with a message only within main.
    from toptheta.eval.sweep import run_sweep
    from toptheta.eval.table_cells import SweepOptions

    parser = Parser(prog="reproduce.py", description=__doc__.splitlines()[0])
    add_flags(parser, SweepOptions)
    parsers = {"test_llama.py": test_llama.make_parser, "gen_llama.py": gen_llama.make_parser}
    options = from_flags(SweepOptions, parser.parse_args())
    return run_sweep(options, parsers, Path(__file__).resolve().parent)


if __name__ == "__main__":
    run_main(main)
