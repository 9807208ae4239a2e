"""Run every cell of a table, those that are not finished yet, and build the table and its pictures.

The tables are in reproduce.json: methods by name, and for each table its tasks, methods, K and flags. The
cells are runs of test_llama.py and gen_llama.py; any finished run under --output_dir with the same settings
counts, whoever started it.
"""

from pathlib import Path

import gen_llama
import test_llama
from toptheta.eval.cli import Parser, run_main
from toptheta.eval.sweep import SweepOptions, run_sweep


def main() -> int:
    parser = Parser(prog="reproduce.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--table", metavar="NAME", help="the table to make; without it, the tables are listed")
    add("--dry_run", action="store_true", help="print the commands that are left to run, and stop")
    add("--table_only", action="store_true", help="run nothing: build the table of what is finished")
    add("--only", metavar="TEXT[,TEXT]", help="only cells whose name (task, method, K=64) holds one of these")
    add("--samples", metavar="N", help="questions and HumanEval tasks of each cell, instead of the table's")
    add("--data_dir", metavar="DIR", help="local data of the tasks: see test_llama.py --help")
    add("--jobs", metavar="N", default="1", help="runs at a time: a GPU each, or a share of the CPU cores")
    add("--slurm", metavar="PARTITION", help="submit the runs to a Slurm cluster instead, and stop")
    add("--slurm_hours", metavar="H", default="24", help="time limit of each Slurm job (default 24)")
    add("--file", metavar="FILE", help="the file of tables (default reproduce.json beside this script)")
    add("--output_dir", metavar="DIR", default="products", help="where runs and tables go (default products)")
    parsers = {"test_llama.py": test_llama.make_parser, "gen_llama.py": gen_llama.make_parser}
    return run_sweep(SweepOptions(**vars(parser.parse_args())), parsers, Path(__file__).resolve().parent)


if __name__ == "__main__":
    run_main(main)
