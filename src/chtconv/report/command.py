"""``chtconv report``: a folder of runs, or a file of results, as one HTML page."""

import argparse
from pathlib import Path
from typing import Any, Final

from chtconv.errors import ConfigurationError
from chtconv.extras import need
from chtconv.files import write_atomically

_SUFFIXES: Final = (".html", ".htm")
_PACKAGES: Final = ("matplotlib", "jinja2", "scipy")


def add_command(commands: Any) -> None:
    """Adds ``report`` to the commands of the command line."""
    command = commands.add_parser(
        "report",
        help="write a comparison as one HTML page",
        description="Write what is in a folder of runs as one HTML page: tables, curves, where links went, time spent. "
        "The page needs no network and no other file. Runs that are not complete are listed with the reason. Needs "
        "chtconv[compare].",
        allow_abbrev=False,
    )
    command.add_argument(
        "folder",
        metavar="DIR",
        help="what chtconv compare, table1 or train wrote; or only their file of results, for tables and accuracies",
    )
    command.add_argument("--out", metavar="FILE", help="the page (DIR.html)")
    command.add_argument(
        "--results",
        metavar="FILE",
        help="what compare was given: runs that have a line here are done (DIR/results.jsonl)",
    )


def report_command(options: argparse.Namespace) -> int:
    """Runs ``chtconv report``: writes the page, and says where.

    Raises:
        ConfigurationError: no run in the folder, no such results, another kind of file than HTML, or a missing package.
        StorageError: the page cannot be written.
    """
    folder = Path(options.folder)
    name = folder.stem if folder.is_file() else folder.resolve().name
    out = Path(options.out) if options.out else folder.resolve().parent / f"{name}.html"
    if out.suffix.lower() not in _SUFFIXES:
        raise ConfigurationError(f"--out {str(out)!r}: accepted is a file that ends in {' or '.join(_SUFFIXES)}.")
    need("the report", *_PACKAGES, extra="compare")
    # Only here: the rest of the command line does without these packages.
    from chtconv.report.page import page
    from chtconv.report.reading import read

    results = Path(options.results) if options.results else None
    write_atomically(out, page(read(folder, results)).encode())
    print(f"page: {out}")
    return 0
