"""Which links come: each rule against a plain sort or the probabilities that it is defined by."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_sampled, exactly, sampling_without_replacement, source

from chtconv.initial import random_mask
from chtconv.methods.regrowth import (
    REGROWTHS,
    choose,
    highest_score,
    largest_gradient,
    random_at_turnover,
    sampled_by_score,
    shared_out,
    shuffled,
    smoothed,
    uniform,
)
from chtconv.selection import stochastic_round, take_largest

SEEDS = st.integers(0, 2**31)
ROWS = 20_000


def every(row, rows=ROWS, dtype=torch.float32):
    return torch.tensor([row], dtype=dtype).expand(rows, len(row)).contiguous()


def sampled(weights, count, allowed=None, **options):
    allowed = every([True] * len(weights) if allowed is None else allowed, dtype=torch.bool)
    keys = sampled_by_score(every(weights), source(), allowed_RN=allowed, **options)
    return take_largest(keys, allowed, exactly(ROWS, count))


@pytest.mark.parametrize("rule", REGROWTHS)
@given(links=st.integers(0, 12), share=st.floats(0, 1), seed=SEEDS, positive=st.integers(0, 12))
def test_every_rule_chooses_as_many_as_asked_for_and_nothing_that_is_active(rule, links, share, seed, positive):
    """Also where fewer positions than asked for are worth anything."""
    active = random_mask(4, 12, links, source(seed)) if links else torch.zeros(4, 12, dtype=torch.bool)
    removed = active & (torch.rand(4, 12, generator=source(seed)) < 0.5)
    kept = active & ~removed
    count = stochastic_round(share * (12 - links), 4, source(seed))
    worth = torch.rand(4, 12, generator=source(seed)) * ~kept
    worth[:, positive:] = 0
    for options in ({}, {"temperature": 3.0}, {"temperature": 0.0}, {"explore": 0.5}, {"explore": 1.0}):
        chosen = choose(REGROWTHS[rule], worth.clone(), kept, removed, count, source(seed), **options)
        assert not (chosen & kept).any()
        assert torch.equal(chosen.sum(1), count.most - count.fewer_O.flatten().long())


@pytest.mark.parametrize("keys", [highest_score, largest_gradient])
@given(count=st.integers(0, 10), seed=SEEDS, ties=st.booleans())
def test_the_highest_are_those_of_a_sort(keys, count, seed, ties):
    worth = torch.randn(3, 20, generator=source(seed))
    if ties:
        worth = worth.round()
    if keys is highest_score:
        worth = worth.abs()
    allowed = random_mask(3, 20, 10, source(seed))
    taken = take_largest(keys(worth.clone(), source(seed)), allowed, exactly(3, count))
    for row, may, chosen in zip(worth.abs(), allowed, taken, strict=True):
        wanted = sorted(row[may].tolist(), reverse=True)[:count]
        assert sorted(row[chosen].tolist(), reverse=True) == pytest.approx(wanted, rel=2**-14)


def test_cht_takes_the_highest_scores_then_the_rest_at_random():
    keys = highest_score(every([0.0, 3.0, 0.0, 1.0, 0.0]), source())
    taken = take_largest(keys, every([True] * 5, dtype=torch.bool), exactly(ROWS, 3)).double().mean(0)
    assert taken[1] == taken[3] == 1
    assert (taken[[0, 2, 4]] - 1 / 3).abs().max() < 0.02


def test_set_is_uniform_among_the_disabled():
    keys = uniform(every([5.0, 0.0, 1.0, 100.0, 3.0]), source())
    taken = take_largest(keys, every([True] * 4 + [False], dtype=torch.bool), exactly(ROWS, 2))
    assert_sampled(taken, sampling_without_replacement([1.0] * 4, 2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_chts_samples_without_replacement_by_a_power_of_the_score(temperature):
    weights = [4.0, 2.0, 1.0, 0.5]
    chances = sampling_without_replacement([weight**temperature for weight in weights], 2)
    assert_sampled(sampled(weights, 2, temperature=temperature), chances)


def test_temperature_zero_is_uniform_among_positive_scores_and_they_come_first():
    taken = sampled([4.0, 0.0, 1e-3, 0.5], 2, temperature=0.0)
    assert_sampled(taken, sampling_without_replacement([1.0, 0.0, 1.0, 1.0], 2))
    assert sampled([4.0, 0.0, 1e-3, 0.5], 3, temperature=0.0)[:, [0, 2, 3]].all()


@pytest.mark.parametrize("temperature", [100.0, 1e6, float("inf")])
def test_a_high_temperature_takes_the_highest_scores_in_order(temperature):
    """Of all ranks, although the powers of those after the first are no numbers any more; equal ones at random."""
    weights = [1.0, 0.0, 4.0, 2.0, 0.25, 0.0]
    for count, best in enumerate(([2], [2, 3], [0, 2, 3], [0, 2, 3, 4]), start=1):
        taken = sampled(weights, count, temperature=temperature)
        assert taken.float().mean(0).nonzero().flatten().tolist() == best
    rest = sampled(weights, 5, temperature=temperature).double().mean(0)
    assert (rest[[1, 5]] - 0.5).abs().max() < 0.02
    equal = sampled([1.0, 1.0, 1.0], 1, temperature=temperature)
    assert_sampled(equal, sampling_without_replacement([1.0] * 3, 1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("explore", [0.2, 0.7, 1.0])
def test_explore_mixes_the_probability_with_an_even_one(explore, temperature):
    """Over all candidates, those without score too; a position that is no candidate takes no part."""
    weights, candidates = [4.0, 2.0, 0.0, 1.0, 3.0], [True, True, True, True, False]
    powers = [weight**temperature for weight in weights[:4]]
    mixed = [(1 - explore) * power / sum(powers) + explore / 4 for power in powers]
    # All at once, so that the first draw has this probability and the others are in proportion to it.
    taken = sampled(weights, 2, candidates, explore=explore, temperature=temperature)
    assert_sampled(taken, sampling_without_replacement(mixed, 2))


def test_exploring_a_row_without_scores_is_uniform():
    taken = sampled([0.0] * 4, 2, explore=0.5)
    assert_sampled(taken, sampling_without_replacement([1.0] * 4, 2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_chts_takes_positive_scores_first_and_the_rest_uniformly(temperature):
    taken = sampled([0.0, 1e-4, 0.0, 1e3, 0.0], 3, temperature=temperature).double().mean(0)
    assert taken[1] == taken[3] == 1
    assert (taken[[0, 2, 4]] - 1 / 3).abs().max() < 0.02


@given(links=st.integers(0, 11), seed=SEEDS)
def test_shuffling_deals_the_worth_of_the_candidates_out_anew(links, seed):
    kept = random_mask(3, 12, links, source(seed)) if links else torch.zeros(3, 12, dtype=torch.bool)
    worth = torch.randn(3, 12, generator=source(seed)) * ~kept
    result = shuffled(worth.clone(), ~kept, source(seed))
    for before, after, free in zip(worth, result, ~kept, strict=True):
        assert sorted(before[free].tolist()) == sorted(after[free].tolist())
        assert not after[~free].any()


def test_shuffling_destroys_the_order():
    """Each worth comes to each candidate with equal probability, and in each row anew."""
    result = shuffled(every([5.0, 3.0, 0.0, 1.0]), every([True, True, False, True], dtype=torch.bool), source())
    for value in (5.0, 3.0, 1.0):
        where = (result == value).double().mean(0)
        assert where[2] == 0
        assert (where[[0, 1, 3]] - 1 / 3).abs().max() < 5 * (2 / 9 / ROWS) ** 0.5


def test_shuffled_regrowth_does_not_know_which_position_had_which_score():
    kept, removed = every([True] + [False] * 4, dtype=torch.bool), every([False] * 5, dtype=torch.bool)
    worth = every([0.0, 9.0, 0.0, 0.0, 1.0])
    chosen = choose(REGROWTHS["shuffled_scores"], worth, kept, removed, exactly(ROWS, 1), source())
    assert (chosen.double().mean(0)[1:] - 0.25).abs().max() < 0.02


@given(scored=st.integers(0, 5), seed=SEEDS)
def test_shuffled_regrowth_leaves_the_scores_of_a_layer_in_their_kernel(scored, seed):
    kept = random_mask(6, 12, 5, source(seed)).view(1, -1)
    worth = torch.zeros(6, 12)
    worth[scored] = 1.0
    worth = worth.view(1, -1) * ~kept
    nothing = torch.zeros_like(kept)
    chosen = choose(REGROWTHS["shuffled_scores"], worth, kept, nothing, exactly(1, 7), source(seed), kernels=6)
    assert chosen.view(6, 12).sum(1).tolist() == [7 * (kernel == scored) for kernel in range(6)]


@given(links=st.integers(1, 11), share=st.floats(0, 1), grown=st.integers(0, 3), seed=SEEDS)
def test_the_control_of_turnover_brings_as_many_new_links_in_every_row(links, share, grown, seed):
    active = random_mask(6, 12, links, source(seed))
    removed = active & (torch.rand(6, 12, generator=source(seed)) < share)
    kept = active & ~removed
    fewest = int((~kept).sum(1).min())
    count = stochastic_round(min(fewest, int(removed.sum(1).max()) + grown), 6, source(seed))
    scores = torch.rand(6, 12, generator=source(seed + 1)) * ~kept
    mimicked = choose(REGROWTHS["sampled_by_score"], scores.clone(), kept, removed, count, source(seed))
    chosen = choose(REGROWTHS["random_at_turnover"], scores.clone(), kept, removed, count, source(seed))
    assert torch.equal((chosen & ~active).sum(1), (mimicked & ~active).sum(1))
    assert torch.equal((chosen & removed).sum(1), (mimicked & removed).sum(1))
    assert not (chosen & kept).any()


@given(links=st.integers(1, 40), share=st.floats(0, 1), seed=SEEDS)
def test_the_control_of_turnover_does_so_in_every_kernel_of_a_layer(links, share, seed):
    active = random_mask(6, 12, links, source(seed), "layer").view(1, -1)
    removed = active & (torch.rand(1, 72, generator=source(seed)) < share)
    kept, count = active & ~removed, exactly(1, int(removed.sum()))
    scores = torch.rand(1, 72, generator=source(seed + 1)).pow(4) * ~kept
    mimicked = choose(REGROWTHS["sampled_by_score"], scores.clone(), kept, removed, count, source(seed))
    chosen = choose(REGROWTHS["random_at_turnover"], scores.clone(), kept, removed, count, source(seed), kernels=6)
    for part in (removed, ~active):
        assert torch.equal((chosen & part).view(6, 12).sum(1), (mimicked & part).view(6, 12).sum(1))
    assert not (chosen & kept).any()


def test_the_control_of_turnover_is_uniform_otherwise():
    """Among the removed and among the others, whatever the choice was that it mimics."""
    removed = every([True, True, True, False, False, False, False], dtype=torch.bool)
    kept = every([False] * 6 + [True], dtype=torch.bool)
    mimicked = every([True, True, False, True, False, False, False], dtype=torch.bool)
    chosen = random_at_turnover(mimicked, removed, kept, exactly(ROWS, 3), source())
    assert_sampled(chosen[:, :3], sampling_without_replacement([1.0] * 3, 2))
    assert_sampled(chosen[:, 3:6], sampling_without_replacement([1.0] * 3, 1))
    assert not chosen[:, 6].any()


@given(seed=SEEDS, kernels=st.integers(1, 6), scored=st.integers(0, 6))
def test_shares_of_kernels_are_their_links_or_equal_and_ratios_within_a_kernel_stay(seed, kernels, scored):
    links = torch.rand(kernels, 12, generator=source(seed + 1)) < 0.4
    links[:, 0] = False
    scores = torch.rand(kernels, 12, generator=source(seed)) * ~links
    scores[scored:] = 0
    assert torch.equal(shared_out(scores, links, "scores"), scores)
    for by, wanted in (("links", links.sum(1).float()), ("equal", torch.ones(kernels))):
        shared = shared_out(scores, links, by)
        torch.testing.assert_close(shared.sum(1), wanted)
        assert not shared[links].any()
        for kernel in range(kernels):
            ratios = scores[kernel] if kernel < scored else (~links[kernel]).float()
            torch.testing.assert_close(shared[kernel], ratios * wanted[kernel] / ratios.sum())


@pytest.mark.parametrize("by", ["links", "equal"])
def test_a_kernel_without_a_free_position_gets_no_share(by):
    links = torch.ones(2, 200, dtype=torch.bool)
    links[1, :3] = False
    shared = shared_out(torch.zeros(2, 200), links, by)
    assert not shared[0].any()
    torch.testing.assert_close(shared[1, :3], torch.full((3,), (197 if by == "links" else 1) / 3))


@given(seed=SEEDS, share=st.floats(0, 1), unit=st.floats(0.01, 100))
def test_smoothing_deals_out_a_share_of_each_kernels_scores_by_the_prior(seed, share, unit):
    """The kernels: both known, scores alone, the prior alone, neither. The prior has a unit of its own."""
    scores = torch.rand(4, 6, generator=source(seed)) * (torch.rand(4, 6, generator=source(seed + 1)) < 0.7)
    prior = torch.randint(1, 5, (4, 6), generator=source(seed + 2)).float()
    scores[:2, 0], scores[2:], prior[1], prior[3] = 1.0, 0.0, 0.0, 0.0
    mixed = smoothed(scores, unit * prior, share)
    rate = scores[0].sum() / prior[0].sum()
    torch.testing.assert_close(mixed[0], (1 - share) * scores[0] + share * rate * prior[0])
    torch.testing.assert_close(mixed.sum(1)[:2], scores.sum(1)[:2])
    assert torch.equal(mixed[1], scores[1])
    torch.testing.assert_close(mixed[2], rate * prior[2] if share else scores[2])
    assert not mixed[3].any()


def test_smoothing_where_nothing_is_known_of_both():
    scores, prior = torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert smoothed(scores, prior, 0.5).tolist() == [[0.0, 2.0], [3.0, 1.0]]
    assert not smoothed(torch.zeros(2, 3), torch.zeros(2, 3), 1.0).any()
