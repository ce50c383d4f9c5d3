"""A session of a comparison: its cells handed to an engine, and what becomes of them.

The engine is any :class:`concurrent.futures.Executor` whose workers see the folder: threads of this process that wait
for a child each, or workers of a cluster.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from pathlib import Path
from typing import Final, Protocol

from chtconv.comparison import session
from chtconv.comparison.cell import Cell
from chtconv.comparison.outcome import Outcome, Task
from chtconv.comparison.process import TIME_IS_UP, run_cell, write_failure
from chtconv.training.run_folder import RunFolder

GIVEN_BACK: Final = Outcome("stopped", "the engine gave it back: the connection to its scheduler was lost")
_LOOK_EVERY: Final = 1.0  # seconds
_GRACE: Final = 30.0  # seconds until a file on another machine is surely seen here
# Engines give up on what was running when several workers died, and on what merely waited there.
_ATTEMPTS: Final = 4


class View(Protocol):
    """What is told about a session; see :mod:`chtconv.comparison.live`."""

    def look(self, running: set[str]) -> None:
        """About a second has passed; cells with these names are being trained."""

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """A cell ended."""


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    executor: Executor,
    view: View,
    *,
    deadline: float | None = None,
    threads: int | None = None,
) -> dict[str, Outcome]:
    """Train cells, each in its run folder below ``folder``, as many at a time as the engine does.

    A cell that fails stops no other. Whatever ends this call early, Ctrl-C included, stops all cells that run, on
    whatever machine; they go on from their last whole epoch when they are run again.

    Args:
        cells: what to train, in this order; none of them complete.
        folder: of the comparison, whose lock must be held.
        executor: what runs them.
        view: is told what happens.
        deadline: seconds of :func:`time.time` after which no cell starts, and no epoch that would end later.
        threads: CPU threads a cell; None leaves them to torch and the environment.

    Returns:
        An outcome a cell, by its name.
    """
    folder = folder.absolute()  # not resolved: on other machines a link may lead elsewhere
    with session.opened(folder) as here:
        work = _Work(executor, here, deadline, threads)
        outcomes: dict[str, Outcome] = {}
        try:
            for cell in cells:
                work.submit(cell)
            while work.waiting:
                for cell, outcome in work.collect():
                    outcomes[cell.name] = outcome
                    view.ended(cell, outcome)
                view.look(here.running() - outcomes.keys())
        except BaseException:
            work.cancel()
            raise
    return outcomes


class _Work:
    """Cells that an engine was given and has not given back."""

    def __init__(self, executor: Executor, here: session.Session, deadline: float | None, threads: int | None) -> None:
        self.waiting: dict[Future[Outcome], Cell] = {}
        self._executor = executor
        self._session = here
        self._deadline, self._threads = deadline, threads
        self._given_up: dict[str, tuple[int, int]] = {}

    def submit(self, cell: Cell) -> None:
        task = Task(
            out=str(self._run(cell)),
            config=cell.config.to_dict(),
            deadline=self._deadline,
            threads=self._threads,
            session=str(self._session.path),
            cwd=os.getcwd(),
        )
        self.waiting[self._executor.submit(run_cell, task)] = cell

    def collect(self) -> list[tuple[Cell, Outcome]]:
        """What ended; waits for about a second if nothing did."""
        if self._late():
            self._cancel_what_waits()
        done, _ = wait(self.waiting, timeout=_LOOK_EVERY, return_when=FIRST_COMPLETED)
        ended = []
        for future in [each for each in self.waiting if each in done]:
            # Dropped at once: a cluster does the work again whose result is asked for and was lost with its worker.
            cell = self.waiting.pop(future)
            outcome = self._outcome(cell, future)
            if outcome is not None:
                ended.append((cell, outcome))
        return ended

    def cancel(self) -> None:
        for future in self.waiting:
            future.cancel()

    def _late(self) -> bool:
        return self._deadline is not None and time.time() > self._deadline + _GRACE

    def _cancel_what_waits(self) -> None:
        """Each cell looks at the clock itself when its turn comes; on a cluster without workers it never does."""
        running = self._session.running()
        for future, cell in self.waiting.items():
            if cell.name not in running:
                future.cancel()

    def _outcome(self, cell: Cell, future: "Future[Outcome]") -> Outcome | None:
        """What became of a cell; None if the engine is asked again."""
        if future.cancelled():
            return TIME_IS_UP if self._late() else GIVEN_BACK
        error = future.exception()
        if error is None:
            return future.result()
        # run_cell raises nothing: it is the engine that failed.
        if self._worth_another_attempt(cell):
            self.submit(cell)
            return None
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        write_failure(self._run(cell), reason)
        return Outcome("failed", reason)

    def _worth_another_attempt(self, cell: Cell) -> bool:
        """Whether the cell gained an epoch since the engine gave up on it last, or few attempts were made since."""
        epochs = RunFolder(self._run(cell)).epochs()
        before, attempts = self._given_up.get(cell.name, (epochs, 0))
        attempts = 1 if epochs > before else attempts + 1
        self._given_up[cell.name] = (epochs, attempts)
        return attempts < _ATTEMPTS

    def _run(self, cell: Cell) -> Path:
        return self._session.path.parent / cell.name
