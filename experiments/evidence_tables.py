"""Tables of the evidence: what was trained, and what link prediction reaches in the masks that came of it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from layout import ROOT, markdown, read
from preregistered import PREREGISTERED_TESTS, PreregisteredTest

from chtconv.comparison.cell import METHOD_NAMES
from chtconv.comparison.rendering import markdown as comparison_tables
from chtconv.comparison.rendering import markdown_sheet
from chtconv.comparison.result import read_lines
from chtconv.comparison.rows import Row
from chtconv.comparison.sheets import accuracy, percent, points, probability, results_sheet
from chtconv.comparison.table import tables


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


def preregistered_test(test: PreregisteredTest) -> str:
    """Accuracies, and paired differences of the variant of the test to all others; nothing before all runs are made."""
    if test.missing:
        return f"{test.missing} of its runs are still to be made; nothing is shown before."
    cells = {(test.called(row.variant), row.sparsity): accuracy(row.accuracy) for row in test.rows}
    for each in test.differences:
        difference = points(each.paired.difference, each.paired.interval)
        title = f"{test.called(test.variant)} minus {each.other}"
        cells[title, each.sparsity] = difference if each.p is None else f"{difference} (p {probability(each.p)})"
    body = [
        [title, *(cells.get((title, sparsity), "") for sparsity in test.sparsities)]
        for title in dict.fromkeys(title for title, _ in cells)
    ]
    return markdown(["", *(f"{percent(sparsity)} sparsity" for sparsity in test.sparsities)], body) if body else ""


def forms() -> str:
    """All that was trained for complete preregistered tests, with its FLOPs: what a form gains, and what it costs."""
    complete = [test for test in PREREGISTERED_TESTS.values() if not test.missing]
    found = {(row.sparsity, test.about, test.called(row.variant)): row for test in complete for row in test.rows}
    body = [
        [percent(sparsity), about, called, accuracy(row.accuracy), *(percent(each, ".1f") for each in _costs(row))]
        for (sparsity, about, called), row in sorted(found.items(), key=lambda each: (*each[0][:2], *_costs(each[1])))
    ]
    return markdown(["sparsity", "form", "method", "accuracy", "training FLOPs", "inference FLOPs"], body, labels=3)


def _costs(row: Row) -> tuple[float, float]:
    return row.means.training or 0.0, row.means.inference or 0.0


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


def gradient() -> str:
    """How much larger than elsewhere the gradient is where each rule puts links, in percent.

    Means over the layers behind the first one on maps of 4x4 and more, and over seeds; on smaller ones most windows
    have padding, and the border of a kernel decides.
    """
    alike: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for line in read("gradient.jsonl"):
        configuration = line["configuration"]
        alike.setdefault((configuration["sparsity"], configuration["method"]), []).append(line)
    parts = ("place", "slice", "position")
    body = []
    for (sparsity, method), lines in sorted(alike.items()):
        layers = [layer for line in lines for layer in list(line["layers"].values())[1:] if layer["input_size"] >= 4]
        for rule in layers[0]["gains"]:
            means = (sum(layer["gains"][rule][part] for layer in layers) / len(layers) for part in parts)
            row = [f"{sparsity:.0%}", METHOD_NAMES[method], str(len(lines)), rule]
            body.append([*row, *(f"{mean - 1:+.1%}" for mean in means)])
    return markdown(["sparsity", "masks of", "seeds", "rule", "place", "slice", "position"], body) if body else ""


# By name.
TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(preregistered_test, test) for name, test in PREREGISTERED_TESTS.items()},
    "confirmation_95": partial(results, "confirmation.jsonl", 0.95),
    "confirmation_90": partial(results, "confirmation.jsonl", 0.9),
    "screening": partial(results, "screening.jsonl", pairs=2),
    "superseded": partial(accuracies, "superseded.jsonl"),
    "first": partial(results, "cifar10.jsonl"),
    "forms": forms,
    "reach": reach,
    "gradient": gradient,
}
