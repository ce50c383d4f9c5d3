"""Removal, regrowth and one whole evolution of a layer."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chtconv import regrowth
from chtconv.evolution import evolve
from chtconv.initial import links_per_kernel, random_mask
from chtconv.methods import METHODS
from chtconv.removal import smallest_magnitudes
from chtconv.selection import Count, take_largest

EVOLVING = [name for name, method in METHODS.items() if method.regrowth]


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def exactly(kernels, count):
    return Count(count, torch.zeros(kernels, 1, dtype=torch.bool))


def test_removal_takes_the_smallest_active_magnitudes():
    weight = torch.tensor([[0.5, -0.1, 0.0, 0.3, -0.2], [1.0, 0.0, -3.0, 2.0, 0.1]])
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 0]]).bool()
    removed = smallest_magnitudes(weight, mask, exactly(2, 2), source())
    assert removed.tolist() == [[False, True, False, False, True], [True, False, False, True, False]]


def test_new_links_that_are_still_zero_go_first_and_at_random():
    weight, mask = torch.zeros(4000, 6), torch.ones(4000, 6, dtype=torch.bool)
    weight[:, 3:] = 1
    removed = smallest_magnitudes(weight, mask, exactly(4000, 1), source()).double().mean(0)
    assert not removed[3:].any()
    assert (removed[:3] - 1 / 3).abs().max() < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_removal_takes_any_floating_point_type(dtype):
    weight = torch.tensor([[0.5, 0.25, 1.0]], dtype=dtype)
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert smallest_magnitudes(weight, mask, exactly(1, 1), source()).tolist() == [[False, True, False]]


def test_set_is_uniform_among_the_disabled():
    scores = torch.tensor([[5.0, 0.0, 1.0, 100.0]]).expand(8000, 4).contiguous()
    allowed = torch.ones(8000, 4, dtype=torch.bool)
    taken = take_largest(regrowth.uniform(scores, source()), allowed, exactly(8000, 1)).double().mean(0)
    assert (taken - 0.25).abs().max() < 0.025


def test_cht_takes_the_highest_scores_then_the_rest_at_random():
    scores = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]]).expand(6000, 5).contiguous()
    allowed = torch.ones(6000, 5, dtype=torch.bool)
    taken = take_largest(regrowth.highest_score(scores, source()), allowed, exactly(6000, 3)).double().mean(0)
    assert taken[1] == taken[3] == 1
    assert (taken[[0, 2, 4]] - 1 / 3).abs().max() < 0.03


def sampling_without_replacement(weights, count):
    """The probability of each set, by enumerating the orders in which it can be drawn."""
    chances = {}
    for order in itertools.permutations(range(len(weights)), count):
        chance, left = 1.0, sum(weights)
        for i in order:
            chance, left = chance * weights[i] / left, left - weights[i]
        chances[frozenset(order)] = chances.get(frozenset(order), 0) + chance
    return chances


def test_chts_samples_without_replacement_in_proportion_to_the_score():
    weights, kernels = [4.0, 2.0, 1.0, 0.5], 20_000
    scores = torch.tensor([weights]).expand(kernels, 4).contiguous()
    keys = regrowth.sampled_by_score(scores, source())
    taken = take_largest(keys, torch.ones(kernels, 4, dtype=torch.bool), exactly(kernels, 2))
    sets = [frozenset(row.nonzero().flatten().tolist()) for row in taken]
    for chosen, chance in sampling_without_replacement(weights, 2).items():
        assert abs(sets.count(chosen) / kernels - chance) < 5 * (chance * (1 - chance) / kernels) ** 0.5


def test_chts_takes_positive_scores_first_and_the_rest_uniformly():
    scores = torch.tensor([[0.0, 1e-6, 0.0, 1e3, 0.0]]).expand(6000, 5).contiguous()
    allowed = torch.ones(6000, 5, dtype=torch.bool)
    taken = take_largest(regrowth.sampled_by_score(scores, source()), allowed, exactly(6000, 3)).double().mean(0)
    assert taken[1] == taken[3] == 1
    assert (taken[[0, 2, 4]] - 1 / 3).abs().max() < 0.03


@pytest.mark.parametrize("name", EVOLVING)
@given(
    links=st.integers(1, 30),
    zeta=st.floats(0.01, 1),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from(["no", "few", "all"]),
)
def test_an_evolution_keeps_the_number_of_links_of_every_kernel(name, links, zeta, seed, spread):
    mask = random_mask(4, 30, links, source(seed))
    weight = torch.randn(4, 30, generator=source(seed)) * mask
    scores = torch.rand(4, 30, generator=source(seed)) * {"no": 0, "few": 1, "all": 1}[spread]
    if spread == "few":
        scores[:, 3:] = 0
    evolved = evolve(
        weight, mask, method=METHODS[name], links=links, zeta=zeta,
        link_scores=lambda kept: scores * ~kept, generator=source(seed),
    )  # fmt: skip
    assert (evolved.mask.sum(1) == links).all()
    assert not (evolved.removed & ~mask).any()
    assert ((evolved.removed.sum(1) - zeta * links).abs() < 1).all()
    assert (mask & ~evolved.removed & ~evolved.mask).sum() == 0
    if links == 30:
        assert torch.equal(evolved.mask, mask)


def test_a_single_link_evolves_at_the_rate_of_zeta():
    """The first convolution has one link a kernel at 95 %: rounding down, it would never change."""
    mask = random_mask(20_000, 27, 1, source())
    evolved = evolve(
        mask.float(), mask, method=METHODS["set"], links=1, zeta=0.3,
        link_scores=lambda kept: kept.float(), generator=source(1),
    )  # fmt: skip
    assert abs(evolved.removed.sum().item() / 20_000 - 0.3) < 0.02


@given(sparsity=st.floats(0, 0.99), positions=st.integers(1, 5000))
def test_links_per_kernel_is_the_nearest_whole_number(sparsity, positions):
    wanted = (1 - sparsity) * positions
    if wanted <= 0.5:
        with pytest.raises(ValueError, match="would hold no link"):
            links_per_kernel(sparsity, positions, "layer")
    else:
        assert abs(links_per_kernel(sparsity, positions, "layer") - wanted) <= 0.5


def test_initial_masks_are_uniform():
    mask = random_mask(8000, 20, 6, source()).double()
    assert (mask.sum(1) == 6).all()
    assert (mask.mean(0) - 0.3).abs().max() < 0.03
