"""`python -m toptheta.report DIR [DIR...]`: write a report on runs as one HTML file."""

import errno
import sys
import webbrowser
from pathlib import Path

from toptheta.util.errors import UsageError
from toptheta.util.files import timestamp
from toptheta.util.parser import StrictParser


def main() -> int:
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
    try:
        arguments = parser.parse_args()
        if arguments.output:
            path = Path(arguments.output)
        elif len(arguments.runs) == 1:
            path = Path(arguments.runs[0]) / "report.html"
        else:
            path = Path("products") / "reports" / f"{timestamp()}.html"
        from toptheta.report.page.build import write_report  # here: it takes seconds

        run = write_report(arguments.runs, path)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            message = f"{str(error.filename)[:80]}...: {error.strerror}; name other folders."
        else:
            message = f"{path} cannot be written ({error.strerror}): name a file with --output."
        print(f"error: {message}", file=sys.stderr)
        return 2
    for note in run.notes:
        print(note, file=sys.stderr)
    print(f"Report: {path}")
    if arguments.open:
        webbrowser.open(path.resolve().as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(main())
