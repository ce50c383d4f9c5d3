"""What a person sees while cells are trained: a table that changes on a terminal, lines elsewhere."""

import contextlib
import time
from types import TracebackType
from typing import Any, Final, TextIO

from chtconv.comparison.board import Board, Entry, duration, epoch, label, totals
from chtconv.comparison.cell import Cell
from chtconv.comparison.outcome import Outcome
from chtconv.errors import ConfigurationError

_LINE_EVERY: Final = 60.0  # seconds between two lines on how far everything is
_NAMED: Final = 3  # cells that such a line names


class View:
    """What a session of a comparison reports to, with the board that it fills; this one shows nothing.

    It is a context manager, so that what it draws on is left in order.
    """

    def __init__(self, board: Board) -> None:
        self.board: Final = board
        self._warnings: Final[set[str]] = set()

    def look(self, running: set[str]) -> None:
        """About a second has passed; cells with these names are being trained."""
        for cell in self.board.look(running):
            self.started(cell, self.board[cell])
        self.refresh()

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """A cell ended."""
        waited = self.board[cell].state == "waiting"
        self.board.ended(cell, outcome)
        for message in outcome.warnings:
            # Most are of all cells of a variant.
            if message not in self._warnings:
                self._warnings.add(message)
                self.warned(cell, message)
        if not (waited and outcome.state == "stopped"):
            self.finished(cell, self.board[cell])

    def started(self, cell: Cell, entry: Entry) -> None:
        """A cell is being trained that was not a second ago."""

    def finished(self, cell: Cell, entry: Entry) -> None:
        """A cell is done or failed, or it was stopped while it ran."""

    def warned(self, cell: Cell, message: str) -> None:
        """A cell warned of something for the first time."""

    def refresh(self) -> None:
        """Show how far everything is."""

    def __enter__(self) -> "View":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return


class Lines(View):
    """For logs: a line on ``stream`` when a cell starts and ends, and one a minute on how far the others are."""

    def __init__(self, board: Board, stream: TextIO) -> None:
        super().__init__(board)
        self._stream = stream
        self._next = time.monotonic() + _LINE_EVERY

    def started(self, cell: Cell, entry: Entry) -> None:
        """Print that it started, or goes on."""
        self._print(f"{label(cell)}: " + (f"goes on after epoch {entry.done}" if entry.done else "started"))

    def finished(self, cell: Cell, entry: Entry) -> None:
        """Print what came of it."""
        self._print(end_line(cell, entry))

    def warned(self, cell: Cell, message: str) -> None:
        """Print what it warned of."""
        self._print(f"{label(cell)}: warning: {message}")

    def refresh(self) -> None:
        """Print a line, if the last one is a minute old."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LINE_EVERY
            self._print(progress_line(self.board))

    def _print(self, line: str) -> None:
        counts = self.board.counts()
        say(f"[{counts.get('done', 0)}/{len(self.board.cells)}] {line}", self._stream)


class Live(View):
    """For terminals: a table of all cells on ``stream`` that is redrawn every second, above it what failed.

    Raises:
        ConfigurationError: if rich is not installed.
    """

    def __init__(self, board: Board, stream: TextIO) -> None:
        super().__init__(board)
        try:
            from rich.console import Console
            from rich.live import Live as Screen
        except ImportError:
            raise ConfigurationError("the live table needs rich: pip install 'chtconv[compare]'") from None
        from chtconv.comparison.live_table import LiveTable

        self._table = LiveTable(board)
        # Redrawn from here alone: what is drawn is what is being changed here.
        self._screen: Any = Screen(self._table, console=Console(file=stream), auto_refresh=False)

    def finished(self, cell: Cell, entry: Entry) -> None:
        """Print why a cell failed."""
        if entry.state == "failed":
            from rich.text import Text

            # A style of the call would colour the table too, which is drawn again below.
            self._screen.console.print(Text(end_line(cell, entry), style="red"))

    def warned(self, cell: Cell, message: str) -> None:
        """Print what it warned of."""
        from rich.text import Text

        self._screen.console.print(Text(f"{label(cell)}: warning: {message}", style="yellow"))

    def refresh(self) -> None:
        """Draw the table again."""
        self._screen.refresh()

    def __enter__(self) -> "Live":
        self._screen.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._table.whole = True
        self._screen.stop()


def say(line: str, stream: TextIO) -> None:
    """Print a line at once, if that can be done: a log on a full disk ends no session."""
    with contextlib.suppress(OSError):
        print(line, file=stream, flush=True)


def view_on(stream: TextIO, board: Board) -> View:
    """The table where ``stream`` is a terminal, else lines."""
    return Live(board, stream) if stream.isatty() else Lines(board, stream)


def end_line(cell: Cell, entry: Entry) -> str:
    """What came of a cell.

    >>> from chtconv.training import Config
    >>> cell = Cell("SET", Config().replace(sparsity=0.9, seed=14))
    >>> print(end_line(cell, Entry(12, done=12, state="done", accuracy=0.8421, seconds=310.0)))
    SET 90% seed 14: 84.21% after 12 epochs, 5 min
    >>> print(end_line(cell, Entry(12, done=3, state="failed", reason="the disk is full")))
    SET 90% seed 14: failed: the disk is full
    """
    if entry.state == "done" and entry.accuracy is not None:
        epochs = f"{entry.done} epoch{'s' * (entry.done != 1)}"
        return f"{label(cell)}: {entry.accuracy:.2%} after {epochs}, {duration(entry.seconds)}"
    return f"{label(cell)}: {entry.state}" + (f": {entry.reason}" if entry.reason else "")


def progress_line(board: Board) -> str:
    """The cells that run, and the time left."""
    active = [cell for cell in board.cells if board[cell].state == "running"]
    words = [f"{label(cell)} {epoch(board[cell])}" for cell in active[:_NAMED]]
    more = [f"{len(active) - _NAMED} more"] if len(active) > _NAMED else []
    return (", ".join([*words, *more]) or "nothing runs") + f"; {totals(board)}"
