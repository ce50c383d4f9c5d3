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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from chtconv.comparison import session
from chtconv.comparison.cell import Cell
from chtconv.comparison.grid import AXES, Grid
from chtconv.comparison.result import PLACEMENT, images_of, run_key, same_run
from chtconv.comparison.rows import checked_line
from chtconv.errors import ConfigurationError
from chtconv.files import LOCK, PARTIAL, StorageError, locked, remove_partial, write_json
from chtconv.training import Config
from chtconv.training.config import dataset_name
from chtconv.training.run_folder import CONFIG, EVOLUTION, METRICS, SUMMARY, RunFolder

COMPARISON: Final = "comparison.json"
FAILURE: Final = "failure.json"
RESULTS: Final = "results.jsonl"

State = Literal["done", "begun", "failed", "waiting"]


class ComparisonFolder:
    """The files of one comparison under ``path``, which need not exist yet.

    Args:
        path: of the folder.
        results: the file of its results, which may lie in it or elsewhere; by default ``results.jsonl`` in it.
    """

    def __init__(self, path: Path | str, results: Path | None = None) -> None:
        self.path: Final = Path(path)
        self.results: Final = self.path / RESULTS if results is None else results

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
            raise ConfigurationError(
                f"{path} is damaged or describes no comparison: {error}; without it, it is written anew"
            ) from error

    def check(self, grid: Grid) -> None:
        """Refuse a folder that this grid has no place in, before anything is written.

        A folder in which nothing was kept, because all of its runs failed in their first epoch, is for any grid.

        Raises:
            ConfigurationError: naming the values in which the runs in the folder differ, or that it holds other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigurationError(f"{self.path} is a file: --out must name a folder")
        stored = self.stored()
        if stored:
            if self._keeps_any(stored):
                _check_shared(self.path, stored, grid)
        elif self.path.exists():
            self._check_strangers({cell.name for cell in replace(grid, chosen=()).cells()})
        for cell in grid.cells():
            self._check_run(cell)

    def _keeps_any(self, stored: dict[str, Any]) -> bool:
        """Whether any run or result is kept here; otherwise the folder is for any grid."""
        results = self.path / RESULTS
        runs = any(self.run_folder(name).holds_run() for name in stored["cells"])
        return runs or (results.exists() and results.stat().st_size > 0)

    def _check_strangers(self, names: set[str]) -> None:
        """Where nothing says whose folder it is, all that is in it must be of this grid."""
        mine = {*names, RESULTS}
        if self.results.absolute().parent == self.path.absolute():
            mine.add(self.results.name)
        for each in sorted(path.name for path in self.path.iterdir()):
            passing = each.startswith(session.PREFIX) or (each.startswith(".") and each.endswith((LOCK, PARTIAL)))
            if each not in mine and not passing:
                raise ConfigurationError(
                    f"{self.path} holds no comparison, and {each}, which is no run of this one: "
                    "--out must name another folder"
                )

    def _check_run(self, cell: Cell) -> None:
        """A name stands for one configuration, also where somebody gives a variant other values."""
        run = self.run_folder(cell.name)
        if not (run.path / CONFIG).exists():
            return
        try:
            stored = run.stored_config()
        except ConfigurationError:
            return  # damage of one run: who reads its results or goes on with it names it
        if not same_run(stored.to_dict(), cell.config.to_dict()):
            differences = ", ".join(f"{name} {old!r}" for name, (_, old) in cell.config.differences(stored).items())
            raise ConfigurationError(
                f"{run.path} holds a run of another grid, with {differences}: --out must name another folder, "
                "or the variant another name"
            )

    def lines(
        self, cells: Sequence[Cell], known: Iterable[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
        """The result lines of these cells.

        Args:
            cells: of the comparison.
            known: lines that are there already; of two of one run the later one counts.

        Returns:
            The known ones of these cells and those of further complete runs; of them the further ones; and by name
            why complete runs have none: their files are damaged.
        """
        there = {run_key(line["config"]): line for line in known}
        found, new, damaged = [], [], {}
        for cell in cells:
            line = there.get(run_key(cell.config.to_dict()))
            if line is None and self.run_folder(cell.name).is_complete():
                try:
                    line = self._line(cell)
                except ConfigurationError as error:
                    damaged[cell.name] = f"{error}; without {self.path / cell.name} it is trained anew"
                    continue
                new.append(line)
            if line is not None:
                found.append(line | {"variant": cell.variant})
        return found, new, damaged

    def images_elsewhere(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """What is known of the images of those complete runs whose data set lay elsewhere than it does now."""
        found = []
        for cell in cells:
            run = self.run_folder(cell.name)
            with contextlib.suppress(ConfigurationError):  # damage is named where its line is made
                if run.is_complete() and run.stored_config().data.dataset != cell.config.data.dataset:
                    found.append(images_of(run.stored_summary()))
        return found

    def _line(self, cell: Cell) -> dict[str, Any]:
        run = self.run_folder(cell.name)
        summary, metrics, records = (
            run.stored_summary(), read_rows(run.path / METRICS), read_rows(run.path / EVOLUTION),
        )  # fmt: skip
        try:
            line = checked_line(summary, metrics, records, cell.variant)
        except ConfigurationError as error:
            raise ConfigurationError(f"{run.path / SUMMARY} is damaged: {error}") from error
        if not same_run(line["config"], cell.config.to_dict()):
            raise ConfigurationError(f"{run.path / SUMMARY} is of another configuration")
        return line

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
            stack.enter_context(locked(self.path))
            remove_partial(self.path)
            self.check(grid)
            cells = grid.cells()
            stored = self.stored()
            known = stored["cells"] if stored and self._keeps_any(stored) else {}
            shared = shared_values(grid)
            names = {
                cell.name: {
                    "variant": cell.variant, "method": cell.method, "sparsity": cell.sparsity, "seed": cell.seed,
                    "epochs": cell.config.optimisation.epochs,
                    "config": {name: value for name, value in cell.config.to_dict().items() if name in AXES},
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


def _check_shared(path: Path, stored: dict[str, Any], grid: Grid) -> None:
    # What a folder of an older version lacks has its usual value.
    theirs = Config().to_dict() | stored["shared"] | {"recipe": stored["recipe"]}
    mine = shared_values(grid)
    words = [f"{name} {theirs.get(name)!r}, not {mine[name]!r}" for name in mine if theirs.get(name) != mine[name]]
    if words:
        raise ConfigurationError(
            f"{path} holds runs of another grid, with {', '.join(words)}: --out must name another folder"
        )


def shared_values(grid: Grid) -> dict[str, Any]:
    """What all runs of the grid have in common and those of another must not differ in, the recipe included."""
    values = grid.base.to_dict() | {"recipe": grid.recipe, "dataset": dataset_name(grid.base.data.dataset)}
    return {name: value for name, value in values.items() if name not in (*AXES, *PLACEMENT)}
