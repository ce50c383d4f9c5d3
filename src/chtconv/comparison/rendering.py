"""Sheets laid out: for a terminal of 100 columns, and as Markdown."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Final

from chtconv.comparison.sheets import LEGEND, Sheet, sheets
from chtconv.comparison.table import Table

WIDTH: Final = 100
NOTHING: Final = "No complete runs yet."
_GAP: Final = 2
# Labels give way where a sheet is too wide, all but the first, and down to so many columns.
_NARROWEST: Final = 12


def text(tables: Sequence[Table], width: int = WIDTH) -> str:
    """Everything there is to say about these tables in a terminal, with what the columns mean at the end.

    Args:
        tables: what :func:`chtconv.comparison.table.tables` made.
        width: columns of the terminal, of at least 100.
    """
    found = sheets(tables)
    if not found:
        return NOTHING
    blocks = [f"{textwrap.fill(sheet.title, width)}\n\n{text_sheet(sheet, width)}" for sheet in found]
    names = max(map(len, LEGEND)) + _GAP
    meanings = (
        textwrap.fill(meaning, width, initial_indent=f"{name:<{names}}", subsequent_indent=" " * names)
        for name, meaning in _legend(found)
    )
    return "\n\n".join([*blocks, "\n".join(meanings)])


def markdown(tables: Sequence[Table]) -> str:
    """The same as Markdown; the data sets of the paper's table stand side by side."""
    found = sheets(tables, together=True)
    if not found:
        return NOTHING
    blocks = [f"**{sheet.title}**\n\n{markdown_sheet(sheet)}" for sheet in found]
    return "\n\n".join([*blocks, "\n".join(f"* {name}: {meaning}" for name, meaning in _legend(found))])


def text_sheet(sheet: Sheet, width: int = WIDTH) -> str:
    """The columns of a sheet without its title: long names wrap, and a label is not said again in the next line.

    >>> rows = ("95%", "SET", "72.38 ± 0.25"), ("95%", "RigL", "72.85")
    >>> print(text_sheet(Sheet("", ("sparsity", "variant", "accuracy"), rows)))
    sparsity  variant      accuracy
    -------------------------------
    95%       SET      72.38 ± 0.25
              RigL     72.85
    """
    rows = _aligned(sheet.rows)
    widths = [max(map(len, column)) for column in zip(sheet.header, *rows, strict=True)]
    widths = _narrowed(widths, sheet.labels, width)
    lines = [*_laid_out(sheet.header, widths, sheet.labels), "-" * _total(widths)]
    above: tuple[str, ...] = ()
    for row in rows:
        lines += _laid_out(_unsaid(row, above, sheet.labels), widths, sheet.labels)
        above = row
    return "\n".join(line.rstrip() for line in lines)


def markdown_sheet(sheet: Sheet) -> str:
    """The columns of a sheet without its title, labels to the left and numbers to the right.

    >>> print(markdown_sheet(Sheet("", ("sparsity", "variant", "accuracy"), (("95%", "SET", "72.38"), ))))
    | sparsity | variant | accuracy |
    | --- | --- | ---: |
    | 95% | SET | 72.38 |
    """
    sides = ["---"] * sheet.labels + ["---:"] * (len(sheet.header) - sheet.labels)
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        for row in (sheet.header, sides, *sheet.rows)
    )


def _legend(found: Sequence[Sheet]) -> list[tuple[str, str]]:
    shown = {name.rpartition(", ")[2] for sheet in found for name in sheet.header}
    return [(name, meaning) for name, meaning in LEGEND.items() if name in shown]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows with blanks behind means that have no standard error, where others of their column have one."""
    columns = []
    for column in zip(*rows, strict=True):
        behind = max(len(cell) - len(cell.partition(" ± ")[0]) for cell in column)
        columns.append([cell if not cell or " ± " in cell else cell + " " * behind for cell in column])
    return list(zip(*columns, strict=True))


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _narrowed(widths: Sequence[int], labels: int, width: int) -> list[int]:
    """The widths with the widest label made narrower, again and again until the total fits or labels have no more."""
    narrowed = list(widths)
    while _total(narrowed) > width:
        widest = max(range(1, labels), key=lambda index: narrowed[index])
        if narrowed[widest] <= _NARROWEST:
            break
        narrowed[widest] -= 1
    return narrowed


def _unsaid(row: tuple[str, ...], above: tuple[str, ...], labels: int) -> tuple[str, ...]:
    same = 0
    while above and same < labels - 1 and above[same] == row[same]:
        same += 1
    return ("",) * same + row[same:]


def _laid_out(row: Sequence[str], widths: Sequence[int], labels: int) -> Iterator[str]:
    """The lines of a row, more than one where a label wraps."""
    wrapped = [textwrap.wrap(row[index], widths[index], subsequent_indent="  ") for index in range(labels)]
    columns = [*wrapped, *([cell] for cell in row[labels:])]
    sides = "<" * labels + ">" * (len(row) - labels)
    for parts in zip_longest(*columns, fillvalue=""):
        yield (" " * _GAP).join(f"{part:{side}{size}}" for part, side, size in zip(parts, sides, widths, strict=True))
