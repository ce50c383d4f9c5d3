"""The tables of the page: those of a comparison's statistics, and the list of its runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chtconv.comparison.rows import check_line, checked_line
from chtconv.comparison.sheets import LEGEND, sheets
from chtconv.comparison.table import Comparison as Difference
from chtconv.comparison.table import tables
from chtconv.errors import ConfigurationError
from chtconv.report.facts import STATES
from chtconv.report.figures.accuracy import NAMES, last_accuracy
from chtconv.report.figures.picture import percent
from chtconv.report.run import Comparison, Run, number


@dataclass(frozen=True)
class PageTable:
    """A table of the page.

    Attributes:
        title: its caption.
        header: a name a column.
        rows: a text a column.
        labels: how many columns at the left name the row; the others hold numbers.
        legend: what columns mean, by their names.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    legend: Sequence[tuple[str, str]] = ()

    @property
    def row_header(self) -> int:
        """The column that names a row: the second one where the first only groups them by sparsity."""
        return 1 if self.header[0] == "sparsity" else 0


def results(comparisons: Sequence[Comparison]) -> tuple[list[PageTable], list[str]]:
    """The tables of all complete runs, p values adjusted over all of them, and what was left out and why."""
    lines, problems = [], []
    for comparison in comparisons:
        of = f" of {comparison.title}" if len(comparisons) > 1 else ""
        usable, damaged = _lines(comparison)
        lines += usable
        problems += [f"{name}{of} is left out of the tables: {reason}" for name, reason in damaged.items()]
    found = sheets(tables(lines)) if lines else []
    return [
        PageTable(sheet.title, sheet.header, sheet.rows, sheet.labels, _meanings(sheet.header)) for sheet in found
    ], problems


def beside_baselines(comparison: Comparison) -> Sequence[Difference]:
    """The differences that its table shows; none where its runs make several tables, or none."""
    found = tables(_lines(comparison)[0])
    shown = found[0].comparisons if len(found) == 1 else ()
    names = set(comparison.variants)
    # A summary that contradicts the configuration beside it may have another name in the table.
    return [each for each in shown if {each.variant, each.baseline} <= names]


def _lines(comparison: Comparison) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The lines of results of its complete runs, and by name why others have none that is of use."""
    lines, damaged = [], {}
    for run in comparison.done:
        try:
            lines.append(_line(run))
        except ConfigurationError as error:
            damaged[run.name] = str(error)
    return lines, damaged


def _line(run: Run) -> dict[str, Any]:
    """The line of results of a run; of a run that has nothing else, it is there already."""
    if not run.from_line:
        return checked_line(run.summary, run.metrics, run.records, run.variant)
    line = {**run.summary, "variant": run.variant}
    check_line(line)
    return line


def _meanings(header: Sequence[str]) -> list[tuple[str, str]]:
    names = [name.rpartition(", ")[2] for name in header]
    return [(name, meaning) for name, meaning in LEGEND.items() if name in names]


def run_list(comparison: Comparison) -> PageTable:
    """Every run with its state, the reason where it is not done, and what came out."""
    measure = comparison.measure
    header = ("run", "variant", "state", "sparsity", "seed", "epochs", f"{NAMES[measure]}, %", "minutes")
    ordered = sorted(
        comparison.runs, key=lambda run: (run.state == "done", run.sparsity or 0, run.variant, run.seed or 0)
    )
    return PageTable(
        "All runs; those that are not done first", header, [_row(run, measure) for run in ordered], labels=3
    )


def _row(run: Run, measure: str) -> tuple[str, ...]:
    accuracy = last_accuracy(run, measure) if run.state == "done" else None
    seconds = number(run.summary, "seconds")
    return (
        run.name,
        run.variant,
        STATES[run.state] + (f": {run.reason}" if run.reason else ""),
        "" if run.sparsity is None else percent(run.sparsity),
        "" if run.seed is None else str(run.seed),
        f"{_epochs(run)} of {run.config.get('epochs', '?')}",
        "" if accuracy is None else f"{100 * accuracy:.2f}",
        "" if seconds is None else f"{seconds / 60:.1f}",
    )


def _epochs(run: Run) -> object:
    # An older line of results has no curve.
    return len(run.metrics) or (run.summary.get("epochs", 0) if run.from_line else 0)
