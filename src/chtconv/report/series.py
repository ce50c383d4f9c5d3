"""Numbers over time: of a run, and their mean over runs. What is absent is NaN here, and is never shown."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chtconv.report.run import Row, Run, number

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean over runs.

    Attributes:
        x: where, such as epochs.
        mean: at each of them; NaN where no run has a value.
        error: standard error of the mean, s / sqrt(n) with the n - 1 deviation; NaN for fewer than two runs.
        n: number of runs.
    """

    x: Values
    mean: Values
    error: Values
    n: int


Course = tuple[Values, Values]


def curve(run: Run, key: str) -> Course:
    """A value of metrics.jsonl by epoch; of two rows of an epoch the later one counts."""
    found = {_nan(row, "epoch"): _nan(row, key) for row in run.metrics if number(row, "epoch") is not None}
    return _course(found)


def evolutions(run: Run, value: Callable[[Sequence[Row]], float]) -> Course:
    """A value of all layers' rows of an evolution, by the epochs that were done then."""
    steps = run.steps_per_epoch
    rows: dict[float, list[Row]] = {}
    for row in run.records:
        step = number(row, "step")
        if steps and step is not None:
            rows.setdefault(step / steps, []).append(row)
    return _course({epochs: value(layers) for epochs, layers in rows.items()})


def _course(found: Mapping[float, float]) -> Course:
    x = sorted(found)
    return np.array(x), np.array([found[each] for each in x])


def ratio(above: str, below: str) -> Callable[[Sequence[Row]], float]:
    """The sum of one value over layers by that of another; NaN where the latter is 0.

    >>> ratio("rechosen", "removed")([{"rechosen": 1, "removed": 4}, {"rechosen": 1, "removed": 0}])
    0.5
    """

    def value(rows: Sequence[Row]) -> float:
        known = [(number(row, above), number(row, below)) for row in rows]
        pairs = [(a, b) for a, b in known if a is not None and b is not None]
        total = sum(b for _, b in pairs)
        return sum(a for a, _ in pairs) / total if total else np.nan

    return value


def weighted(
    key: str, by: Callable[[Row], float | None] = lambda row: number(row, "size")
) -> Callable[[Sequence[Row]], float]:
    """The mean of a share over layers, each weighted by what it is a share of; NaN where no layer has one.

    >>> weighted("itop")([{"itop": 0.5, "size": 3}, {"itop": 0.1, "size": 1}, {"itop": None, "size": 1}])
    0.4
    """

    def value(rows: Sequence[Row]) -> float:
        known = [(number(row, key), by(row)) for row in rows]
        pairs = [(share, size) for share, size in known if share is not None and size]
        total = sum(size for _, size in pairs)
        return sum(share * size for share, size in pairs) / total if total else np.nan

    return value


def mean_of(courses: Sequence[Course]) -> Mean | None:
    """The mean over runs at the places that all of them have; None where there are none.

    >>> found = mean_of([(np.arange(2.0), np.array([1.0, 3.0])), (np.arange(2.0), np.array([3.0, 3.0]))])
    >>> found.mean, found.error
    (array([2., 3.]), array([1., 0.]))
    """
    known = [(x, y) for x, y in courses if np.isfinite(y).any()]
    if not known:
        return None
    shared = known[0][0]
    for x, _ in known[1:]:
        shared = np.intersect1d(shared, x)
    stacked = np.stack([y[np.searchsorted(x, shared)] for x, y in known])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN at a place: NaN is the answer
        mean, counts = np.nanmean(stacked, axis=0), np.isfinite(stacked).sum(axis=0)
        error = np.nanstd(stacked, axis=0, ddof=1) / np.sqrt(counts)
    return Mean(shared, mean, np.where(counts > 1, error, np.nan), len(known)) if len(shared) else None


def thinned(mean: Mean, most: int = 120) -> Mean:
    """At most so many places, evenly chosen, the last one among them: a page is read, not measured."""
    if len(mean.x) <= most:
        return mean
    kept = np.unique(np.linspace(0, len(mean.x) - 1, most).round().astype(int))
    return Mean(mean.x[kept], mean.mean[kept], mean.error[kept], mean.n)


def _nan(row: Row, key: str) -> float:
    found = number(row, key)
    return np.nan if found is None else found
