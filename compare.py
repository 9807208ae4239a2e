"""Compare any runs on the same questions, question by question: the first is the baseline.

A run is a folder of products; of a run of several cells all are taken, dense ones first, or the one named by
RUN/CELL. Writes a table (markdown, CSV, JSON) and a picture of the 95% intervals.
"""

from toptheta.eval.cli import Parser, run_main


def main() -> None:
    parser = Parser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN[/CELL]", help="folders of runs or of their cells")
    parser.add_argument(
        "--output_dir", metavar="DIR", help="where files go (default products/compare/<timestamp>)"
    )
    arguments = parser.parse_args()
    # Not at the top: wrong flags and --help need no second of imports.
    from toptheta.report.compare import compare_runs

    compare_runs(arguments.runs, arguments.output_dir)


if __name__ == "__main__":
    run_main(main)
