"""A results file that several comparisons may add lines to at the same time, and in which lines may be damaged."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chtconv.comparison.result import parsed, placed_lines, run_key
from chtconv.comparison.rows import check_line
from chtconv.errors import ConfigurationError
from chtconv.files import LOCK, StorageError, holding, remove_partial, write_atomically


def usable_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines that tables can be made of, oldest first, and what is wrong with each of the others.

    Raises:
        ConfigurationError: if the file cannot be read.
    """
    lines, problems = [], []
    for place, encoded in placed_lines(path):
        try:
            lines.append(_usable(encoded, place))
        except ConfigurationError as error:
            problems.append(str(error))
    return lines, problems


def _usable(encoded: bytes, place: str) -> dict[str, Any]:
    line = parsed(encoded, place)
    try:
        check_line(line)
    except ConfigurationError as error:
        raise ConfigurationError(f"{place} is no result of a run: {error}") from error
    return line


def add_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Add the lines of runs that the file has none of; all that is there stays, also what cannot be used.

    Raises:
        ConfigurationError: if the file cannot be read.
        StorageError: if it cannot be written.
    """
    if not lines:
        return
    with _alone(path):
        present = {run_key(line["config"]) for line in usable_lines(path)[0]}
        lacking = [line for line in lines if run_key(line["config"]) not in present]
        if lacking:
            before = path.read_bytes() if path.exists() else b""
            ended = before if not before or before.endswith(b"\n") else before + b"\n"
            added = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lacking)
            write_atomically(path, ended + added.encode())


def check_writable(path: Path) -> None:
    """Find out before anything is trained whether lines can be added.

    Raises:
        StorageError: if they cannot.
    """
    with _alone(path):
        if path.exists() and not os.access(path, os.W_OK):
            raise StorageError(f"cannot write {path}: {os.strerror(errno.EACCES)}")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep others waiting who would replace the file as well: what they read would lack what is written here."""
    target = Path(os.path.realpath(path))
    with holding(target.with_name(f".{target.name}{LOCK}"), patient=True):
        remove_partial(target.parent, target.name)
        yield
