"""What the tables show, as text in columns: results, differences between variants, and the paper's own table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from chtconv.comparison.paper import TABLE_1, TITLES, PaperCell
from chtconv.comparison.rows import Metric, Row, words
from chtconv.comparison.statistics import Estimate, Interval
from chtconv.comparison.table import Comparison, Table

ACCURACY: Final[dict[Metric, str]] = {
    "test": "Test accuracy of the last epoch",
    "validation": "Screening: accuracy of the last epoch on the images held out",
}
# What stands in a column, for those who meet it for the first time.
LEGEND: Final = MappingProxyType({
    "accuracy": "mean ± standard error over n seeds, %",
    "train": "FLOPs of the whole training as a share of dense training",
    "infer": "FLOPs of one image as a share of the dense network's",
    "new": "share of removed links that were not chosen again at once",
    "ITOP": "share of all possible links that were ever active",
    "empty": "share of the (kernel, input channel) pairs without a link at the end, mean over layers",
    "seconds": "of training, evaluation not included",
    "paper": "as printed, 3 seeds; a perfect reproduction lies below it half of the time",
    "difference": "points of accuracy [95 % interval]: paired by seed, or Welch's where it is to the paper",
    "Holm p": "adjusted for all comparisons of this metric shown together",
    "r": "correlation of the pairs",
    "unpaired": "half width of the interval without pairing",
})  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    """A table as text, not yet laid out.

    Attributes:
        title: what it shows.
        header: a name a column.
        rows: a text a column; empty where there is nothing to say.
        labels: how many columns at the left name the row; the others hold numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 2


def sheets(tables: Sequence[Table], *, together: bool = False) -> list[Sheet]:
    """All sheets of these tables: results and comparisons of each, then the paper's where a row belongs to it.

    Args:
        tables: what :func:`chtconv.comparison.table.tables` made.
        together: the data sets of the paper side by side, as it prints them; wider than a terminal.
    """
    found = []
    for table in tables:
        found.append(results_sheet(table))
        if any(each.paired.n for each in table.comparisons):
            found.append(comparisons_sheet(table))
    there = {row.paper.dataset for table in tables for row in table.rows if row.paper}
    datasets = [name for name in TITLES if name in there]
    groups = [datasets] if together else [[name] for name in datasets]
    return found + [paper_sheet(tables, group) for group in groups if group]


def results_sheet(table: Table) -> Sheet:
    """The variants with their accuracy and what else was measured; columns without a value are left out.

    Seeds are a column where they are not the same for all, else a part of the title.
    """
    columns = _filled({name: [column(row) for row in table.rows] for name, column in _COLUMNS.items()})
    title = f"{table.title}. {ACCURACY[table.metric]}"
    if len(set(columns["seeds"])) == 1:
        seeds = columns.pop("seeds")[0]
        title += f", seed {seeds}" if seeds.isdigit() else f", seeds {seeds}"
    return Sheet(title, tuple(columns), tuple(zip(*columns.values(), strict=True)))


def comparisons_sheet(table: Table) -> Sheet:
    """Every variant beside its baselines, paired by seed; those that share no seed, and empty columns, are left out."""
    found = [each for each in table.comparisons if each.paired.n]
    columns = _filled({name: [column(each) for each in found] for name, column in _COMPARED.items()})
    title = f"{table.title}. Differences of {table.metric} accuracy, paired by seed"
    return Sheet(title, tuple(columns), tuple(zip(*columns.values(), strict=True)), labels=3)


def paper_sheet(tables: Iterable[Table], datasets: Sequence[str] = tuple(TITLES)) -> Sheet:
    """Table 1 in the paper's format, ours beside the paper's; empty where there is no such run.

    Runs that read what the paper leaves open differently from our recipe have a line of their own, which says how.
    """
    ours: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in (row for table in tables for row in table.rows):
        if row.paper and row.paper.dataset in datasets:
            ours.setdefault((*_paper_key(row.paper), words(row.readings)), {})[row.paper.dataset] = row
    published = {(*_paper_key(cell), cell.dataset): cell for cell in TABLE_1}
    rows = []
    for sparsity, method in dict.fromkeys(map(_paper_key, TABLE_1)):
        for reading in sorted(each[2] for each in ours if each[:2] == (sparsity, method)) or [""]:
            found = ours.get((sparsity, method, reading), {})
            cells = [_beside_paper(found.get(name), published[sparsity, method, name]) for name in datasets]
            rows.append((sparsity, f"{method}, {reading}" if reading else method, *(text for c in cells for text in c)))
    prefixes = [f"{TITLES[name]}, " if len(datasets) > 1 else "" for name in datasets]
    header = [prefix + name for prefix in prefixes for name in ("ours", "n", "paper", "difference")]
    titles = " and ".join(TITLES[name] for name in datasets)
    return Sheet(f"Table 1 of the paper, {titles}: test accuracy, %", ("sparsity", "method", *header), tuple(rows))


def accuracy(found: Estimate | None) -> str:
    """A mean with its standard error, where it has one.

    >>> accuracy(Estimate(91.99, 0.13, 3)), accuracy(Estimate(91.99, None, 1)), accuracy(None)
    ('91.99 ± 0.13', '91.99', '')
    """
    if found is None:
        return ""
    return f"{found.mean:.2f}" + ("" if found.standard_error is None else f" ± {found.standard_error:.2f}")


def points(difference: float | None, interval: Interval | None) -> str:
    """A difference with its interval, where it has one.

    >>> points(1.714, Interval(0.75, 2.678)), points(-0.004, None), points(None, None)
    ('+1.71 [+0.75, +2.68]', '-0.00', '')
    """
    if difference is None:
        return ""
    return _signed(difference) + (f" [{_signed(interval.low)}, {_signed(interval.high)}]" if interval else "")


def probability(p: float | None) -> str:
    """A p value.

    >>> probability(0.0417), probability(0.0004), probability(None)
    ('0.042', '<0.001', '')
    """
    return "<0.001" if p is not None and p < 0.0005 else _number(p, ".3f")


def percent(share: float | None, form: str = ".4g") -> str:
    """A share as a percentage.

    >>> percent(0.995), percent(0.7), percent(0.0514, ".1f"), percent(None)
    ('99.5%', '70%', '5.1%', '')
    """
    return "" if share is None else f"{100 * share:{form}}%"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers, with runs of them as ranges.

    >>> ranges([14, 15, 16, 18, 20, 21])
    '14-16, 18, 20, 21'
    """
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    texts = ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run) for run in found)
    return ", ".join(text for run in texts for text in run)


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else f"{value:{form}}"


_COLUMNS: Final[dict[str, Callable[[Row], str]]] = {
    "sparsity": lambda row: percent(row.sparsity),
    "variant": lambda row: row.variant,
    "n": lambda row: str(len(row.seeds)),
    "seeds": lambda row: ranges(row.seeds),
    "accuracy": lambda row: accuracy(row.accuracy),
    "train": lambda row: percent(row.means.training, ".1f"),
    "infer": lambda row: percent(row.means.inference, ".1f"),
    "new": lambda row: _number(row.means.new_share),
    "ITOP": lambda row: _number(row.means.itop),
    "empty": lambda row: _number(row.means.empty_slices),
    "seconds": lambda row: _number(row.means.seconds, ",.0f"),
}


_COMPARED: Final[dict[str, Callable[[Comparison], str]]] = {
    "sparsity": lambda each: percent(each.sparsity),
    "variant": lambda each: each.variant,
    "minus": lambda each: each.baseline,
    "difference": lambda each: points(each.paired.difference, each.paired.interval),
    "p": lambda each: probability(each.paired.p),
    "Holm p": lambda each: probability(each.holm),
    "pairs": lambda each: str(each.paired.n),
    "r": lambda each: _number(each.paired.correlation),
    "unpaired": lambda each: _number(each.paired.unpaired_half_width),
}


def _filled(columns: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {name: column for name, column in columns.items() if any(column)}


def _paper_key(cell: PaperCell) -> tuple[str, str]:
    return percent(cell.sparsity), cell.name


def _beside_paper(row: Row | None, published: PaperCell) -> tuple[str, ...]:
    if row is None:
        return "", "", accuracy(published.accuracy), ""
    difference = points(row.difference, row.interval)
    return accuracy(row.accuracy), str(len(row.seeds)), accuracy(published.accuracy), difference
