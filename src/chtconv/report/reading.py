"""From a folder to its comparisons: one of them, several, plain runs, or a single run; or from a file of results."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chtconv.comparison.cell import Cell, one_line
from chtconv.comparison.folder import COMPARISON, RESULTS
from chtconv.comparison.result import identity, run_key, same_run, variant_of
from chtconv.errors import ConfigurationError
from chtconv.report.naming import comparisons_of
from chtconv.report.run import Comparison, Row, Run, number, table
from chtconv.report.run_files import holds_run, read_json, read_rows, read_run, run_of_line
from chtconv.training import Config

# A run that trains renews its mark every ten seconds; clocks of machines differ.
_SESSIONS = ".session-*"
_STALE_AFTER = 120.0


def read(path: Path, results: Path | None = None) -> list[Comparison]:
    """The comparisons in a folder, or in a file of results, from which tables and curves of accuracy can be made.

    Args:
        path: a comparison, a folder of comparisons, a folder of runs, or a run; or a file with a line a run.
        results: the file with a line a run that its comparisons were made with; None for the one in the folder of each.

    Raises:
        ConfigurationError: no such folder or file, or no run in it.
    """
    if path.is_file():
        if results:
            raise ConfigurationError(f"{path} is a file of results itself: --results goes with a folder only.")
        return _of_lines(path)
    if not path.is_dir():
        raise ConfigurationError(
            f"{path} is no folder: accepted is one that chtconv compare, table1 or train wrote, or a file of results."
        )
    if results and not results.is_file():
        raise ConfigurationError(f"--results {str(results)!r} is no file: accepted is one that chtconv compare wrote.")
    if (path / COMPARISON).exists():
        return [_comparison(path, results)]
    if holds_run(path):
        return comparisons_of([read_run(path)])
    folders = _folders(path)
    found = [_comparison(folder, results) for folder in folders if (folder / COMPARISON).exists()]
    plain = [read_run(folder) for folder in folders if not (folder / COMPARISON).exists() and holds_run(folder)]
    if not found and not plain:
        raise ConfigurationError(
            f"{path} holds no run: accepted is a folder that chtconv compare, table1 or train wrote, or one of such."
        )
    return found + comparisons_of(plain)


def _of_lines(path: Path) -> list[Comparison]:
    """The comparisons of the lines of results in a file; of two lines of one run the later one counts."""
    rows, lost = read_rows(path)
    lines: dict[tuple[Any, ...], Row] = {}
    variants: dict[tuple[Any, ...], str] = {}  # as the last line of one calls it, whatever its seed
    odd = 0
    for row in rows:
        try:
            key, variant = run_key(row["config"]), variant_of(row)
            variants[_setting(row)] = variant
            lines[key] = row
        except (ConfigurationError, LookupError, TypeError, ValueError):
            odd += 1
    if not lines:
        raise ConfigurationError(f"{path} holds no results: accepted are lines that chtconv compare or table1 wrote.")
    strange = f"{odd} lines of {path.name} are none of results" if odd else ""
    first, *others = comparisons_of([_alone(path, line, variants[_setting(line)]) for line in lines.values()])
    return [replace(first, notes=[*first.notes, *filter(None, (lost, strange))]), *others]


def _setting(line: Row) -> tuple[Any, ...]:
    return run_key({**line["config"], "seed": 0})


def _alone(path: Path, line: Row, variant: str) -> Run:
    """The run of a line in a file of results, called as its folder would be."""
    name = Cell(variant, Config.from_dict(identity(line["config"]))).name
    return run_of_line(line, name, path / name, variant)


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError as error:
        raise ConfigurationError(f"cannot read the folder {path}: {error.strerror}") from error


def _comparison(path: Path, results: Path | None) -> Comparison:
    """A folder with a comparison.json: its cells, those not yet begun too, and whatever run lies beside them."""
    stored, problem = read_json(path / COMPARISON)
    cells = {str(name): cell for name, cell in table(stored, "cells").items() if isinstance(cell, dict)}
    beside = [folder for folder in _folders(path) if folder.name not in cells and holds_run(folder)]
    lines, lost = read_rows(results or path / RESULTS)
    running = _running(path)
    runs = [
        _cell(path / name, cell, table(stored, "shared"), lines, running=name in running)
        for name, cell in cells.items()
        if _is_name(name)
    ]
    found = comparisons_of([*runs, *map(read_run, beside)], together=True)
    whole = found[0] if found else Comparison("", ())
    return Comparison(path.resolve().name, whole.runs, [*whole.notes, *filter(None, (problem, lost))])


def _is_name(name: str) -> bool:
    """Whether it names a folder within the comparison, and none elsewhere."""
    return name not in ("", ".", "..") and not any(each in name for each in ("/", "\\", "\0"))


def _running(path: Path) -> set[str]:
    """The names of the cells whose marks were renewed of late, see :mod:`chtconv.comparison.session`."""
    now, found = time.time(), set()
    for session in path.glob(_SESSIONS):
        try:
            marks = {mark.name: mark.stat().st_mtime for mark in session.iterdir()}
        except OSError:
            continue
        found |= {name for name, renewed in marks.items() if abs(now - renewed) < _STALE_AFTER}
    return found


def _cell(path: Path, cell: Row, shared: Row, lines: Sequence[Row], *, running: bool) -> Run:
    """The run of a cell; where its folder says nothing, its line of results does, or the cell itself."""
    variant = one_line(str(cell.get("variant", "")))
    run = read_run(path, variant, running=running, epochs=cell.get("epochs", "?"))
    if run.state == "done":
        return run
    found = [line for line in lines if _is_of(line, cell, shared)]
    if found and all(_same(line, found[-1]) for line in found):
        return run_of_line(found[-1], run.name, path, variant)
    reason = run.reason or (f"{len(found)} lines of results have its name, of different runs" if found else "")
    if run.config:
        return replace(run, reason=reason)
    known = {key: cell[key] for key in ("method", "sparsity", "seed", "epochs") if key in cell}
    return replace(run, reason=reason, config={**shared, **table(cell, "config"), **known})


def _is_of(line: Row, cell: Row, shared: Row) -> bool:
    """Whether a line may be that of a cell: it says nothing else than the cell and what all cells share."""
    config = table(line, "config")
    if "config" in cell:
        return _same(line, {"config": {**shared, **table(cell, "config")}})
    # A folder of an older version: only what its cells are called tells.
    same = line.get("variant") == cell.get("variant") and config.get("method") == cell.get("method")
    same = same and all(number(config, key) == number(cell, key) for key in ("sparsity", "seed"))
    return same and all(config.get(name, value) == value for name, value in shared.items())


def _same(line: Row, other: Row) -> bool:
    """Whether they are of one run, whatever it is called."""
    try:
        return same_run(table(line, "config"), table(other, "config"))
    except ConfigurationError:
        return False
