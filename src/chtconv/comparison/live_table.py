"""A board as a table for terminals: a row a variant and sparsity, a column a seed."""

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from chtconv.comparison.board import Board, Entry, State, epoch, totals
from chtconv.comparison.cell import shortened

Rows: TypeAlias = dict[tuple[str, float], dict[int, Entry]]  # by variant and sparsity, then by seed

_STYLES: Final[dict[State, str]] = {
    "waiting": "dim", "running": "cyan", "done": "", "failed": "bold red", "stopped": "yellow",
}  # fmt: skip
_SIGNS: Final[dict[State, str]] = {"waiting": ".", "running": ">", "done": "#", "failed": "x", "stopped": "-"}
_LEGEND: Final = "a sign a seed: # done, > running, x failed, - stopped, . waiting"
# Lines around the rows: heading, its rule, the rows left out, the legend, the totals, the cursor's.
_AROUND: Final = 6
_SHORT: Final = 24  # characters of a variant's name where all of it does not fit
_UNLIMITED: Final = 10_000


class LiveTable:
    """What rich draws: as many words as fit the width, and as many rows as fit the height, those at work first.

    Attributes:
        whole: whether all rows are drawn, as when the table is left behind.
    """

    def __init__(self, board: Board) -> None:
        self.whole = False
        self._board = board

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = _rows(self._board)
        shown = rows if self.whole else _shown(rows, max(1, console.size.height - _AROUND))
        wide = options.update(width=_UNLIMITED)
        for table in _tables(shown):
            if console.measure(table, options=wide).maximum <= options.max_width:
                break
        yield table
        if len(shown) < len(rows):
            yield Text(f"and {_left_out(rows, shown)}", style="dim")
        yield Text(totals(self._board))


def _rows(board: Board) -> Rows:
    rows: Rows = {}
    for cell in board.cells:
        rows.setdefault((cell.variant, cell.sparsity), {})[cell.seed] = board[cell]
    return rows


def _shown(rows: Rows, count: int) -> Rows:
    """Rows with cells that run, then those with cells that wait, then the others; in their own order."""

    def rank(key: tuple[str, float]) -> int:
        states = {entry.state for entry in rows[key].values()}
        return 0 if "running" in states else 1 if "waiting" in states else 2

    chosen = set(sorted(rows, key=rank)[:count])
    return {key: row for key, row in rows.items() if key in chosen}


def _left_out(rows: Rows, shown: Rows) -> str:
    hidden = [row for key, row in rows.items() if key not in shown]
    done = sum(all(entry.state == "done" for entry in row.values()) for row in hidden)
    return f"{len(hidden)} more rows, {done} of them done"


def _tables(rows: Rows) -> Iterator[Table]:
    """The same rows, narrower each time."""
    yield _by_seed(rows, _words, "seed {}")
    yield _by_seed(rows, _numbers, "{}")
    yield _by_seed(rows, _numbers, "{}", _SHORT)
    yield _by_sign(rows)
    yield _by_sign(rows, _SHORT)


def _by_seed(rows: Rows, fill: Callable[[Entry], str], heading: str, limit: int = _UNLIMITED) -> Table:
    table = _table()
    seeds = sorted({seed for row in rows.values() for seed in row})
    for seed in seeds:
        table.add_column(heading.format(seed), justify="right", no_wrap=True)
    for (variant, sparsity), row in rows.items():
        entries = (row.get(seed) for seed in seeds)
        cells = [Text(fill(entry), style=_STYLES[entry.state]) if entry else Text("") for entry in entries]
        table.add_row(_name(variant, limit), f"{100 * sparsity:g}%", *cells)
    return table


def _by_sign(rows: Rows, limit: int = _UNLIMITED) -> Table:
    table = _table()
    table.caption, table.caption_justify = _LEGEND, "left"
    table.add_column("seeds", overflow="fold")
    for heading in ("done", "mean, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (variant, sparsity), row in rows.items():
        entries = [row[seed] for seed in sorted(row)]
        signs = Text.assemble(*((_SIGNS[entry.state], _STYLES[entry.state]) for entry in entries))
        done = [entry for entry in entries if entry.state == "done"]
        accuracies = [entry.accuracy for entry in done if entry.accuracy is not None]
        mean = f"{100 * sum(accuracies) / len(accuracies):.2f}" if accuracies else ""
        table.add_row(_name(variant, limit), f"{100 * sparsity:g}%", signs, f"{len(done)}/{len(entries)}", mean)
    return table


def _name(variant: str, limit: int) -> Text:
    # Not a string, in which brackets are markup.
    return Text(shortened(variant, limit))


def _table() -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True)
    table.add_column("sparsity", justify="right", no_wrap=True)
    return table


def _words(entry: Entry) -> str:
    if entry.state == "done" and entry.accuracy is not None:
        return f"{100 * entry.accuracy:.2f}"
    return epoch(entry) if entry.state == "running" else entry.state


def _numbers(entry: Entry) -> str:
    short = {"waiting": ".", "failed": "fail", "stopped": "stop"}
    return short.get(entry.state) or _words(entry).removeprefix("epoch ")
