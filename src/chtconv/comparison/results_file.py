"""A results file that several comparisons may add lines to at the same time."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chtconv.comparison.result import read_lines, run_key
from chtconv.files import StorageError, holding, write_jsonl


def add_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Add the lines of runs that the file has none of; those that others added meanwhile stay.

    Raises:
        ConfigurationError: if the file is none of results.
        StorageError: if it cannot be written.
    """
    with _alone(path):
        known = read_lines(path)
        present = {run_key(line["config"]) for line in known}
        lacking = [line for line in lines if run_key(line["config"]) not in present]
        if lacking:
            write_jsonl(path, [*known, *lacking])


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep others waiting who would replace the file as well: what they read would lack what is written here."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(holding(path.with_name(f".{path.name}.lock"), patient=True))
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
        yield
