"""One grid in one folder: which of its runs are missing, training them, and what came of it all."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final, TextIO

from chtconv.comparison.board import Board, label
from chtconv.comparison.cell import Cell
from chtconv.comparison.folder import ComparisonFolder
from chtconv.comparison.grid import Grid
from chtconv.comparison.live import say, view_on
from chtconv.comparison.outcome import Outcome
from chtconv.comparison.process import INTERRUPTED, TERMINATED, TIME_IS_UP
from chtconv.comparison.result import images_of, other_images, run_key
from chtconv.comparison.results_file import add_lines, check_writable, usable_lines
from chtconv.comparison.runner import GIVEN_BACK, View, run_cells
from chtconv.data import fingerprint
from chtconv.errors import ConfigurationError
from chtconv.files import StorageError
from chtconv.training.config import DENSE, Config
from chtconv.training.run import check_network

_CUT_SHORT: Final = (GIVEN_BACK, INTERRUPTED, TERMINATED)  # stopped, and not by the clock


class Study:
    """The runs of a grid.

    Args:
        path: folder of the comparison, which need not exist yet.
        grid: its runs.
        results: file with a line a run, in which runs may be that were made elsewhere; None is the folder's own.

    Attributes:
        problems: what is wrong with lines of the results, which are passed over.

    Raises:
        ConfigurationError: if the folder holds runs of another grid, the results cannot be read or have no folder, or
            the network cannot be built or lacks a layer that is to be sparse.
    """

    def __init__(self, path: Path, grid: Grid, results: Path | str | None = None) -> None:
        self.folder: Final = ComparisonFolder(path, None if results is None else Path(results))
        self.grid: Final = grid
        self.cells: Final = grid.cells()
        self._results = self.folder.results
        self._outcomes: dict[str, Outcome] = {}
        self._damaged: dict[str, str] = {}
        self._storage = ""
        if results is not None and not self._results.absolute().parent.is_dir():
            raise ConfigurationError(f"results={str(results)!r}: accepted is a file in a folder that exists.")
        self.folder.check(grid)
        for config in {_network_of(cell.config): cell.config for cell in self.cells}.values():
            check_network(config)
        known, self.problems = usable_lines(self._results)
        self._elsewhere = self._known_elsewhere({run_key(line["config"]) for line in known})
        self._check_images(known)

    def _known_elsewhere(self, known: set[tuple[Any, ...]]) -> set[str]:
        """Cells that have a line in the results and no complete run in the folder."""
        return {
            cell.name
            for cell in self.cells
            if run_key(cell.config.to_dict()) in known and not self.folder.run_folder(cell.name).is_complete()
        }

    def _check_images(self, known: list[dict[str, Any]]) -> None:
        """Refuse results of another data set of the same name, as far as the one at hand can be read here."""
        data = self.grid.base.data
        elsewhere = {run_key(cell.config.to_dict()) for cell in self.cells if cell.name in self._elsewhere}
        found = [images_of(line) for line in known if run_key(line["config"]) in elsewhere]
        found += self.folder.images_elsewhere(self.cells)
        if not any(found):
            return
        try:
            mine = fingerprint(data.dataset, data.validation)
        except ConfigurationError:
            return  # nothing can be trained on it, and what is there is of another place
        for theirs in found:
            if words := other_images(mine, theirs):
                raise ConfigurationError(
                    f"dataset={data.dataset!r} is another data set than that of the results of this name ({words}): "
                    "accepted is the same one, or another --out and --results."
                )

    def missing(self) -> list[Cell]:
        """The cells that are still to be trained, or trained to their end."""
        return [
            cell
            for cell in self.cells
            if cell.name not in self._elsewhere and not self.folder.run_folder(cell.name).is_complete()
        ]

    def listed(self) -> Iterator[str]:
        """A line a cell: how far it is, and where it lies."""
        _, _, damaged = self.folder.lines(self.cells, usable_lines(self._results)[0])
        for cell in self.cells:
            epochs = cell.config.optimisation.epochs
            if cell.name in self._elsewhere:
                yield f"{'done':<8} {epochs:>4}/{epochs:<4} {self._results}: {cell.name}"
                continue
            run, state = self.folder.run_folder(cell.name), self.folder.state(cell.name)
            if cell.name in damaged:
                state, reason = "failed", damaged[cell.name]
            else:
                reason = self.folder.failure(cell.name) if state == "failed" else ""
            yield f"{state:<8} {run.epochs():>4}/{epochs:<4} {run.path}" + (f": {reason}" if reason else "")

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder, so that no other process trains its cells.

        Raises:
            ConfigurationError: as :meth:`ComparisonFolder.opened`.
            StorageError: if the folder or the results cannot be written to.
        """
        with self.folder.opened(self.grid):
            check_writable(self._results)
            yield

    def run(self, engine: Executor, *, deadline: float | None, threads: int | None, stream: TextIO) -> None:
        """Train what is missing; the folder must be open. The results get a line as soon as a run is done.

        Args:
            engine: what runs the cells.
            deadline: seconds of :func:`time.time` at which it must be over.
            threads: CPU threads a run; None for torch's own number.
            stream: where progress is shown.
        """
        missing = self.missing()
        done = len(self.cells) - len(missing)
        say(f"{self.folder.path}: {len(self.cells)} runs, {done} done, {len(missing)} to do", stream)
        if not missing:
            return
        board = Board([cell for cell in self.cells if cell.name not in self._elsewhere], self.folder.path)
        try:
            with view_on(stream, board) as view:
                told = _Adding(view, self._add)
                self._outcomes = run_cells(missing, self.folder.path, engine, told, deadline=deadline, threads=threads)
        finally:
            self.lines()

    def lines(self) -> list[dict[str, Any]]:
        """The result lines of the runs that are done; those that are new go into the results file, if that can be."""
        known: list[dict[str, Any]] = []
        self._storage = ""
        try:
            known, _ = usable_lines(self._results)
        except ConfigurationError as error:
            self._storage = str(error)
        lines, new, self._damaged = self.folder.lines(self.cells, known)
        try:
            add_lines(self._results, new)
        except (ConfigurationError, StorageError) as error:
            self._storage = str(error)
        return lines

    def _add(self, cell: Cell) -> None:
        known, _ = usable_lines(self._results)
        _, new, _ = self.folder.lines([cell], known)
        add_lines(self._results, new)

    def ending(self) -> tuple[str, int]:
        """What is to be said at the end, and the exit code: 0 complete, 1 with anything that failed, 3 out of time."""
        left = self._left()
        failed = [(cell, outcome) for cell, outcome in left if outcome.state == "failed"]
        cut = Counter(outcome.reason for _, outcome in left if outcome in _CUT_SHORT)
        late = len(left) - len(failed) - cut.total()
        words = [f"{self.folder.path}: {len(self.cells) - len(left)} of {len(self.cells)} runs are done"]
        words += [f"  {label(cell)} failed: {outcome.reason}" for cell, outcome in failed]
        words += [f"  {count} stopped: {reason}" for reason, count in cut.items()]
        if late:
            words.append(f"  {late} stopped in time; the same command goes on with what is missing")
        elif cut:
            words.append("  the same command goes on with what is missing")
        elif failed:
            words.append("  the same command tries what failed again")
        if self._storage:
            words.append(f"  {self._storage}; the same command adds what lacks there")
        return "\n".join(words), 1 if failed or cut or self._storage else 3 if late else 0

    def _left(self) -> list[tuple[Cell, Outcome]]:
        """The cells that are not done, and why."""
        left = {cell.name: self._outcomes.get(cell.name, TIME_IS_UP) for cell in self.missing()}
        left |= {name: Outcome("failed", reason) for name, reason in self._damaged.items()}
        return [(cell, left[cell.name]) for cell in self.cells if cell.name in left]


def _network_of(config: Config) -> tuple[Any, ...]:
    """What :func:`check_network` looks at."""
    return config.network, config.topology.layers, config.topology.method == DENSE


class _Adding:
    """A view that also has the line of each run added to the results when it is done.

    What cannot be added now, such as while a disk is full, is added when the session ends, or the reason told then.
    """

    def __init__(self, view: View, add: Callable[[Cell], None]) -> None:
        self._view = view
        self._add = add

    def look(self, running: set[str]) -> None:
        self._view.look(running)

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        self._view.ended(cell, outcome)
        if outcome.state == "done":
            with contextlib.suppress(ConfigurationError, StorageError):
                self._add(cell)
