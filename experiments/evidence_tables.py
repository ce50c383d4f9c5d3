"""Tables of the evidence: what was trained, and what link prediction reaches in the masks that came of it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from layout import ROOT, markdown, read

from chtconv.comparison.rendering import markdown as comparison_tables
from chtconv.comparison.rendering import markdown_sheet
from chtconv.comparison.result import read_lines
from chtconv.comparison.rows import rows
from chtconv.comparison.sheets import accuracy, percent, points, probability, results_sheet
from chtconv.comparison.statistics import holm, paired
from chtconv.comparison.table import tables

_CHTS = "CHTs, allocation layer, all windows, kernel shares links"
_SMOOTHED = "CHTs, allocation layer, all windows, smoothing 0.5"
# Of the names of variants, what the text around a table says.
_COMMON = ("allocation layer", "all windows", "kernel shares links")


def results(name: str, sparsity: float | None = None, pairs: int = 1) -> str:
    """The tables of a file of result lines with the differences to SET and RigL, and what their columns are.

    Args:
        name: of the file in results/.
        sparsity: only the runs at this one, whose comparisons are then a family of their own; None for all.
        pairs: only the differences of at least so many; a single pair has no interval.
    """
    lines = read_lines(ROOT / "results" / name)
    found = tables(line for line in lines if sparsity in (None, line["config"]["sparsity"]))
    shown = (tuple(each for each in table.comparisons if each.paired.n >= pairs) for table in found)
    return comparison_tables([replace(table, comparisons=some) for table, some in zip(found, shown, strict=True)])


def frozen_test(mine: str, *names: str) -> str:
    """A test that was frozen before its runs: accuracies, and paired differences of one variant to all others.

    Args:
        mine: the variant; p values are adjusted (Holm) for all of its differences together, at all sparsities.
        names: of the files in results/ that its runs and those of the others are in.
    """
    found = rows(line for name in names for line in read_lines(ROOT / "results" / name))
    own = {row.sparsity: row for row in found if row.variant == mine}
    beside = [row for row in found if row.sparsity in own]
    others = [row for row in beside if row.variant != mine]
    tests = [paired(own[row.sparsity].accuracies, row.accuracies) for row in others]
    cells = {(_short(row.variant), row.sparsity): accuracy(row.accuracy) for row in beside}
    for row, each, p in zip(others, tests, holm([each.p for each in tests]), strict=True):
        difference = points(each.difference, each.interval)
        title = f"{_short(mine)} minus {_short(row.variant)}"
        cells[title, row.sparsity] = difference if p is None else f"{difference} (p {probability(p)})"
    titles = dict.fromkeys(title for title, _ in cells)
    body = [[title, *(cells.get((title, sparsity), "") for sparsity in sorted(own))] for title in titles]
    return markdown(["", *(f"{percent(sparsity)} sparsity" for sparsity in sorted(own))], body) if own else ""


def _short(variant: str) -> str:
    """A variant without what the forms of a confirmation have in common."""
    return ", ".join(part for part in variant.split(", ") if part not in _COMMON)


def accuracies(name: str) -> str:
    """The accuracies alone."""
    return "\n\n".join(markdown_sheet(results_sheet(table)) for table in tables(read_lines(ROOT / "results" / name)))


def reach() -> str:
    """Share of the positions beside links that paths lead to, by the size of the maps: random masks, then trained ones.

    Means over the layers of a size, and over seeds; where a mask was measured more than once, the latest.
    """
    latest = {(line["masks"], *sorted(line["configuration"].items())): line for line in read("reach.jsonl")}
    alike: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for line in latest.values():
        configuration = line["configuration"]
        alike.setdefault((line["masks"], configuration["width"], configuration["sparsity"]), []).append(line)
    columns: list[str] = []
    body = []
    for (masks, width, sparsity), lines in sorted(alike.items(), key=lambda row: (row[0][0] != "random", row[0][1:])):
        shares: dict[str, list[float]] = {}
        for line in lines:
            for number, layer in enumerate(line["layers"].values()):
                column = "{0}x{0}".format(layer["input_size"]) if number else "first layer"
                shares.setdefault(column, []).extend([layer["reach"]] if layer["reach"] is not None else [])
        columns = list(shares)
        means = (f"{sum(values) / len(values):.0%}" if values else "" for values in shares.values())
        body.append([masks, f"{width:g}", f"{sparsity:.0%}", str(len(lines)), *means])
    return markdown(["masks", "width", "sparsity", "seeds", *columns], body) if body else ""


# By name.
TABLES: dict[str, Callable[[], str]] = {
    "confirmation": partial(frozen_test, _CHTS, "confirmation.jsonl"),
    "confirmation_smoothing": partial(frozen_test, _SMOOTHED, "confirmation.jsonl", "confirmation-smoothing.jsonl"),
    "confirmation_paper": partial(frozen_test, "CHT", "confirmation-paper.jsonl"),
    "confirmation_95": partial(results, "confirmation.jsonl", 0.95),
    "confirmation_90": partial(results, "confirmation.jsonl", 0.9),
    "screening": partial(results, "screening.jsonl", pairs=2),
    "superseded": partial(accuracies, "superseded.jsonl"),
    "first": partial(results, "cifar10.jsonl"),
    "reach": reach,
}
