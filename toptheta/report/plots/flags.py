"""The flags that the plot scripts share. Imports nothing large, so that --help is fast."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from toptheta.util.errors import UsageError
from toptheta.util.parser import StrictParser

FORMATS = ("png", "pdf", "svg")


@dataclass(frozen=True)
class Request:
    """What to draw, and into which folder. None: the user has not chosen."""

    folder: Path
    output: Path
    format: str
    title: str | None = None
    layer_ids: tuple[int, ...] | None = None
    head_ids: tuple[int, ...] | None = None
    layers: int | None = None
    heads: int | None = None


def plot_parser(description: str) -> StrictParser:
    """A parser with the plot scripts' flags. Values stay text; `check_request` checks them."""
    parser = StrictParser(description=description)
    add = parser.add_argument
    add("-d", "--dir", "--products_dir_path", required=True, help="folder of the run, products/<timestamp>")
    add(
        "-t",
        "--title",
        metavar="TEXT",
        help="title above every figure (default: model and method, or the folder's name)",
    )
    add(
        "--layer-ids",
        metavar="0,1,15",
        help="draw only these layers (default: 4 evenly spaced ones in plots with a line per layer, else "
        "all)",
    )
    add(
        "--head-ids",
        metavar="0,1,2",
        help="draw only these query heads (default: the first 4 in plots with a line per head, else all)",
    )
    add(
        "--layers",
        metavar="N",
        help="number of layers of the model, for folders without config.json (default: from the files)",
    )
    add("--heads", metavar="N", help="number of query heads per layer, for folders without config.json")
    add("--format", default="png", metavar="|".join(FORMATS), help="image format (default: png)")
    add("--output", metavar="DIR", help="folder for the plots, created if needed (default: the run's folder)")
    return parser


def parse_request(description: str) -> Request:
    """The command line's flags as a Request. For a wrong flag, prints a sentence and exits with 2."""
    parser = plot_parser(description)
    try:
        return check_request(parser.parse_args())
    except UsageError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:  # a name that is too long
        parser.exit(2, f"{str(error.filename)[:80]}... is no folder ({error.strerror}): name another one.\n")


def check_request(args: argparse.Namespace) -> Request:
    """The flags as a Request. Raises UsageError for the first invalid value."""
    folder = Path(args.dir)
    if not folder.is_dir():
        raise UsageError(
            f"-d/--dir is {args.dir!r}, which is not a folder: name a run's folder, products/<timestamp>."
        )
    if args.format not in FORMATS:
        raise UsageError(f"--format is {args.format!r}, but must be one of {', '.join(FORMATS)}.")
    output = folder if args.output is None else Path(args.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output is {args.output!r}, which is a file: name a folder.")
    return Request(
        folder=folder,
        output=output,
        format=args.format,
        title=args.title,
        layer_ids=_ids("--layer-ids", args.layer_ids),
        head_ids=_ids("--head-ids", args.head_ids),
        layers=_count("--layers", args.layers),
        heads=_count("--heads", args.heads),
    )


def _ids(flag: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(
            f"{flag} is {text!r}, but must be whole numbers from 0, separated by commas: write {flag} 0,1,15."
        )
    return tuple(sorted({int(part) for part in parts}))


def _count(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise UsageError(
            f"{flag} is {text!r}, but must be the number of {flag[2:]} of the model: write {flag} 32."
        )
    return int(text)
