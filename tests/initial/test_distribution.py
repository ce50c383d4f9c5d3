"""Densities of layers: the rule of Erdős-Rényi-Kernel found another way, and numbers that others published."""

from math import nan, prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.initial.distribution import DISTRIBUTIONS, distributed, erk, uniform

SHAPES = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8).map(
    lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)}
)
SPARSITIES = st.floats(0, 0.999)


def oracle(shapes, sparsity):
    """The rule of the paper as it stands, with the ε that gives the right number of links found by bisection."""

    def densities(epsilon):
        return {name: min(1.0, epsilon * sum(shape) / prod(shape)) for name, shape in shapes.items()}

    links = (1 - sparsity) * sum(prod(shape) for shape in shapes.values())
    low, high = 0.0, float(max(prod(shape) / sum(shape) for shape in shapes.values()))
    for _ in range(200):
        middle = (low + high) / 2
        found = sum(density * prod(shapes[name]) for name, density in densities(middle).items())
        low, high = (middle, high) if found < links else (low, middle)
    return densities(high)


@given(SHAPES, SPARSITIES)
def test_erk_is_the_rule_of_the_paper(shapes, sparsity):
    assert erk(shapes, sparsity) == pytest.approx(oracle(shapes, sparsity), rel=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@given(SHAPES, SPARSITIES)
def test_densities_are_in_range_and_have_the_links_of_the_sparsity(distribution, shapes, sparsity):
    densities = distribution(shapes, sparsity)
    assert list(densities) == list(shapes)
    assert all(0 < density <= 1 for density in densities.values())
    links = sum(density * prod(shapes[name]) for name, density in densities.items())
    assert links == pytest.approx((1 - sparsity) * sum(map(prod, shapes.values())), rel=1e-12)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@given(SHAPES, SPARSITIES, SPARSITIES)
def test_no_layer_is_denser_at_a_higher_sparsity(distribution, shapes, one, other):
    denser, sparser = distribution(shapes, min(one, other)), distribution(shapes, max(one, other))
    assert all(sparser[name] <= denser[name] for name in shapes)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@given(SHAPES)
def test_a_sparsity_of_zero_is_dense(distribution, shapes):
    assert distribution(shapes, 0) == dict.fromkeys(shapes, 1.0)


def test_the_table_has_both_distributions():
    assert list(DISTRIBUTIONS.items()) == [("uniform", uniform), ("erk", erk)]


def test_linear_layers_have_as_many_links_as_erdos_renyi_gives_them():
    shapes = {"1": (300, 784), "2": (100, 300), "3": (10, 100)}
    densities = erk(shapes, 0.9)
    epsilon = {name: densities[name] * prod(shape) / sum(shape) for name, shape in shapes.items() if name != "3"}
    assert densities["3"] == 1  # it would be 1.7
    assert epsilon["1"] == pytest.approx(epsilon["2"])
    assert epsilon["1"] * (1084 + 400) + 1000 == pytest.approx(0.1 * 266_200)


def test_the_inputs_of_a_grouped_convolution_are_those_that_a_kernel_sees():
    densities = erk({"grouped": (64, 16, 3, 3), "large": (512, 512, 3, 3)}, 0.95)
    score = {"grouped": (64 + 16 + 3 + 3) / (64 * 16 * 9), "large": (512 + 512 + 3 + 3) / (512 * 512 * 9)}
    assert densities["grouped"] < 1
    assert densities["grouped"] / densities["large"] == pytest.approx(score["grouped"] / score["large"])


def resnet50():
    """Shape and output size of each layer of ResNet-50 on 224 x 224 images, with strides in the 3 x 3 convolutions."""
    layers = {"stem": ((64, 3, 7, 7), 112), "head": ((1000, 2048), 1)}
    channels, before = 64, 56
    for stage, (width, blocks, size) in enumerate([(64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)]):
        for block in range(blocks):
            layers[f"{stage}.{block}.reduce"] = (width, channels, 1, 1), before
            layers[f"{stage}.{block}.conv"] = (width, width, 3, 3), size
            layers[f"{stage}.{block}.expand"] = (4 * width, width, 1, 1), size
            if block == 0:
                layers[f"{stage}.{block}.shortcut"] = (4 * width, channels, 1, 1), size
            channels, before = 4 * width, size
    return layers


def wide_resnet22():
    """Shape and output size of each layer of the wide ResNet-22-2 on 32 x 32 images."""
    layers = {"stem": ((16, 3, 3, 3), 32), "head": ((10, 128), 1)}
    channels = 16
    for stage, (width, size) in enumerate([(32, 32), (64, 16), (128, 8)]):
        for block in range(3):
            layers[f"{stage}.{block}.1"] = (width, channels, 3, 3), size
            layers[f"{stage}.{block}.2"] = (width, width, 3, 3), size
            if block == 0:
                layers[f"{stage}.{block}.shortcut"] = (width, channels, 1, 1), size
            channels = width
    return layers


@pytest.mark.parametrize(
    ("layers", "sparsity", "published"),
    [
        # The table "Best Sparse Models" of github.com/google-research/rigl and table 2 of the paper; they also count
        # what is not sparse: normalisation, pooling, additions.
        (resnet50(), 0.8, 0.42),
        (resnet50(), 0.9, 0.24),
        (resnet50(), 0.95, 0.12),
        (resnet50(), 0.965, 0.09),
        # Sundar and Dwaraknath, "[Reproducibility Report] Rigging the Lottery" (2021).
        (wide_resnet22(), 0.8, 0.35),
    ],
)
def test_flops_of_erk_are_those_published(layers, sparsity, published):
    densities = erk({name: shape for name, (shape, _) in layers.items()}, sparsity)
    flops = {name: prod(shape) * size**2 for name, (shape, size) in layers.items()}
    share = sum(densities[name] * flops[name] for name in layers) / sum(flops.values())
    assert share == pytest.approx(published, abs=0.0075)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, nan, "0.9", None])
def test_an_impossible_sparsity_is_named_with_what_is_accepted(distribution, sparsity):
    with pytest.raises(ConfigurationError, match=r"sparsity=.*accepted are numbers from 0 up to") as error:
        distribution({"conv": (4, 4)}, sparsity)
    assert repr(sparsity) in str(error.value)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(), (4,), (4, 0), (4, 4, -3, 3)])
def test_an_impossible_shape_is_named_with_its_layer(distribution, shape):
    with pytest.raises(
        ConfigurationError, match=r"layer second: shape \(.*accepted are shapes \(outputs, inputs"
    ) as error:
        distribution({"first": (4, 4), "second": shape}, 0.5)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    ("densities", "message"),
    [
        ({"b": 0.5}, "layer a: the distribution 'mine' gave the density None; accepted are numbers above 0"),
        ({"a": 0.5, "b": 1.5}, r"layer b: .* gave the density 1\.5"),
        ({"a": 0.0, "b": 0.5}, r"layer a: .* gave the density 0\.0"),
        ({"a": nan, "b": 0.5}, "layer a: .* gave the density nan"),
        ({"a": "half", "b": 0.5}, "layer a: .* gave the density 'half'"),
        ([0.5, 0.5], "layer a: .* gave the density None"),
    ],
)
def test_densities_of_an_own_distribution_are_checked(densities, message, monkeypatch):
    monkeypatch.setitem(DISTRIBUTIONS, "mine", lambda shapes, sparsity: densities)
    with pytest.raises(ConfigurationError, match=message):
        distributed("mine", {"a": (4, 2), "b": (2, 2)}, 0.5)


def test_layers_have_the_densities_of_an_own_distribution(monkeypatch):
    def mine(shapes, sparsity):
        return {name: (1 - sparsity) / place for place, name in enumerate(reversed(shapes), start=1)}

    monkeypatch.setitem(DISTRIBUTIONS, "mine", mine)
    assert distributed("mine", {"a": (4, 2), "b": (2, 2)}, 0.5) == {"a": 0.25, "b": 0.5}
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = chtconv.sparsify(model, optimizer, method="set", sparsity=0.5, distribution="mine").stats()["layers"]
    assert [layer["density"] for layer in layers.values()] == pytest.approx([0.25, 0.5], abs=1 / 36)


def test_an_unknown_distribution_is_named():
    with pytest.raises(ConfigurationError, match="unknown distribution 'ekr': did you mean 'erk'"):
        distributed("ekr", {"a": (4, 2)}, 0.5)
