"""Result lines by variant: a row for runs that differ in nothing but their seed."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Final, Literal

from chtconv.comparison.cell import METHOD_NAMES
from chtconv.comparison.paper import PaperCell, paper_cell, readings
from chtconv.comparison.result import distinct, identity, result_line, variant_of
from chtconv.comparison.statistics import Estimate, Interval, difference, estimate
from chtconv.errors import ConfigurationError
from chtconv.methods import METHODS
from chtconv.training.config import SECTIONS

Metric = Literal["test", "validation"]
# What a comparison holds constant: all but the topology and the seed.
SHARED: Final = (*SECTIONS["data"], *SECTIONS["network"], *SECTIONS["optimisation"], "precision")


@dataclass(frozen=True)
class Means:
    """What was measured beside the accuracy, as means over seeds; None where no line has it.

    Attributes:
        training: FLOPs of the whole training as a share of dense training.
        inference: FLOPs of an image as a share of dense inference.
        itop: share of all links that were ever active.
        empty_slices: share of the (kernel, input channel) pairs without a link at the end.
        new_share: share of removed links that were not chosen again at once.
        seconds: of training, evaluation not included.
    """

    training: float | None
    inference: float | None
    itop: float | None
    empty_slices: float | None
    new_share: float | None
    seconds: float | None


@dataclass(frozen=True)
class Row:
    """A variant at one sparsity.

    Attributes:
        variant: how people call it; where two differ under one name, with what they differ in.
        config: what its runs share: their configuration without seed and placement.
        metric: ``"validation"`` where images were held out, as in a screening, else ``"test"``.
        accuracies: of the last epoch by seed, %.
        means: what else was measured.
        paper: the number of Table 1 that it can be compared with; None for most.
        readings: where it reads what the paper leaves open differently from our recipe.
    """

    variant: str
    config: Mapping[str, Any]
    metric: Metric
    accuracies: Mapping[int, float]
    means: Means
    paper: PaperCell | None
    readings: Mapping[str, Any]

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.config["method"])

    @property
    def sparsity(self) -> float:
        """Share of the links that is absent; 0 for dense runs."""
        return float(self.config["sparsity"])

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its runs in order."""
        return tuple(self.accuracies)

    @property
    def accuracy(self) -> Estimate:
        """Over its seeds, %."""
        return estimate(list(self.accuracies.values()))

    @property
    def difference(self) -> float | None:
        """Points above the paper's mean; None without a number of the paper."""
        return self.accuracy.mean - self.paper.accuracy.mean if self.paper else None

    @property
    def interval(self) -> Interval | None:
        """The 95 % Welch interval of the difference to the paper; None for one seed too."""
        return difference(self.accuracy, self.paper.accuracy) if self.paper else None


def rows(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row a variant, sparsity and whatever else runs differ in; of two lines of one run the later one counts.

    The order does not depend on that of the lines: by data set and what runs share, dense first, then by sparsity,
    then methods as in :data:`chtconv.comparison.cell.METHOD_NAMES` and their variants, the plain one first.

    Raises:
        ConfigurationError: for a line with images held out that lacks its accuracy on them.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in distinct(lines):
        groups.setdefault(tuple(_setting(line).values()), []).append(line)
    found = [_row(sorted(group, key=_seed), variant_of(group[-1])) for group in groups.values()]
    return sorted(_told_apart(found), key=_place)


def check_line(line: Mapping[str, Any]) -> None:
    """Refuse a result line that tables cannot be made of.

    Raises:
        ConfigurationError: naming what is wrong with it.

    >>> check_line({"config": {"method": "set"}, "test_accuracy": 0.9})
    >>> check_line({"config": {}})
    Traceback (most recent call last):
    chtconv.errors.ConfigurationError: KeyError: 'method'
    """
    with _damage_named():
        rows([line])


def checked_line(
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    variant: str,
) -> dict[str, Any]:
    """The line of a complete run whose files may be damaged, see :func:`chtconv.comparison.result.result_line`.

    Raises:
        ConfigurationError: naming what is wrong with them.
    """
    with _damage_named():
        line = result_line(summary, metrics, records, variant)
    check_line(line)
    return line


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except ConfigurationError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigurationError(f"{type(error).__name__}: {error}") from error


def natural(text: str) -> tuple[tuple[int, float, str], ...]:
    """A key for sorting in which numbers within a text count as numbers.

    >>> sorted(["zeta 0.5", "temperature 16", "temperature 2"], key=natural)
    ['temperature 2', 'temperature 16', 'zeta 0.5']
    """
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return tuple((0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts))


def words(values: Mapping[str, Any]) -> str:
    """Values of a configuration as people read them.

    >>> words({"lr": 0.1, "zeta_schedule": "cosine", "head": None})
    'lr 0.1, zeta schedule cosine, head none'
    """
    return ", ".join(
        f"{name.replace('_', ' ')} {'none' if value is None else f'{value:g}' if isinstance(value, float) else value}"
        for name, value in values.items()
    )


def _setting(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity(line["config"]).items() if name != "seed"}


def _seed(line: Mapping[str, Any]) -> int:
    return int(line["config"].get("seed", 0))


def _row(lines: Sequence[Mapping[str, Any]], variant: str) -> Row:
    config = _setting(lines[0])
    metric: Metric = "validation" if config["validation"] else "test"
    # A cell of the paper asks for all images, and one of the lines may be of fewer.
    cells = [paper_cell(line) for line in lines]
    paper = cells[0] if all(cells) else None
    return Row(
        variant=variant,
        config=config,
        metric=metric,
        accuracies={_seed(line): 100 * _headline(line, metric) for line in lines},
        means=_means(lines),
        paper=paper,
        readings=readings(lines[0]) if paper else {},
    )


def _headline(line: Mapping[str, Any], metric: Metric) -> float:
    value = line.get(f"{metric}_accuracy")
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigurationError(
            f"the result of {variant_of(line)}, seed {_seed(line)}, has no {metric}_accuracy from 0 to 1: "
            "write it anew from its run folder, or leave the line out."
        )
    return float(value)


def _means(lines: Sequence[Mapping[str, Any]]) -> Means:
    def mean(value: Callable[[Mapping[str, Any]], float | None]) -> float | None:
        known = [found for line in lines if (found := value(line)) is not None]
        return fmean(known) if known else None

    return Means(
        training=mean(lambda line: _of_dense(line, "training")),
        inference=mean(lambda line: _of_dense(line, "inference")),
        itop=mean(lambda line: line.get("itop")),
        empty_slices=mean(lambda line: (line.get("evolution") or {}).get("empty_slices")),
        new_share=mean(_new_share),
        seconds=mean(lambda line: line.get("seconds")),
    )


def _new_share(line: Mapping[str, Any]) -> float | None:
    evolution = line.get("evolution") or {}
    if (rechosen := evolution.get("rechosen")) is not None:
        return 1 - float(rechosen)
    # Older lines have new links by removed ones, which is the same where as many come as go.
    older, config = evolution.get("turnover"), identity(line["config"])
    own = METHODS.get(config["method"])
    constant = own is not None and (config["density"] or own.density) == "constant"
    return float(older) if older is not None and constant else None


def _of_dense(line: Mapping[str, Any], key: str) -> float | None:
    flops = line.get("flops") or {}
    own, dense = flops.get(key), flops.get(f"dense_{key}")
    return None if own is None or not dense else float(own / dense)


def told_apart(variant: str, config: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> str:
    """The name of a variant, with the values in which it differs from others of that name.

    >>> told_apart("SET", {"zeta": 0.3, "graph": "kernel"}, [{"zeta": 0.5, "graph": "kernel"}])
    'SET, zeta 0.3'
    """
    differing = {name: value for name, value in config.items() if any(each[name] != value for each in others)}
    return f"{variant}, {words(differing)}" if differing else variant


def _told_apart(found: Sequence[Row]) -> list[Row]:
    """Rows that would look the same, with what they differ in added to their names."""
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        shared = tuple(row.config[name] for name in SHARED)
        alike.setdefault((*shared, row.sparsity, row.variant), []).append(row)
    return [_named(row, group) for group in alike.values() for row in group]


def _named(row: Row, group: Sequence[Row]) -> Row:
    return replace(row, variant=told_apart(row.variant, row.config, [each.config for each in group]))


def _place(row: Row) -> tuple[Any, ...]:
    methods = list(METHOD_NAMES)
    method = methods.index(row.method) if row.method in methods else len(methods)
    plain = row.variant == METHOD_NAMES.get(row.method)
    return (row.config["dataset"], row.metric, row.sparsity, method, not plain, natural(row.variant))
