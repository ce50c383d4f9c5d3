"""Chain removal: dead channels against explicit graphs."""

import copy

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chtconv.errors import ConfigurationError
from chtconv.layers.chains import Link, active_channels, active_rate, remove_dead
from chtconv.layers.consecutive import consecutive_layers

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@st.composite
def chains(draw, prefix: str = ""):
    """Masks of 2 to 5 layers that follow each other, with groups, spreads and empty rows and columns, and the links."""
    lengths = st.integers(2, 5)
    density = draw(st.sampled_from([0.15, 0.3, 0.5, 0.8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    masks, links, inputs = {}, [], draw(st.integers(1, 5))
    for index in range(draw(lengths)):
        groups = draw(st.sampled_from([size for size in (1, 2, 3, inputs) if inputs % size == 0]))
        outputs = groups * draw(st.integers(1, 4 if groups == 1 else 2))
        shape = outputs, inputs // groups, draw(st.sampled_from([1, 2, 9]))
        masks[f"{prefix}{index}"] = torch.rand(shape, generator=generator) < density / shape[2] ** 0.5
        spread = draw(st.sampled_from([1, 1, 2, 3]))
        links.append(Link(f"{prefix}{index}", f"{prefix}{index + 1}", spread))
        inputs = outputs * spread
    return masks, links[:-1]


def layered_graph(masks: dict[str, Tensor], links: list[Link]) -> nx.DiGraph:
    """Every link of a chain as a path of its own from a channel to a channel; nodes are (layer before, channel).

    An input of a layer is a node too, with one edge from the channel that it comes from, so that a spread is seen.
    """
    graph = nx.DiGraph()
    spreads = [1, *(link.spread for link in links)]
    for layer, (mask, spread) in enumerate(zip(masks.values(), spreads, strict=True)):
        outputs, inputs, _ = mask.shape
        total = inputs if not layer else len(list(masks.values())[layer - 1]) * spread
        group_size = outputs // (total // inputs)
        for column in range(total):
            graph.add_edge(("channel", layer, column // spread), ("input", layer, column), kind="spread")
        for row, column, position in mask.nonzero().tolist():
            node = ("link", layer, row, column, position)
            graph.add_edge(("input", layer, row // group_size * inputs + column), node)
            graph.add_edge(node, ("channel", layer + 1, row))
    return graph


def nx_survivors(masks: dict[str, Tensor], links: list[Link]) -> dict[str, Tensor]:
    """The links on a path through the whole chain.

    That equals the fixed point of removing links of channels without a row or a column: a link that is left has one
    that is left before and behind it, up to both ends, as the graph is layered; and no link of a path ever becomes
    the first to be removed. The exception are chains without any path, which stay as they are.
    """
    graph, last = layered_graph(masks, links), len(masks)
    sources = [node for node in graph if node[:2] == ("channel", 0)]
    targets = [node for node in graph if node[:2] == ("channel", last)]
    reached = set(sources).union(*(nx.descendants(graph, node) for node in sources))
    reaching = set(targets).union(*(nx.ancestors(graph, node) for node in targets))
    paths = reached & reaching
    if not paths:
        return masks
    survivors = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for kind, layer, *place in paths:
        if kind == "link":
            survivors[list(masks)[layer]][tuple(place)] = True
    return survivors


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, mask in one.items():
        assert torch.equal(mask, other[name]), name


@given(chains(), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_what_is_left_lies_on_paths_through_the_chain(chain, random):
    masks, links = chain
    before = copy.deepcopy(masks)
    left = remove_dead(masks, random.sample(links, len(links)))
    assert_same(left, nx_survivors(masks, links))
    assert_same(masks, before)
    assert_same(remove_dead(left, links), left)
    assert all((left[name] <= mask).all() for name, mask in masks.items())


@given(chains())
def test_anp_counts_channels_with_links_on_both_sides(chain):
    masks, links = chain
    for each in (masks, remove_dead(masks, links)):
        graph = layered_graph(each, links)
        linked = {node for node in graph if node[0] == "link"}
        rates = []
        for layer, link in enumerate(links, start=1):
            channels = [("channel", layer, index) for index in range(len(each[link.producer]))]
            active = [
                any(before in linked for before in graph.pred[node])
                and any(behind in linked for column in graph.succ[node] for behind in graph.succ[column])
                for node in channels
            ]
            assert active_channels(each, links)[link].tolist() == active
            assert active_rate(each, [link]) == pytest.approx(sum(active) / len(active))
            rates += active
        assert active_rate(each, links) == pytest.approx(sum(rates) / len(rates))


@given(chains("a"), chains("b"))
def test_chains_do_not_know_of_each_other(one, other):
    together = remove_dead({**one[0], **other[0], "alone": torch.zeros(2, 2, 1).bool()}, [*one[1], *other[1]])
    assert not together.pop("alone").any()
    assert_same(together, {**remove_dead(*one), **remove_dead(*other)})


@given(chains(), st.integers(0, 2**31))
def test_fewer_links_never_leave_more(chain, seed):
    masks, links = chain
    keep = torch.Generator().manual_seed(seed)
    fewer = {name: mask & (torch.rand(mask.shape, generator=keep) < 0.8) for name, mask in masks.items()}
    left, left_of_fewer = remove_dead(masks, links), remove_dead(fewer, links)
    if nx_survivors(fewer, links) is not fewer:  # A chain without any path is left as it was.
        assert all((left_of_fewer[name] <= left[name]).all() for name in masks)


def test_a_chain_without_any_path_is_left_as_it_was():
    masks = {"0": torch.ones(3, 2, 9).bool(), "1": torch.zeros(2, 3, 9).bool(), "2": torch.ones(4, 2, 1).bool()}
    links = [Link("0", "1"), Link("1", "2")]
    assert_same(remove_dead(masks, links), masks)
    assert active_rate(masks, links) == 0
    masks["1"][1, 2, 4] = True
    assert {name: int(mask.sum()) for name, mask in remove_dead(masks, links).items()} == {"0": 18, "1": 1, "2": 4}


def test_without_links_nothing_is_removed_and_no_rate_is_known():
    masks = {"0": torch.zeros(3, 2, 9).bool()}
    assert_same(remove_dead(masks, []), masks)
    assert torch.tensor(active_rate(masks, [])).isnan()


@pytest.mark.parametrize(
    ("masks", "links", "message"),
    [
        ({"0": torch.ones(2, 2, 1).bool()}, [Link("0", "1")], "layer 1: accepted is a mask of type bool"),
        ({"0": torch.ones(2, 2, 1), "1": torch.ones(2, 2, 1).bool()}, [Link("0", "1")], "layer 0: accepted is a mask"),
        ({"0": torch.ones(2, 2).bool(), "1": torch.ones(2, 2, 1).bool()}, [Link("0", "1")], r"shape \[O, C, K\]"),
        (
            {"0": torch.ones(3, 2, 1).bool(), "1": torch.ones(2, 2, 1).bool()},
            [Link("0", "1")],
            r"layer 1: a mask of shape \[2, 2, 1\] cannot take the 3 x 1 outputs of 0",
        ),
        ({}, [Link("0", "1"), Link("0", "2")], "branch"),
        ({}, [Link("0", "2"), Link("1", "2")], "branch"),
        ({}, [Link("0", "1"), Link("1", "0")], "circle"),
    ],
)
def test_masks_and_links_that_do_not_fit_are_refused(masks, links, message):
    with pytest.raises(ConfigurationError, match=message):
        remove_dead(masks, links)
    with pytest.raises(ConfigurationError, match=message):
        active_rate(masks, links)


def test_removal_does_not_change_what_a_network_computes():
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, bias=False), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.LeakyReLU()),
        *(nn.Conv2d(12, 16, 3, groups=4, bias=False), nn.MaxPool2d(2), nn.GELU(), nn.Conv2d(16, 6, 1, bias=False)),
        *(nn.Tanh(), nn.Flatten(), nn.Linear(6 * 25, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False)),
    ).double()
    layers = {name: model.get_submodule(name) for name in ("0", "2", "4", "7", "10", "12")}
    density = {"0": 0.15, "2": 0.15, "4": 0.1, "7": 0.1, "10": 0.02, "12": 0.1}
    masks = {name: torch.rand_like(layer.weight) < density[name] for name, layer in layers.items()}
    masks["7"][0], masks["10"][:, :25] = False, False
    for name, layer in layers.items():
        layer.weight.data *= masks[name]
    links = consecutive_layers(model, list(layers))
    left = remove_dead({name: mask.view(*mask.shape[:2], -1) for name, mask in masks.items()}, links)
    images = torch.randn(4, 3, 16, 16, dtype=torch.double)
    before = model(images)
    assert before.abs().sum() > 0
    for name, layer in layers.items():
        assert 0 < left[name].sum() < masks[name].sum(), "the example is to lose links everywhere"
        layer.weight.data *= left[name].view_as(layer.weight)
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------------ consecutive layers
