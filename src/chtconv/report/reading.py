"""From a folder to its comparisons: whatever is missing, half done or damaged is said, and stops nothing."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chtconv.comparison.folder import COMPARISON, FAILURE
from chtconv.errors import ConfigurationError
from chtconv.report.naming import comparisons_of
from chtconv.report.run import Comparison, Row, Run, State, number, table
from chtconv.training.files import LOCK
from chtconv.training.run_folder import CHECKPOINT, CONFIG, EVOLUTION, METRICS, SUMMARY, RunFolder


def read(path: Path) -> list[Comparison]:
    """The comparisons in a folder.

    Args:
        path: a comparison, a folder of comparisons, a folder of runs, or a run.

    Raises:
        ConfigurationError: no such folder, or no run in it.
    """
    if not path.is_dir():
        raise ConfigurationError(f"{path} is no folder: accepted is one that chtconv compare, table1 or train wrote.")
    if (path / COMPARISON).exists():
        return [_comparison(path)]
    if _holds_run(path):
        return comparisons_of([_run(path)])
    folders = _folders(path)
    found = [_comparison(folder) for folder in folders if (folder / COMPARISON).exists()]
    plain = [_run(folder) for folder in folders if not (folder / COMPARISON).exists() and _holds_run(folder)]
    if not found and not plain:
        raise ConfigurationError(
            f"{path} holds no run: accepted is a folder that chtconv compare, table1 or train wrote, or one of such."
        )
    return found + comparisons_of(plain)


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(each for each in path.iterdir() if each.is_dir())
    except OSError as error:
        raise ConfigurationError(f"cannot read the folder {path}: {error.strerror}") from error


def _holds_run(path: Path) -> bool:
    return RunFolder(path).holds_run() or (path / FAILURE).exists()


def _comparison(path: Path) -> Comparison:
    """A folder with a comparison.json: its cells, those not yet begun too, and whatever run lies beside them."""
    stored, problem = _json(path / COMPARISON)
    cells = {str(name): cell for name, cell in table(stored, "cells").items() if isinstance(cell, dict)}
    beside = [folder.name for folder in _folders(path) if folder.name not in cells and _holds_run(folder)]
    runs = [_cell(path / name, cell, table(stored, "shared")) for name, cell in cells.items() if _is_name(name)]
    found = comparisons_of([*runs, *(_run(path / name) for name in beside)], together=True)
    notes = [problem] if problem else []
    return Comparison(path.name, found[0].runs if found else (), notes)


def _is_name(name: str) -> bool:
    """Whether it names a folder within the comparison, and none elsewhere."""
    return name not in ("", ".", "..") and not any(each in name for each in ("/", "\\", "\0"))


def _cell(path: Path, cell: Row, shared: Row) -> Run:
    run = _run(path, str(cell.get("variant", "")))
    if run.config:
        return run
    known = {key: cell[key] for key in ("method", "sparsity", "seed", "epochs") if key in cell}
    return Run(run.name, path, run.state, run.reason, run.variant, {**shared, **known})


def _run(path: Path, variant: str = "") -> Run:
    """One run folder; a summary that is there and cannot be read makes it unreadable."""
    problems: list[str] = []
    config, summary = (_checked_json(path / name, problems) for name in (CONFIG, SUMMARY))
    metrics, records = (_rows(path / name, problems) for name in (METRICS, EVOLUTION))
    config = config or dict(table(summary, "config"))
    if "method" not in config and (path / CONFIG).exists():
        problems.append(f"{CONFIG} is no configuration of a run")
        config = {}
    if summary and config:
        return Run(path.name, path, "done", "; ".join(problems), variant, config, summary, metrics, records)
    state, reason = _unfinished(path, problems, len(metrics), config)
    return Run(path.name, path, state, reason, variant, config, {}, metrics, records)


def _unfinished(path: Path, problems: list[str], epochs: int, config: Row) -> tuple[State, str]:
    """State and reason of a run without results."""
    holder = _holder(path / LOCK)
    kept = f"{epochs} of {config.get('epochs', '?')} epochs"
    if holder and _alive(holder):
        return "running", kept
    if (path / FAILURE).exists():
        failure, problem = _json(path / FAILURE)
        at = f" ({failure['at']})" if "at" in failure else ""
        return "failed", problem or f"{failure.get('reason') or 'no reason was written down'}{at}"
    if problems:
        return "unreadable", "; ".join(problems)
    if not path.exists():
        return "waiting", ""
    if holder:
        return "stopped", f"{kept}; process {holder}, which held its lock, does not run on this machine"
    return "stopped", kept if (path / CHECKPOINT).exists() else "not one epoch was complete"


def _holder(lock: Path) -> int:
    """The process that a lock names; 0 where there is none."""
    try:
        return max(0, int(lock.read_text()))
    except (OSError, ValueError):
        return 0


def _alive(process: int) -> bool:
    if sys.platform == "win32":  # pragma: no cover - signal 0 would interrupt the process there
        return True
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _checked_json(path: Path, problems: list[str]) -> dict[str, Any]:
    value, problem = _json(path) if path.exists() else ({}, "")
    problems += [problem] if problem else []
    return value


def _json(path: Path) -> tuple[dict[str, Any], str]:
    """The table in a file, or an empty one and why."""
    try:
        value = json.loads(path.read_text(), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path.name} cannot be read: {error}"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} holds no table of names and values")


def _rows(path: Path, problems: list[str]) -> list[Row]:
    """The rows of a table that can be read; how many cannot is a problem."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return []
    rows = list(_parsed(lines))
    if len(rows) < len(lines):
        problems.append(f"{len(lines) - len(rows)} of {len(lines)} lines of {path.name} cannot be read")
    return rows


def _parsed(lines: Iterable[str]) -> Iterable[Row]:
    for line in lines:
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(number(row, key) is not None for key in row if key in ("epoch", "evolution")):
            yield row
