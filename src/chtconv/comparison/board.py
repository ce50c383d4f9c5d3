"""How far the cells of a comparison are, as their run folders tell, and how long the rest will take."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from chtconv.comparison.cell import Cell
from chtconv.comparison.outcome import Outcome
from chtconv.training.run_folder import METRICS, SUMMARY

State = Literal["waiting", "running", "done", "failed", "stopped"]
STATES: Final[tuple[State, ...]] = ("done", "running", "failed", "stopped", "waiting")


@dataclass
class Entry:
    """How far a cell is.

    Attributes:
        epochs: that the run has.
        done: epochs that are kept.
        state: what is happening to it.
        accuracy: after the last of them, a fraction: on the images held out, or without any on the test images.
        seconds: that they took.
        reason: why it failed or stopped.
    """

    epochs: int
    done: int = 0
    state: State = "waiting"
    accuracy: float | None = None
    seconds: float = 0.0
    reason: str = ""

    def read(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take in the rows of metrics.jsonl."""
        seconds = sum(row["seconds"] + row["evaluation_seconds"] for row in rows)
        if rows:
            held_out = rows[-1]["validation_accuracy"]
            self.accuracy = rows[-1]["test_accuracy"] if held_out is None else held_out
        self.done, self.seconds = len(rows), seconds


class Board:
    """What is known of all cells of a comparison.

    Args:
        cells: all of them, in order.
        folder: of their run folders.
    """

    def __init__(self, cells: Sequence[Cell], folder: Path) -> None:
        self.cells: Final = list(cells)
        self._folder = folder
        self._seen: dict[str, tuple[int, int]] = {}
        self._entries = {cell.name: Entry(cell.config.optimisation.epochs) for cell in cells}
        for name, entry in self._entries.items():
            self._read(name)
            if (folder / name / SUMMARY).exists():
                entry.state = "done"

    def __getitem__(self, cell: Cell) -> Entry:
        return self._entries[cell.name]

    def look(self, running: set[str]) -> list[Cell]:
        """Read what the cells that run have done; those that were not known to run."""
        for name in running:
            self._read(name)
        started = [cell for cell in self.cells if cell.name in running and self[cell].state != "running"]
        for cell in self.cells:
            if cell.name in running:
                self[cell].state = "running"
            elif self[cell].state == "running":
                self[cell].state = "waiting"  # its worker died, and the next has not taken it up yet
        return started

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """Take in what became of a cell."""
        self._read(cell.name)
        self[cell].state, self[cell].reason = outcome.state, outcome.reason

    def counts(self) -> dict[State, int]:
        """Cells in each state, those without any left out."""
        counts = Counter(entry.state for entry in self._entries.values())
        return {state: counts[state] for state in STATES if counts[state]}

    def seconds_left(self) -> float | None:
        """Seconds until the last cell is done if as many run as now; None while nothing runs, or no epoch is known.

        An epoch of a cell is taken to last as long as those it has done, or as the mean of all.
        """
        entries = self._entries.values()
        done = sum(entry.done for entry in entries)
        rest = {"running": [0.0], "waiting": [0.0]}
        if not done or not any(entry.state == "running" for entry in entries):
            return None
        mean = sum(entry.seconds for entry in entries) / done
        for entry in entries:
            if entry.state in rest:
                pace = entry.seconds / entry.done if entry.done else mean
                rest[entry.state].append(pace * (entry.epochs - entry.done))
        total = sum(rest["running"]) + sum(rest["waiting"])
        return max(total / (len(rest["running"]) - 1), *rest["running"], *rest["waiting"])

    def _read(self, name: str) -> None:
        """Read the metrics of a run, if they changed; files are replaced at once, so that what is there is whole."""
        path = self._folder / name / METRICS
        try:
            stat = path.stat()
            if self._seen.get(name) != (stat.st_mtime_ns, stat.st_size):
                self._entries[name].read([json.loads(line) for line in path.read_text().splitlines()])
                self._seen[name] = (stat.st_mtime_ns, stat.st_size)
        except FileNotFoundError:
            return
        except (OSError, ValueError, LookupError, TypeError):
            return  # a file that cannot be read is no reason to end a session: the child names what is wrong with it


def label(cell: Cell) -> str:
    """How a line calls a cell.

    >>> from chtconv.training import Config
    >>> label(Cell("CHTs", Config().replace(sparsity=0.95, seed=14)))
    'CHTs 95% seed 14'
    """
    sparsity = f" {cell.sparsity * 100:g}%" if cell.sparsity else ""
    return f"{cell.variant}{sparsity} seed {cell.seed}"


def duration(seconds: float) -> str:
    """About how long something takes.

    >>> duration(40), duration(240), duration(9000), duration(400000)
    ('40 s', '4 min', '2.5 h', '4.6 days')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def totals(board: Board) -> str:
    """How many cells are in which state, and the time left."""
    left = board.seconds_left()
    states = ", ".join(f"{count} {state}" for state, count in board.counts().items())
    return states + (f"; about {duration(left)} left" if left is not None else "")


def epoch(entry: Entry) -> str:
    """The epoch that is being trained.

    >>> epoch(Entry(12, done=3))
    'epoch 4/12'
    """
    return f"epoch {min(entry.done + 1, entry.epochs)}/{entry.epochs}"
