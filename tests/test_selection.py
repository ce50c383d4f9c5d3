"""Choosing links: exact counts, no bias among equals, and the right probabilities."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chtconv import selection
from chtconv.errors import RuleError
from chtconv.selection import (
    Count,
    by_value,
    count_true,
    exponentials,
    in_chunks,
    random_integers,
    stochastic_round,
    take_largest,
    take_smallest_links,
)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    kernels=st.integers(1, 5),
    positions=st.integers(1, 40),
    value=st.floats(0, 10),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["int32", "int64", "float32"]),
)
def test_counts_are_exact_and_only_allowed_positions_are_taken(kernels, positions, value, seed, kind):
    value = min(value, positions)
    count = stochastic_round(value, kernels, source(seed))
    allowed = torch.zeros(kernels, positions, dtype=torch.bool)
    for row in allowed:
        row[torch.randperm(positions, generator=source(seed))[: max(count.most, positions // 2)]] = True
    like = torch.zeros(kernels, positions)
    keys = {
        "int32": random_integers(like, source(seed)),
        "int64": by_value(like, source(seed)),
        "float32": 1 / exponentials(like, source(seed)),
    }[kind]
    taken = take_largest(keys, allowed, count)
    assert not (taken & ~allowed).any()
    assert torch.equal(taken.sum(1), count.most - count.fewer_O.flatten().long())
    assert set(taken.sum(1).tolist()) <= {int(value), -int(-value // 1)}


@pytest.mark.parametrize("wrong", [0.0, -0.0, -1.0, float("nan")])
def test_keys_that_are_not_above_zero_are_refused_where_they_would_be_taken(wrong):
    keys, allowed = torch.tensor([[3.0, wrong, 2.0]]), torch.tensor([[True, True, False]])
    with pytest.raises(RuleError, match=rf"gave the key {wrong} to a position"):
        take_largest(keys.clone(), allowed, Count(2, torch.tensor([[False]])))
    if not math.isnan(wrong):
        assert take_largest(keys, allowed, Count(2, torch.tensor([[True]]))).tolist() == [[True, False, False]]


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=30), st.booleans())
def test_keys_are_in_the_order_of_the_magnitudes(values, smallest):
    keys = by_value(torch.tensor([values]), source(), smallest=smallest)[0]
    for i, j in itertools.combinations(range(len(values)), 2):
        if abs(values[i]) != abs(values[j]):
            assert (keys[i] > keys[j]).item() == ((abs(values[i]) > abs(values[j])) != smallest)
    assert (keys > 0).all()


@pytest.mark.parametrize("error", [2.0**-22, -(2.0**-23)], ids=["above", "below"])
def test_values_that_differ_by_rounding_errors_are_equal_and_others_are_not(error):
    """On either side of a round number, which scores often are."""
    values = torch.tensor([[1.0, 1.0 + error, 1.0 + 2**-12]]).expand(2000, 3)
    keys = by_value(values, source(), drop_bits=8)
    assert 800 < (keys[:, 0] > keys[:, 1]).sum() < 1200
    assert (keys[:, 2] > keys[:, 1]).all()


@pytest.mark.parametrize("smallest", [False, True])
def test_ties_are_broken_without_favour(smallest):
    """Of 20 equal values 5 are taken: each position in a quarter of 8,000 kernels, within 5 standard deviations."""
    kernels, positions, most = 8000, 20, 5
    values = torch.full((kernels, positions), 0.25)
    nobody = torch.zeros(kernels, 1, dtype=torch.bool)
    keys = by_value(values, source(3), smallest=smallest)
    taken = take_largest(keys, torch.ones_like(values, dtype=torch.bool), Count(most, nobody)).double()
    rate = most / positions
    assert (taken.mean(0) - rate).abs().max() < 5 * (rate * (1 - rate) / kernels) ** 0.5
    # And no pair of positions goes together more often than it would by chance.
    together = (taken.T @ taken / kernels)[~torch.eye(positions, dtype=torch.bool)]
    chance = rate * (most - 1) / (positions - 1)
    assert (together - chance).abs().max() < 6 * (chance * (1 - chance) / kernels) ** 0.5


@given(data=st.data(), kernels=st.integers(1, 5), positions=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_the_smallest_links_are_those_that_sorting_finds(data, kernels, positions, seed):
    links = data.draw(st.integers(1, positions))
    count = stochastic_round(data.draw(st.floats(0, links)), kernels, source(seed))
    values = torch.randn(kernels, positions, generator=source(seed)).mul(2).round_()
    order = torch.stack([torch.randperm(positions, generator=source(seed + o)) for o in range(kernels)])
    mask = order < links
    taken = take_smallest_links(values, mask, links, count, source(seed))
    for o in range(kernels):
        wanted = count.most - int(count.fewer_O[o])
        active = sorted(values[o][mask[o]].abs().tolist())
        assert sorted(values[o][taken[o]].abs().tolist()) == active[:wanted]
        assert not (taken[o] & ~mask[o]).any()


def test_ties_among_the_smallest_links_are_broken_without_favour():
    kernels, positions, links, most = 8000, 24, 20, 5
    mask = torch.ones(kernels, positions, dtype=torch.bool)
    mask[:, [0, 7, 8, 23]] = False
    count = Count(most, torch.zeros(kernels, 1, dtype=torch.bool))
    taken = take_smallest_links(torch.zeros(kernels, positions), mask, links, count, source(4)).double().mean(0)
    rate = most / links
    assert not taken[~mask[0]].any()
    assert (taken[mask[0]] - rate).abs().max() < 5 * (rate * (1 - rate) / kernels) ** 0.5


@given(kernels=st.integers(0, 30), positions=st.integers(1, 30), at_once=st.integers(1, 300))
def test_chunks_are_all_rows_in_order(kernels, positions, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_CHUNK", at_once)
        chunks = in_chunks(torch.empty(kernels, positions))
    assert [o for some in chunks for o in range(kernels)[some]] == list(range(kernels))
    assert all(len(range(kernels)[some]) * positions <= max(at_once, positions) for some in chunks)


def test_random_integers_are_uniform_and_never_zero():
    draws = random_integers(torch.empty(1000, 333), source())
    assert draws.min() >= 1
    bins = torch.bincount((draws.flatten().long() * 16) >> 31, minlength=16).double() / draws.numel()
    assert (bins - 1 / 16).abs().max() < 5 * (1 / 16 / draws.numel()) ** 0.5


def test_exponentials_have_the_right_distribution():
    draws = exponentials(torch.empty(1000, 500), source()).flatten().double()
    assert draws.min() > 0
    assert draws.isfinite().all()
    for x in (0.001, 0.1, 1.0, 3.0):
        share, expected = (draws < x).double().mean(), 1 - torch.tensor(-x, dtype=torch.float64).exp()
        assert (share - expected).abs() < 5 * (expected * (1 - expected) / draws.numel()) ** 0.5


@pytest.mark.parametrize("integer", [1, 2**31 - 1])
def test_exponentials_of_the_least_and_the_largest_integer_are_no_exceptions(integer, monkeypatch):
    """They turn up once in a billion draws."""
    monkeypatch.setattr(selection, "random_integers", lambda like, _: torch.full_like(like, integer, dtype=torch.int32))
    (draw,) = exponentials(torch.empty(1), source())
    assert 0 < draw < float("inf")
    # The quantile of where the integer is among all, but for the rounding of float32 just below 1.
    assert draw == pytest.approx(-math.log1p(-integer / 2**31), rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exponentials_are_float32_whatever_the_usual_type(dtype):
    like, before = torch.empty(3, 500), torch.get_default_dtype()
    expected = exponentials(like, source())
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(exponentials(like, source()), expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 2.5, 7.0])
def test_stochastic_rounding_is_right_on_average(value):
    count = stochastic_round(value, 20_000, source())
    drawn = count.most - count.fewer_O.double()
    assert abs(drawn.mean().item() - value) < 5 * 0.5 / 20_000**0.5
    assert set(drawn.flatten().tolist()) <= {float(int(value)), float(-int(-value // 1))}


@given(st.integers(0, 6000), st.floats(0, 1), st.integers(0, 2**31))
def test_true_entries_are_counted(size, share, seed):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
    assert count_true(mask) == sum(mask.tolist())


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_true_entries_are_counted_in_every_memory_order(share):
    mask = torch.rand(40, 30, 3, 5) < share
    for view in (
        mask,
        mask.to(memory_format=torch.channels_last),
        mask.mT,
        mask[::2],
        mask[:, 1:, ::2],
        mask.flatten()[3:],
    ):
        assert count_true(view) == sum(view.flatten().tolist())
