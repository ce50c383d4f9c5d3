"""Means over seeds, differences between them, and how sure one can be of a difference.

All intervals are two-sided t-intervals. Where there is nothing to judge the noise by, one run or runs without any
spread, there is no interval: None, never a number that means nothing.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Any

from chtconv.errors import ConfigurationError

# A spread below this share of the numbers themselves is rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """Where a difference or a mean lies, with the confidence that was asked for."""

    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the distance between the ends."""
        return (self.high - self.low) / 2

    def excludes(self, value: float = 0.0) -> bool:
        """Whether the value lies outside.

        >>> Interval(0.75, 2.68).excludes(0)
        True
        """
        return not self.low <= value <= self.high


@dataclass(frozen=True)
class Estimate:
    """A mean over independent runs.

    Attributes:
        mean: the mean, in the unit of the values.
        standard_error: of the mean, s / sqrt(n) with the n - 1 deviation s; None for one run.
        n: number of runs.
    """

    mean: float
    standard_error: float | None
    n: int

    def interval(self, confidence: float = 0.95) -> Interval | None:
        """The t-interval of the mean; None for one run or runs that are all equal.

        Raises:
            ConfigurationError: a confidence outside (0, 1).

        >>> interval = Estimate(92.28, 0.11, 3).interval()
        >>> round(interval.low, 2), round(interval.high, 2)
        (91.81, 92.75)
        """
        return _around(self.mean, self.standard_error, self.n - 1, confidence)


@dataclass(frozen=True)
class Paired:
    """A difference between two variants over the seeds that both have.

    Attributes:
        n: number of pairs.
        difference: mean of a - b; None without a pair.
        interval: of the mean difference; None for fewer than two pairs, or where all differences are equal.
        p: of the paired t-test that the mean difference is zero, two-sided; None where there is no interval.
        correlation: Pearson's, of the pairs; None for fewer than three (two are always on a line), or where one side
            is constant.
        unpaired_half_width: of the Welch interval of the same runs. Pairing helped where it is wider than the
            interval; None where there is none.
    """

    n: int
    difference: float | None = None
    interval: Interval | None = None
    p: float | None = None
    correlation: float | None = None
    unpaired_half_width: float | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values with its standard error.

    Raises:
        ConfigurationError: no value.

    >>> estimate([91.0, 92.0, 93.0])
    Estimate(mean=92.0, standard_error=0.5773502691896258, n=3)
    >>> estimate([92.5])
    Estimate(mean=92.5, standard_error=None, n=1)
    """
    if not values:
        raise ConfigurationError("the mean of no values: accepted is at least one run.")
    return _estimate(values, max(map(abs, values)))


def difference(ours: Estimate, published: Estimate, confidence: float = 0.95) -> Interval | None:
    """The interval of ``ours.mean - published.mean``, for runs that are independent and may spread differently.

    Welch's interval (B. L. Welch, Biometrika 34, 1947), from means and standard errors alone, with the degrees of
    freedom of Welch and Satterthwaite: (a² + b²)² / (a⁴ / (n_a - 1) + b⁴ / (n_b - 1)) for standard errors a and b.

    Returns:
        None where either is a single run, or neither has any spread.

    Raises:
        ConfigurationError: a confidence outside (0, 1).

    Example:
        SET on CIFAR-10 at 50 % sparsity, as published, beside runs of one's own:

        >>> interval = difference(estimate([91.3, 91.9, 91.6]), Estimate(91.64, 0.10, 3))
        >>> round(interval.low, 2), round(interval.high, 2)
        (-0.65, 0.57)
    """
    if ours.standard_error is None or published.standard_error is None:
        return None
    squares = ours.standard_error**2, published.standard_error**2
    if not sum(squares):
        return None
    # Of shares of the sum: fourth powers of small errors would vanish.
    shares = [square / sum(squares) for square in squares]
    freedom = 1 / (shares[0] ** 2 / (ours.n - 1) + shares[1] ** 2 / (published.n - 1))
    return _around(ours.mean - published.mean, sqrt(sum(squares)), freedom, confidence)


def paired(a: Mapping[int, float], b: Mapping[int, float], confidence: float = 0.95) -> Paired:
    """The mean of a - b over the seeds that both have, judged by how much the differences spread.

    Args:
        a: the values of a variant by seed.
        b: those of the baseline.
        confidence: of the intervals.

    Raises:
        ConfigurationError: a confidence outside (0, 1).

    Example:
        >>> found = paired({14: 74.76, 15: 74.11, 16: 73.41}, {14: 72.88, 15: 72.12, 16: 72.14, 17: 72.0})
        >>> found.n, round(found.difference, 2), round(found.interval.low, 2), round(found.interval.high, 2)
        (3, 1.71, 0.75, 2.68)
        >>> round(found.p, 3), round(found.correlation, 2), round(found.unpaired_half_width, 2)
        (0.017, 0.84, 1.38)
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return Paired(0)
    first, second = [a[seed] for seed in seeds], [b[seed] for seed in seeds]
    # What rounding leaves of equal differences is as large as it is in their operands.
    scale = max(map(abs, first + second))
    differences = _estimate([x - y for x, y in zip(first, second, strict=True)], scale)
    interval = differences.interval(confidence)
    unpaired = difference(estimate(first), estimate(second), confidence)
    return Paired(
        n=len(seeds),
        difference=differences.mean,
        interval=interval,
        p=_p_value(differences) if interval else None,
        correlation=_correlation(first, second),
        unpaired_half_width=unpaired.half_width if unpaired else None,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values: calling those below a level real is wrong, even once, with at most that chance.

    Step-down (S. Holm, Scandinavian Journal of Statistics 6, 1979): the i-th smallest of m is multiplied by m - i + 1,
    is at least the one before it and at most 1. None stays None and does not count.

    >>> holm([0.01, None, 0.04, 0.03, 0.005])
    [0.03, None, 0.06, 0.06, 0.02]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


def _around(mean: float, error: float | None, freedom: float, confidence: float) -> Interval | None:
    if not 0 < confidence < 1:
        raise ConfigurationError(f"confidence={confidence!r}: accepted are numbers between 0 and 1, such as 0.95.")
    if not error:
        return None
    half = error * _quantile((1 + confidence) / 2, freedom)
    return Interval(mean - half, mean + half)


def _p_value(differences: Estimate) -> float:
    assert differences.standard_error
    t = abs(differences.mean) / differences.standard_error
    return float(2 * _student().sf(t, differences.n - 1))


def _estimate(values: Sequence[float], scale: float) -> Estimate:
    n = len(values)
    # The exact mean, rounded once: that of equal values is their value.
    return Estimate(float(statistics.mean(values)), _deviation(values, scale) / sqrt(n) if n > 1 else None, n)


def _deviation(values: Sequence[float], scale: float) -> float:
    """The n - 1 standard deviation, 0 where the values differ by the rounding of numbers of this scale alone."""
    found = statistics.stdev(values)
    return found if found > _ROUNDING * scale else 0.0


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 3 or not all(_deviation(each, max(map(abs, each))) for each in (a, b)):
        return None
    return max(-1.0, min(1.0, statistics.correlation(a, b)))


@lru_cache(maxsize=1024)
def _quantile(probability: float, freedom: float) -> float:
    return float(_student().ppf(probability, freedom))


def _student() -> Any:
    """Student's t distribution."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ConfigurationError(
            "intervals of comparisons need scipy, which is not installed: pip install 'chtconv[compare]'"
        ) from error
    return stats.t
