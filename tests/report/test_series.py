"""Means over runs against plain sums, and where values are missing."""

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chtconv.report.run import Run
from chtconv.report.series import curve, evolutions, mean_of, ratio, thinned, weighted

VALUES = st.lists(st.floats(0, 1), min_size=3, max_size=3)


def run(**values: Any) -> Run:
    return Run("run", Path("run"), "done", **values)


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_mean_and_standard_error_are_those_of_the_definition(courses: list[list[float]]) -> None:
    x = np.arange(3.0)
    found = mean_of([(x, np.array(values)) for values in courses])
    assert found is not None
    n = len(courses)
    for place in range(3):
        values = [course[place] for course in courses]
        mean = sum(values) / n
        np.testing.assert_allclose(found.mean[place], mean, atol=1e-12)
        if n > 1:
            deviation = (sum((value - mean) ** 2 for value in values) / (n - 1)) ** 0.5
            np.testing.assert_allclose(found.error[place], deviation / n**0.5, atol=1e-12)
        else:
            assert np.isnan(found.error[place])


def test_runs_of_different_length_are_compared_where_all_have_values() -> None:
    long, short = (np.arange(4.0), np.arange(4.0)), (np.array([1.0, 3.0]), np.array([5.0, 5.0]))
    found = mean_of([long, short])
    assert found is not None
    assert found.x.tolist() == [1, 3]
    assert found.mean.tolist() == [3, 4]


def test_runs_without_any_value_do_not_count() -> None:
    x = np.arange(2.0)
    assert mean_of([]) is None
    assert mean_of([(x, np.full(2, np.nan))]) is None
    found = mean_of([(x, np.full(2, np.nan)), (x, np.array([1.0, np.nan]))])
    assert found is not None
    assert (found.n, found.mean[0]) == (1, 1.0)
    assert np.isnan(found.mean[1])


def test_a_curve_is_in_the_order_of_its_epochs_and_keeps_the_later_row() -> None:
    rows = [{"epoch": 2, "a": 0.2}, {"epoch": 1, "a": 0.1}, {"epoch": 2, "a": 0.3}, {"epoch": 3, "a": "high"}]
    x, y = curve(run(metrics=rows), "a")
    assert x.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(y, [0.1, 0.3, np.nan])


def test_evolutions_are_placed_at_the_epochs_done_and_add_up_over_layers() -> None:
    records = [
        {"step": step, "layer": layer, "removed": removed, "rechosen": 1, "itop": 0.1 * removed, "size": 10 * removed}
        for step in (5, 15)
        for layer, removed in (("a", 1), ("b", 3))
    ]
    trained = run(metrics=[{"epoch": 1, "steps": 10}], records=records)
    x, y = evolutions(trained, ratio("rechosen", "removed"))
    assert x.tolist() == [0.5, 1.5]
    assert y.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(evolutions(trained, weighted("itop"))[1], (0.1 * 10 + 0.3 * 30) / 40)
    assert len(evolutions(run(records=records), ratio("rechosen", "removed"))[0]) == 0


def test_thinning_keeps_the_ends() -> None:
    x = np.arange(1000.0)
    found = mean_of([(x, x)])
    assert found is not None
    few = thinned(found, 50)
    assert (len(few.x), few.x[0], few.x[-1]) == (50, 0, 999)
    assert thinned(few) is few
