"""Topologies of linear layers: exact counts, the regular network stated slowly, and the right probabilities."""

import itertools
from collections import Counter
from fractions import Fraction
from math import comb, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chtconv.errors import ConfigurationError
from chtconv.initial.bipartite import receptive_field, small_world

SIZES = st.integers(1, 24)
SHARES = st.floats(0, 1)


def uniform_receptive_field(outputs, inputs, links, r, generator):
    return receptive_field(outputs, inputs, links, r, generator, degrees="uniform")


MODELS = {"small_world": small_world, "fixed": receptive_field, "uniform": uniform_receptive_field}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def ahead(outputs, inputs, output, i):
    """How far an input is ahead of an output on the ring, from minus a half to a half of the inputs."""
    step = Fraction(2 * i + 1, 2) - Fraction(2 * output + 1, 2) * Fraction(inputs, outputs)
    return (step + Fraction(inputs, 2)) % inputs - Fraction(inputs, 2)


def regular(outputs, inputs, links):
    """The nearest inputs of each output, the following of two that are equally near."""
    mask = torch.zeros(outputs, inputs, dtype=torch.bool)
    for output in range(outputs):
        degree = (output + 1) * links // outputs - output * links // outputs
        offset = {i: ahead(outputs, inputs, output, i) for i in range(inputs)}
        mask[output, sorted(offset, key=lambda i: (abs(offset[i]), offset[i] <= 0))[:degree]] = True
    return mask


def mean_distance(mask):
    outputs, inputs = mask.shape
    return sum(float(abs(ahead(outputs, inputs, *link))) for link in mask.nonzero().tolist()) / int(mask.sum())


@every_model
@given(outputs=SIZES, inputs=SIZES, density=SHARES, randomness=SHARES, seed=st.integers(0, 2**31))
def test_the_number_of_links_is_exact(model, outputs, inputs, density, randomness, seed):
    links = round(density * outputs * inputs)
    mask = model(outputs, inputs, links, randomness, source(seed))
    assert mask.shape == (outputs, inputs)
    assert mask.dtype == torch.bool
    assert mask.sum() == links


@given(outputs=SIZES, inputs=SIZES, density=SHARES)
def test_without_randomness_the_nearest_are_linked(outputs, inputs, density):
    links = round(density * outputs * inputs)
    expected = regular(outputs, inputs, links)
    assert torch.equal(small_world(outputs, inputs, links, 0, source()), expected)
    assert torch.equal(receptive_field(outputs, inputs, links, 0, source()), expected)
    # The exponent of almost no randomness is almost infinite.
    assert torch.equal(receptive_field(outputs, inputs, links, 1e-300, source()), expected)


@given(outputs=SIZES, inputs=SIZES, density=SHARES)
def test_inputs_of_the_regular_network_have_equal_degrees(outputs, inputs, density):
    degrees = small_world(outputs, inputs, outputs * round(density * inputs), 0, source()).sum(0)
    assert degrees.max() - degrees.min() <= 1


@given(outputs=SIZES, inputs=SIZES, density=SHARES, r=SHARES, seed=st.integers(0, 2**31))
def test_fixed_degrees_differ_by_one_at_most(outputs, inputs, density, r, seed):
    links = round(density * outputs * inputs)
    degrees = receptive_field(outputs, inputs, links, r, source(seed)).sum(1)
    assert degrees.max() - degrees.min() <= 1


def test_no_output_is_without_a_link_if_there_are_as_many():
    for links in (40, 60, 120):
        degrees = receptive_field(40, 20, links, 0.5, source(), degrees="uniform").sum(1)
        assert degrees.min() == 1
    assert receptive_field(40, 20, 39, 0.5, source(), degrees="uniform").sum(1).min() == 0


@pytest.mark.parametrize("r", [0.0, 0.3])
def test_uniform_degrees_vary_as_those_of_links_that_fall_at_random(r):
    outputs, inputs, links = 2000, 50, 20_000
    degrees = receptive_field(outputs, inputs, links, r, source(), degrees="uniform").sum(1).double()
    # Beyond the one link of each output: hypergeometric, 18,000 of 98,000 positions.
    drawn, positions = links - outputs, outputs * (inputs - 1)
    variance = drawn / outputs * (1 - 1 / outputs) * (positions - drawn) / (positions - 1)
    assert abs(degrees.var().item() / variance - 1) < 5 * (2 / outputs) ** 0.5


@pytest.mark.parametrize("r", [0.1, 0.25, 0.6, 1.0])
def test_inputs_are_drawn_without_replacement_in_proportion_to_the_score(r):
    """Pairs of inputs of each output, against the sum over the two orders in which a pair can be drawn."""
    outputs, inputs, seeds = 2, 7, 2000
    masks = torch.stack([receptive_field(outputs, inputs, 2 * outputs, r, source(seed)) for seed in range(seeds)])
    for output in range(outputs):
        weights = [(1 + float(abs(ahead(outputs, inputs, output, i)))) ** -((1 - r) / r) for i in range(inputs)]
        share = [weight / sum(weights) for weight in weights]
        for i, j in itertools.combinations(range(inputs), 2):
            expected = share[i] * share[j] * (1 / (1 - share[i]) + 1 / (1 - share[j]))
            found = (masks[:, output, i] & masks[:, output, j]).double().mean().item()
            assert abs(found - expected) < 5 * (expected * (1 - expected) / seeds) ** 0.5 + 1 / seeds


def test_the_share_of_rewired_links_is_exact_and_they_fall_anywhere():
    """What is still local: the links that stay and, hypergeometrically, rewired ones that fall where some were."""
    size, links, seeds = 30, 180, 300
    local = regular(size, size, links)
    for beta in (0.1, 0.5, 0.9):
        rewired = round(beta * links)
        masks = torch.stack([small_world(size, size, links, beta, source(seed)) for seed in range(seeds)])
        returned = (masks & local).sum((1, 2)) - (links - rewired)
        assert returned.min() >= 0
        free = size * size - (links - rewired)
        expected = rewired * rewired / free
        variance = expected * (1 - rewired / free) * (free - rewired) / (free - 1)
        assert abs(returned.double().mean() - expected) < 5 * (variance / seeds) ** 0.5
        # No position is favoured, neither among those that were linked nor among the others.
        for group in (local, ~local):
            count = masks[:, group].double().sum(0)
            rate = count.mean() / seeds
            assert (count / seeds - rate).abs().max() < 6 * (rate * (1 - rate) / seeds) ** 0.5


@pytest.mark.parametrize("links", [2, 3])
def test_a_wholly_rewired_network_is_any_network(links):
    seeds = 1500
    networks = Counter(tuple(small_world(2, 3, links, 1, source(seed)).flatten().tolist()) for seed in range(seeds))
    rate = 1 / comb(6, links)
    assert len(networks) == comb(6, links)
    assert all(abs(count / seeds - rate) < 5 * (rate * (1 - rate) / seeds) ** 0.5 for count in networks.values())


@every_model
@pytest.mark.parametrize(("outputs", "inputs"), [(60, 60), (40, 90), (90, 40)])
def test_locality_falls_with_randomness(model, outputs, inputs):
    distances = [mean_distance(model(outputs, inputs, 540, share, source())) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert distances == sorted(set(distances))
    assert distances[-1] == pytest.approx(inputs / 4, rel=0.1)


@every_model
def test_a_mask_depends_on_its_generator_and_nothing_else(model):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model(20, 30, 90, 0.5, source(7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(model(20, 30, 90, 0.5, source(7)), first)
    assert not torch.equal(model(20, 30, 90, 0.5, source(8)), first)


@every_model
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"outputs": 0}, r"outputs=0: accepted are whole numbers from 1"),
        ({"inputs": 2.5}, r"inputs=2.5: accepted are whole numbers from 1"),
        ({"links": 13}, r"links=13: accepted are whole numbers from 0 to 12, the positions of 4 outputs and 3 inputs"),
        ({"links": -1}, r"links=-1: accepted"),
        ({"links": 1.5}, r"links=1.5: accepted"),
        ({"randomness": 1.1}, r"(beta|r)=1.1: accepted are numbers from 0 to 1"),
        ({"randomness": -0.1}, r"(beta|r)=-0.1: accepted"),
        ({"randomness": nan}, r"(beta|r)=nan: accepted"),
        ({"randomness": "0.5"}, r"(beta|r)='0.5': accepted"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_accepted(model, changed, message):
    values = {"outputs": 4, "inputs": 3, "links": 6, "randomness": 0.5} | changed
    with pytest.raises(ConfigurationError, match=message):
        model(*values.values(), source())


def test_unknown_degrees_are_answered_with_the_nearest():
    with pytest.raises(ConfigurationError, match="unknown degrees 'unform': did you mean 'uniform'"):
        receptive_field(4, 3, 6, 0.5, source(), degrees="unform")
