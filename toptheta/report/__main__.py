"""`python -m toptheta.report DIR [DIR...]`: write a report on runs as one HTML file."""

import errno
import webbrowser
from pathlib import Path

from toptheta.util.console import say
from toptheta.util.errors import UsageError
from toptheta.util.files import timestamp
from toptheta.util.parser import StrictParser
from toptheta.util.program import run_main


def main() -> None:
    run_main(_report)


def _report() -> None:
    parser = StrictParser(
        prog="python -m toptheta.report",
        description="Write a report on one or more runs as one HTML file: result tables, plots, and the "
        "answers of all methods side by side.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="DIR",
        help="folder of a run (products/<timestamp>), of one of its tasks or cells, or of a table "
        "(products/tables/<table>)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="file to write (default: report.html in the run's folder; for several runs a file in "
        "products/reports/)",
    )
    parser.add_argument("--open", action="store_true", help="open the report in a browser")
    arguments = parser.parse_args()
    if arguments.output:
        path = Path(arguments.output)
    elif len(arguments.runs) == 1:
        path = Path(arguments.runs[0]) / "report.html"
    else:
        path = Path("products") / "reports" / f"{timestamp()}.html"
    from toptheta.report.page.build import write_report  # here: it takes seconds

    try:
        run = write_report(arguments.runs, path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise
        raise UsageError(f"{path} cannot be written ({error.strerror}): name a file with --output.") from None
    for note in run.notes:
        say(note)
    print(f"Report: {path}")
    if arguments.open:
        webbrowser.open(path.resolve().as_uri())


if __name__ == "__main__":
    main()
