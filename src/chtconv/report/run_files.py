"""From the files of a run folder to a run: what is missing, half done or damaged is said, and stops nothing."""

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from chtconv.comparison.folder import FAILURE
from chtconv.files import LOCK
from chtconv.report.run import Row, Run, State, number, table
from chtconv.training.run_folder import CHECKPOINT, CONFIG, EVOLUTION, METRICS, SUMMARY, RunFolder


def holds_run(path: Path) -> bool:
    """Whether any file of a run is there, if only the reason why it failed."""
    return RunFolder(path).holds_run() or (path / FAILURE).exists()


def read_run(path: Path, variant: str = "", *, running: bool = False, epochs: object = "?") -> Run:
    """One run folder.

    Args:
        path: the folder, which need not be there.
        variant: how people call what was trained.
        running: whether it is known to be training now; else its lock tells.
        epochs: how many it will have, where its folder does not say.
    """
    problems: list[str] = []
    config, summary = (_checked_json(path / name, problems) for name in (CONFIG, SUMMARY))
    metrics, records = (_rows(path / name, problems) for name in (METRICS, EVOLUTION))
    config = config or dict(table(summary, "config"))
    if "method" not in config and (path / CONFIG).exists():
        problems.append(f"{CONFIG} is no configuration of a run")
        config = {}
    if summary and config:
        return Run(path.name, path, "done", "; ".join(problems), variant, config, summary, metrics, records)
    kept = f"{len(metrics)} of {config.get('epochs', epochs)} epochs"
    state, reason = _unfinished(path, problems, config, kept, running)
    return Run(path.name, path, state, reason, variant, config, {}, metrics, records)


def run_of_line(line: Row, name: str, path: Path, variant: str) -> Run:
    """A complete run of which only its line of results is left: no topology, but its curve."""
    curve = table(line, "curve")
    values = {key: found for key, found in curve.items() if isinstance(found, list)}
    epochs = max(map(len, values.values()), default=0)
    metrics = [
        {"epoch": epoch + 1} | {key: found[epoch] for key, found in values.items() if epoch < len(found)}
        for epoch in range(epochs)
    ]
    config = table(line, "config")
    return Run(name, path, "done", "from its line of results", variant, config, line, metrics, from_line=True)


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """The table in a file, or an empty one and why; NaN and infinities are None."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path.name} cannot be read: {error}"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} holds no table of names and values")


def read_rows(path: Path, numbers: Collection[str] = ()) -> tuple[list[Row], str]:
    """The rows of a file that can be read, and what is wrong with others.

    Args:
        path: of the file, which need not be there.
        numbers: names that stand for a number in every row that has them.
    """
    try:
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return [], ""
    except OSError as error:
        return [], f"{path.name} cannot be read: {error}"
    rows = list(_parsed(lines, numbers))
    lost = len(lines) - len(rows)
    return rows, f"{lost} of {len(lines)} lines of {path.name} cannot be read" if lost else ""


def _unfinished(path: Path, problems: list[str], config: Row, kept: str, running: bool) -> tuple[State, str]:
    """State and reason of a run without results."""
    holder = _holder(path / LOCK)
    if running or (holder and _alive(holder)):
        return "running", kept
    if (path / FAILURE).exists():
        return "failed", _failure(*read_json(path / FAILURE))
    if problems:
        return "unreadable", "; ".join(problems)
    if not config:
        return "waiting", ""
    if holder:
        return "stopped", f"{kept}; process {holder}, which held its lock, does not run on this machine"
    return "stopped", kept if (path / CHECKPOINT).exists() else "not one epoch was complete"


def _failure(failure: Mapping[str, Any], problem: str) -> str:
    at = f" ({failure['at']})" if "at" in failure else ""
    return problem or f"{failure.get('reason') or 'no reason was written down'}{at}"


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
    value, problem = read_json(path) if path.exists() else ({}, "")
    problems += [problem] if problem else []
    return value


def _rows(path: Path, problems: list[str]) -> list[Row]:
    rows, problem = read_rows(path, ("epoch", "evolution"))
    problems += [problem] if problem else []
    return rows


def _parsed(lines: list[bytes], numbers: Collection[str]) -> Iterator[Row]:
    for line in lines:
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(number(row, key) is not None for key in row if key in numbers):
            yield row
