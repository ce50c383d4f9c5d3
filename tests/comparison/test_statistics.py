"""Statistics of comparisons: published examples, SciPy's own tests, definitions, and what must not change them."""

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from chtconv.comparison.paper import TABLE_1
from chtconv.comparison.statistics import Estimate, Interval, difference, estimate, holm, paired
from chtconv.errors import ConfigurationError

# Student's sleep data (Biometrika 6, 1908): hours gained by ten patients with each of two drugs. What R prints of them
# (t.test, cor) stands in the tests.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

# Accuracies are hundredths of a per cent.
accuracy = st.integers(0, 10_000).map(lambda number: number / 100)
pairs = st.lists(st.tuples(accuracy, accuracy), min_size=2, max_size=8)
p_values = st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12)


# SciPy warns where nearly equal numbers may cost it precision.
nearly_equal = pytest.mark.filterwarnings("ignore:Precision loss")


def by_seed(values):
    return dict(enumerate(values, 14))


def close(one, two, relative=1e-6, absolute=1e-9):
    return math.isclose(one, two, rel_tol=relative, abs_tol=absolute)


# ----------------------------------------------------------------------------------------------------- published


def test_paired_is_what_is_published_of_students_sleep_data():
    found = paired(by_seed(FIRST), by_seed(SECOND))
    assert found.n == 10
    assert found.difference == pytest.approx(-1.58)
    assert (found.interval.low, found.interval.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert found.correlation == pytest.approx(0.7951702, abs=5e-8)
    assert found.unpaired_half_width == pytest.approx((0.2054832 + 3.3654832) / 2, abs=5e-8)


def test_welch_is_what_is_published_of_students_sleep_data():
    interval = difference(estimate(FIRST), estimate(SECOND))
    assert (interval.low, interval.high) == pytest.approx((-3.3654832, 0.2054832), abs=5e-8)


def test_holm_worked_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1 raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_papers_own_numbers_do_not_tell_cht_from_set_on_cifar10():
    """p of Welch's test is where the interval at 1 - p has an end at zero: .10, .14 and .38."""
    cells = {(cell.sparsity, cell.name): cell.accuracy for cell in TABLE_1 if cell.dataset == "cifar10"}
    for sparsity, name, p in ((0.5, "CHT-CH3", 0.10), (0.7, "CHT-CH2", 0.14), (0.7, "CHT-CH3", 0.38)):
        wider = difference(cells[sparsity, name], cells[sparsity, "SET"], 1 - (p - 0.005))
        narrower = difference(cells[sparsity, name], cells[sparsity, "SET"], 1 - (p + 0.005))
        assert not wider.excludes(0)
        assert narrower.excludes(0)


def test_the_interval_of_a_mean_of_three_is_4_303_standard_errors():
    interval = Estimate(91.99, 0.13, 3).interval()
    assert interval.half_width == pytest.approx(4.303 * 0.13, rel=1e-4)
    assert (interval.low + interval.high) / 2 == pytest.approx(91.99)


# ------------------------------------------------------------------------------------------------ other programs


@nearly_equal
@given(pairs)
def test_paired_is_scipys_test(found):
    a, b = map(list, zip(*found, strict=True))
    ours = paired(by_seed(a), by_seed(b))
    differences = {Fraction(round(100 * x) - round(100 * y), 100) for x, y in found}
    assert (ours.p is None) == (ours.interval is None) == (len(differences) == 1)
    if ours.interval:
        theirs = stats.ttest_rel(a, b)
        interval = theirs.confidence_interval(0.95)
        assert close(ours.p, float(theirs.pvalue))
        assert close(ours.interval.low, float(interval.low), absolute=1e-7)
        assert close(ours.interval.high, float(interval.high), absolute=1e-7)
    assert (ours.correlation is None) == (len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1)
    if ours.correlation is not None:
        assert close(ours.correlation, float(stats.pearsonr(a, b).statistic), absolute=1e-7)


@nearly_equal
@given(st.lists(accuracy, min_size=2, max_size=6), st.lists(accuracy, min_size=2, max_size=6), st.floats(0.5, 0.999))
def test_difference_is_scipys_welch_test(a, b, confidence):
    ours = difference(estimate(a), estimate(b), confidence)
    assert (ours is None) == (len(set(a)) == len(set(b)) == 1)
    if ours:
        theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval(confidence)
        assert close(ours.low, float(theirs.low), absolute=1e-7)
        assert close(ours.high, float(theirs.high), absolute=1e-7)


@given(p_values)
def test_holm_rejects_what_the_procedure_rejects(found):
    """The procedure itself: from the smallest p on, reject while p <= level / hypotheses left, then stop."""
    adjusted = holm(found)
    for level in (0.01, 0.05, 0.3, 0.9):
        if any(p is not None and math.isclose(p, level) for p in adjusted):
            continue
        rejected: set[int] = set()
        known = sorted((p, index) for index, p in enumerate(found) if p is not None)
        for left, (p, index) in zip(range(len(known), 0, -1), known, strict=True):
            if p * left > level:
                break
            rejected.add(index)
        assert {index for index, p in enumerate(adjusted) if p is not None and p <= level} == rejected


@given(p_values)
def test_holm_is_monotone_at_least_p_and_at_most_one(found):
    adjusted = holm(found)
    assert [p is None for p in adjusted] == [p is None for p in found]
    both = sorted((p, q) for p, q in zip(found, adjusted, strict=True) if p is not None)
    assert all(p <= q <= 1 for p, q in both)
    assert all(one[1] <= two[1] for one, two in itertools.pairwise(both))
    assert holm([p for p in found if p is not None]) == [q for q in adjusted if q is not None]


@given(p_values, st.randoms(use_true_random=False))
def test_holm_does_not_depend_on_the_order(found, chance):
    order = list(range(len(found)))
    chance.shuffle(order)
    adjusted = holm(found)
    assert holm([found[index] for index in order]) == [adjusted[index] for index in order]


# --------------------------------------------------------------------------------------------------- invariances


@given(pairs, st.integers(-1000, 1000), st.integers(1, 20), st.randoms(use_true_random=False))
def test_paired_follows_shift_scale_and_order(found, shift, scale, chance):
    a, b = ({seed: pair[side] for seed, pair in enumerate(found)} for side in (0, 1))
    before = paired(a, b)
    moved = paired({k: v + shift for k, v in a.items()}, {k: v + shift for k, v in b.items()})
    larger = paired({k: v * scale for k, v in a.items()}, {k: v * scale for k, v in b.items()})
    order = list(a)
    chance.shuffle(order)
    assert paired({seed: a[seed] for seed in order}, b) == before
    for after, factor in ((moved, 1), (larger, scale)):
        assert close(after.difference, before.difference * factor, absolute=1e-7)
        for name in ("p", "correlation"):
            one, two = getattr(before, name), getattr(after, name)
            assert (one is None) == (two is None)
            assert one is None or close(one, two, absolute=1e-6)
        assert (before.interval is None) == (after.interval is None)
        if before.interval:
            assert close(after.interval.half_width, before.interval.half_width * factor, absolute=1e-7)


@given(pairs)
def test_paired_is_antisymmetric(found):
    a, b = ({seed: pair[side] for seed, pair in enumerate(found)} for side in (0, 1))
    one, two = paired(a, b), paired(b, a)
    assert one.difference == -two.difference
    assert (one.p, one.n, one.unpaired_half_width) == (two.p, two.n, two.unpaired_half_width)
    assert (one.correlation is None) == (two.correlation is None)
    assert one.correlation is None or close(one.correlation, two.correlation)
    if one.interval:
        assert one.interval == Interval(-two.interval.high, -two.interval.low)


@given(pairs)
def test_nothing_is_ever_no_number(found):
    a, b = ({seed: pair[side] for seed, pair in enumerate(found)} for side in (0, 1))
    result = paired(a, b)
    interval = result.interval or Interval(0, 0)
    values = (result.difference, result.p, result.correlation, result.unpaired_half_width, interval.low, interval.high)
    assert all(math.isfinite(value) for value in values if value is not None)
    assert result.correlation is None or -1 <= result.correlation <= 1
    assert result.p is None or 0 <= result.p <= 1


@given(pairs, st.floats(0.5, 0.99))
def test_an_interval_holds_zero_where_p_is_above_the_level(found, confidence):
    a, b = ({seed: pair[side] for seed, pair in enumerate(found)} for side in (0, 1))
    result = paired(a, b, confidence)
    if result.interval and not math.isclose(result.p, 1 - confidence, rel_tol=1e-6):
        assert result.interval.excludes(0) == (result.p < 1 - confidence)


# ---------------------------------------------------------------------------------------------------- edge cases


def test_only_common_seeds_are_paired():
    a, b = {14: 74.0, 15: 75.0, 16: 73.0, 17: 99.0}, {13: 1.0, 14: 72.0, 16: 72.5, 15: 72.0}
    common = (14, 15, 16)
    assert paired(a, b) == paired({seed: a[seed] for seed in common}, {seed: b[seed] for seed in common})


def test_without_a_common_seed_there_is_nothing():
    found = paired({14: 74.0}, {15: 72.0})
    assert found.n == 0
    assert {found.difference, found.interval, found.p, found.correlation, found.unpaired_half_width} == {None}


def test_one_pair_has_a_difference_and_no_interval():
    found = paired({14: 74.0}, {14: 72.5})
    assert (found.n, found.difference) == (1, 1.5)
    assert {found.interval, found.p, found.correlation, found.unpaired_half_width} == {None}


def test_equal_differences_give_no_interval_though_they_are_rounded():
    a, b = {14: 74.3, 15: 63.1, 16: 8.2}, {14: 74.2, 15: 63.0, 16: 8.1}
    assert len({a[seed] - b[seed] for seed in a}) > 1
    found = paired(a, b)
    assert (found.interval, found.p) == (None, None)
    assert found.difference == pytest.approx(0.1)
    assert found.correlation == pytest.approx(1)
    assert found.unpaired_half_width > 0


def test_two_pairs_are_always_on_a_line_and_have_no_correlation():
    assert paired({1: 71.0, 2: 72.0}, {1: 70.0, 2: 70.5}).correlation is None


def test_a_constant_side_has_no_correlation_but_an_interval():
    found = paired({1: 71.0, 2: 72.0, 3: 73.5}, {1: 70.0, 2: 70.0, 3: 70.0})
    assert found.correlation is None
    assert found.interval is not None


def test_equal_runs_have_no_error_and_no_interval():
    assert estimate([92.1] * 3) == Estimate(92.1, 0.0, 3)
    assert estimate([92.1] * 3).interval() is None
    assert difference(estimate([92.1] * 3), estimate([91.0] * 4)) is None


def test_one_side_without_spread_leaves_the_degrees_of_freedom_of_the_other():
    interval = difference(estimate([92.0] * 5), Estimate(91.0, 0.1, 3))
    assert interval.half_width == pytest.approx(0.1 * 4.302653, rel=1e-6)


def test_one_run_has_no_interval():
    assert estimate([92.1]) == Estimate(92.1, None, 1)
    assert estimate([92.1]).interval() is None
    assert difference(estimate([92.1]), Estimate(91.64, 0.10, 3)) is None
    assert difference(Estimate(91.64, 0.10, 3), estimate([92.1])) is None


def test_no_runs_have_no_mean():
    with pytest.raises(ConfigurationError, match="at least one run"):
        estimate([])


@pytest.mark.parametrize("confidence", [0, 1, -0.1, 95, math.nan])
def test_a_confidence_that_is_none_is_refused(confidence):
    with pytest.raises(ConfigurationError, match=r"confidence=.*between 0 and 1"):
        difference(Estimate(1, 0.1, 3), Estimate(2, 0.1, 3), confidence)


def test_without_scipy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    from chtconv.comparison import statistics

    statistics._quantile.cache_clear()
    with pytest.raises(ConfigurationError, match=r"pip install 'chtconv\[compare\]'"):
        Estimate(92, 0.1, 3).interval()


# ------------------------------------------------------------------------------------------------------ coverage


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    """1,500 comparisons of five correlated pairs at 90 %: a correct interval fails this one time in a thousand."""
    chance = random.Random(0)
    draws, held = 1500, 0
    for _ in range(draws):
        shared = [chance.gauss(72, 0.3) for _ in range(5)]
        a = by_seed(value + 0.7 + chance.gauss(0, 0.2) for value in shared)
        b = by_seed(value + chance.gauss(0, 0.3) for value in shared)
        held += not paired(a, b, 0.9).interval.excludes(0.7)
    low, high = stats.binom.interval(0.999, draws, 0.9)
    assert low <= held <= high


def test_welch_intervals_of_three_runs_hold_the_true_difference_at_least_nearly_as_often():
    """Welch's interval is approximate; with three runs each and unequal spread it errs to the safe side."""
    chance = random.Random(0)
    draws, held = 1500, 0
    for _ in range(draws):
        ours = estimate([chance.gauss(92, 0.3) for _ in range(3)])
        published = estimate([chance.gauss(91.5, 0.15) for _ in range(3)])
        held += not difference(ours, published).excludes(0.5)
    assert 0.94 <= held / draws <= 0.98
