"""The folder of a comparison: a run folder a cell, and what all of them share.

===================== ===============================================================
comparison.json       the recipe and the values that all runs share; names of the cells
NAME/                 the run folder of a cell, see :mod:`chtconv.training.run_folder`
NAME/failure.json     why its last attempt failed
results.jsonl         a line a complete run
===================== ===============================================================
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from chtconv.comparison.cell import Cell
from chtconv.comparison.grid import AXES, Grid
from chtconv.comparison.result import PLACEMENT, read_lines, result_line, run_key, same_run
from chtconv.comparison.results_file import add_lines
from chtconv.errors import ConfigurationError
from chtconv.files import LOCK, StorageError, locked, write_json
from chtconv.training import Config
from chtconv.training.run_folder import CONFIG, EVOLUTION, METRICS, SUMMARY, RunFolder

COMPARISON: Final = "comparison.json"
FAILURE: Final = "failure.json"
RESULTS: Final = "results.jsonl"

State = Literal["done", "begun", "failed", "waiting"]


class ComparisonFolder:
    """The files of one comparison under ``path``, which need not exist yet."""

    def __init__(self, path: Path | str) -> None:
        self.path: Final = Path(path)

    def run_folder(self, name: str) -> RunFolder:
        """The folder of the run with this name."""
        return RunFolder(self.path / name)

    def state(self, name: str) -> State:
        """How far the run with this name is."""
        run = self.run_folder(name)
        if run.is_complete():
            return "done"
        if (run.path / FAILURE).exists():
            return "failed"
        return "begun" if run.has_checkpoint() else "waiting"

    def epochs(self, name: str) -> int:
        """Epochs that the run with this name has done."""
        path = self.run_folder(name).path / METRICS
        return len(path.read_text().splitlines()) if path.exists() else 0

    def failure(self, name: str) -> str:
        """Why the last attempt at the run with this name failed; empty if it did not."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads((self.path / name / FAILURE).read_text())["reason"])
        return ""

    def stored(self) -> dict[str, Any]:
        """What comparison.json says: ``recipe``, ``shared`` values, ``cells`` by name. Empty where there is none.

        Raises:
            ConfigurationError: if it cannot be read.
        """
        path = self.path / COMPARISON
        if not path.exists():
            return {}
        try:
            stored = json.loads(path.read_text())
            return {"recipe": stored["recipe"], "shared": dict(stored["shared"]), "cells": dict(stored["cells"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} is damaged or describes no comparison: {error}") from error

    def check(self, grid: Grid) -> None:
        """Refuse a folder that this grid has no place in, before anything is written.

        Raises:
            ConfigurationError: naming the values in which the runs in the folder differ, or that it holds other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigurationError(f"{self.path} is a file: --out must name a folder")
        stored = self.stored()
        if not stored:
            if self.path.exists() and any(each.name != LOCK for each in self.path.iterdir()):
                raise ConfigurationError(f"{self.path} is not empty and holds no comparison: --out must name another")
            return
        # What a folder of an older version lacks has its usual value.
        theirs = Config().to_dict() | stored["shared"] | {"recipe": stored["recipe"]}
        mine = shared_values(grid)
        words = [f"{name} {theirs.get(name)!r}, not {mine[name]!r}" for name in mine if theirs.get(name) != mine[name]]
        if words:
            raise ConfigurationError(
                f"{self.path} holds runs of another grid, with {', '.join(words)}: --out must name another folder"
            )
        for cell in grid.cells():
            self._check_run(cell)

    def _check_run(self, cell: Cell) -> None:
        """A name stands for one configuration, also where somebody gives a variant other values."""
        run = self.run_folder(cell.name)
        if not (run.path / CONFIG).exists():
            return
        stored = run.stored_config()
        if not same_run(stored.to_dict(), cell.config.to_dict()):
            differences = ", ".join(f"{name} {old!r}" for name, (_, old) in cell.config.differences(stored).items())
            raise ConfigurationError(
                f"{run.path} holds a run of another grid, with {differences}: --out must name another folder, "
                "or the variant another name"
            )

    def collect(self, cells: Sequence[Cell], results: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Add the lines of complete runs that a results file lacks; of two lines of one run there the later one counts.

        Returns:
            The lines of these cells, and by name why complete runs have none: their files are damaged.

        Raises:
            ConfigurationError: if the file is none of results.
            StorageError: if it cannot be written.
        """
        known = {run_key(line["config"]): line for line in read_lines(results)}
        found, new, damaged = [], [], {}
        for cell in cells:
            line = known.get(run_key(cell.config.to_dict()))
            if line is None and self.run_folder(cell.name).is_complete():
                try:
                    line = self._line(cell)
                except ConfigurationError as error:
                    damaged[cell.name] = f"{error}; without {self.path / cell.name} it is trained anew"
                    continue
                new.append(line)
            if line is not None:
                found.append(line | {"variant": cell.variant})
        if new:
            add_lines(results, new)
        return found, damaged

    def _line(self, cell: Cell) -> dict[str, Any]:
        run = self.run_folder(cell.name)
        summary, metrics, records = (
            run.stored_summary(), read_rows(run.path / METRICS), read_rows(run.path / EVOLUTION),
        )  # fmt: skip
        try:
            return result_line(summary, metrics, records, cell.variant)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"{run.path / SUMMARY} is damaged: {type(error).__name__}: {error}") from error

    @contextlib.contextmanager
    def opened(self, grid: Grid) -> Iterator[Sequence[Cell]]:
        """Make the folder, hold its lock, and write down what the cells of the grid are.

        Raises:
            ConfigurationError: as :meth:`check`, and if another process holds the folder.
            StorageError: if the folder cannot be made or written to.
        """
        self.check(grid)
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"cannot make the folder {self.path}: {error.strerror}") from error
            try:
                stack.enter_context(locked(self.path))
            except OSError as error:
                raise StorageError(f"cannot write to the folder {self.path}: {error.strerror}") from error
            self.check(grid)
            cells = grid.cells()
            known = self.stored().get("cells", {})
            shared = shared_values(grid)
            names = {
                cell.name: {
                    "variant": cell.variant, "method": cell.method, "sparsity": cell.sparsity, "seed": cell.seed,
                    "epochs": cell.config.optimisation.epochs,
                }
                for cell in cells
            }  # fmt: skip
            recipe = shared.pop("recipe")
            write_json(self.path / COMPARISON, {"recipe": recipe, "shared": shared, "cells": known | names})
            yield cells


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of a run; none where there is no such file.

    Raises:
        ConfigurationError: if it cannot be read.
    """
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error


def shared_values(grid: Grid) -> dict[str, Any]:
    """What all runs of the grid have in common and those of another must not differ in, the recipe included."""
    values = grid.base.to_dict() | {"recipe": grid.recipe, "dataset": Path(grid.base.data.dataset).name}
    return {name: value for name, value in values.items() if name not in (*AXES, *PLACEMENT)}
