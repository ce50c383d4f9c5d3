"""Tables of the evidence: what was trained, and what link prediction reaches in the masks that came of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from layout import ROOT, markdown, read

from chtconv.comparison.cell import METHOD_NAMES
from chtconv.comparison.rendering import markdown as comparison_tables
from chtconv.comparison.rendering import markdown_sheet
from chtconv.comparison.result import read_lines
from chtconv.comparison.sheets import accuracy, percent, points, results_sheet
from chtconv.comparison.statistics import holm
from chtconv.comparison.table import tables


def results(name: str, sparsity: float | None = None) -> str:
    """The tables of a file of result lines with the differences to SET and RigL, and what their columns are.

    Args:
        name: of the file in results/.
        sparsity: only the runs at this one, whose comparisons are then a family of their own; None for all.
    """
    lines = read_lines(ROOT / "results" / name)
    return comparison_tables(tables(line for line in lines if sparsity in (None, line["config"]["sparsity"])))


def confirmation(name: str = "confirmation.jsonl") -> str:
    """The test that was frozen: accuracies, then CHTs minus the others, p adjusted (Holm) for all of these together."""
    found = tables(read_lines(ROOT / "results" / name))
    rows = [row for table in found for row in table.rows]
    method_of = {row.variant: row.method for row in rows}
    tests = [each for table in found for each in table.comparisons if method_of[each.variant] == "chts"]
    adjusted = holm([each.paired.p for each in tests])
    cells = {(METHOD_NAMES[row.method], row.sparsity): accuracy(row.accuracy) for row in rows}
    for each, p in zip(tests, adjusted, strict=True):
        probability = "" if p is None else ", p < 0.001" if p < 0.0005 else f", p = {p:.3f}"
        title = f"CHTs minus {METHOD_NAMES[method_of[each.baseline]]}"
        cells[title, each.sparsity] = points(each.paired.difference, each.paired.interval) + probability
    sparsities = sorted({row.sparsity for row in rows})
    titles = dict.fromkeys(title for title, _ in cells)
    body = [[title, *(cells.get((title, sparsity), "") for sparsity in sparsities)] for title in titles]
    return markdown(["", *(f"{percent(sparsity)} sparsity" for sparsity in sparsities)], body) if body else ""


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
    "confirmation": confirmation,
    "confirmation_95": partial(results, "confirmation.jsonl", 0.95),
    "confirmation_90": partial(results, "confirmation.jsonl", 0.9),
    "screening": partial(results, "screening.jsonl"),
    "superseded": partial(accuracies, "superseded.jsonl"),
    "first": partial(results, "cifar10.jsonl"),
    "reach": reach,
}
