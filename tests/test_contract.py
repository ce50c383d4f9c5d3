"""What every method promises with every optimizer and layer: exact links, and nothing off the mask, ever."""

import copy
import itertools

import pytest
import torch
from support import (
    FROM,
    OPTIMIZERS,
    assert_exact_links,
    assert_nothing_off_the_mask,
    fresh_state,
    mixed_network,
    small_network,
    sparse,
    state_of,
    train,
)
from torch import nn

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.methods import METHODS

MOVING = ("snfs",)
CASES = list(
    dict.fromkeys(
        [
            *itertools.product(METHODS, ("sgd", "adamw", "rprop"), (None,)),
            *itertools.product(("set", "rigl", "chts"), OPTIMIZERS, (None,)),
            *((method, "adam", "layer") for method in METHODS),
        ]
    )
)


def usual_allocation(method, allocation):
    return allocation or ("layer" if method in MOVING else "kernel")


@pytest.mark.parametrize(("method", "optimizer", "allocation"), CASES)
def test_exact_links_and_nothing_off_the_mask_at_every_step(method, optimizer, allocation):
    """Evolutions after steps 2, 4, 6 and 8 of 12, the last of which brings the last density."""
    model = mixed_network()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    topology = chtconv.sparsify(
        model, optimizer, sparsity=0.6, method=method, zeta=0.4, interval=2, total_steps=12, layers=["*"],
        allocation=allocation,
    )  # fmt: skip
    first, seen = topology.masks, []

    def check():
        progress = min(topology.step_count // 2, 4) / 4
        assert_exact_links(topology, model, method, 0.6, progress, usual_allocation(method, allocation))
        assert_nothing_off_the_mask(topology, model, optimizer)
        seen.append(topology.masks)

    check()
    train(model, optimizer, 10, after=check)
    assert topology.step_count == 10
    assert topology.evolutions == (0 if method == "static" else 4)
    assert any(not torch.equal(mask, first[name]) for name, mask in topology.masks.items()) == (method != "static")
    # At the steps between, nothing changes.
    assert all(torch.equal(mask, seen[2][name]) for name, mask in seen[3].items())
    # Training itself must have happened: active weights moved, so that zeros off the mask say something.
    assert all((dict(model.named_parameters())[name][mask] != 0).any() for name, mask in topology.masks.items())


@pytest.mark.parametrize("prune_dead", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_layers_that_are_pruned_together_have_the_links_of_the_schedule_in_all_or_are_refused(name, prune_dead):
    method = METHODS[name]
    falls = {} if method.removal is None or method.redistribute else {"density": "cubic", "initial_sparsity": 0.2}
    dead = {"prune_dead": True} if prune_dead and method.regrowth is not None else {}
    together = {"sparsity": 0.6, "zeta": 0.4, "interval": 2, "total_steps": 12, "allocation": "model", "layers": ["*"]}
    if method.density == "constant":
        with pytest.raises(ConfigurationError, match=r"layer 0: allocation='model'.*density='constant'"):
            sparse(mixed_network(), method=name, **together)
    if not falls or method.removal != "magnitude":
        message = f"layer 0: allocation='model'.*accepted with it are removal='magnitude'.*{method.removal!r}"
        with pytest.raises(ConfigurationError, match=message):
            sparse(mixed_network(), method=chtconv.method(name, **falls, **dead), **together)
        return
    model, optimizer, topology = sparse(mixed_network(), method=chtconv.method(name, **falls, **dead), **together)
    sizes = {key: mask.numel() for key, mask in topology.masks.items()}

    def check():
        density = 0.4 + 0.4 * (1 - min(topology.step_count // 2, 4) / 4) ** 3
        links = {key: int(mask.sum()) for key, mask in topology.masks.items()}
        assert sum(links.values()) == sum(round(density * size) for size in sizes.values())
        assert min(links.values()) >= 1
        assert_nothing_off_the_mask(topology, model, optimizer)

    check()
    train(model, optimizer, 10, after=check)
    assert any(int(mask.sum()) != round(0.4 * sizes[key]) for key, mask in topology.masks.items())
    resumed = sparse(model=mixed_network(), method=chtconv.method(name, **falls, **dead), **together)[2]
    resumed.load_state_dict(topology.state_dict())
    assert all(torch.equal(mask, resumed.masks[key]) for key, mask in topology.masks.items())


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rprop"])
@pytest.mark.parametrize("method", ["set", "rigl", "snfs", "mest", "granet", "chtss"])
def test_closures_and_clipping(method, optimizer, clip):
    model = small_network()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    topology = chtconv.sparsify(model, optimizer, sparsity=0.6, method=method, interval=2, total_steps=10)

    def check():
        progress = min(topology.step_count // 2, 3) / 3
        assert_exact_links(topology, model, method, 0.6, progress, usual_allocation(method, None))
        assert_nothing_off_the_mask(topology, model, optimizer)

    train(model, optimizer, 7, closure=True, clip=clip, after=check)
    assert topology.evolutions == 3


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 5), (4, 20)),
    "conv2d": (nn.Conv2d(3, 6, 3, stride=2), (3, 9, 7)),
    "conv3d": (nn.Conv3d(3, 4, 2), (3, 5, 5, 5)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3, dilation=2), (6, 7, 7)),
    "grouped1d": (nn.Conv1d(6, 4, 5, groups=2), (6, 12)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, padding="same"), (6, 7, 7)),
    "1x1": (nn.Conv2d(16, 12, 1), (16, 4, 4)),
    "circular": (nn.Conv2d(3, 6, (5, 1), padding=(2, 0), padding_mode="circular"), (3, 7, 6)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 4, stride=2, groups=2), (4, 6)),
    "transposed2d": (nn.ConvTranspose2d(4, 5, 3, stride=2, output_padding=1), (4, 4, 5)),
    "transposed2d grouped": (nn.ConvTranspose2d(6, 9, 3, groups=3), (6, 4, 4)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2, groups=2), (4, 3, 3, 3)),
    "linear": (nn.Linear(20, 7), (20,)),
}


FAMILIES = ("set", "rigl", "snfs", "mest", "granet", "cht", "chts", "chtss", "shuffled")


@pytest.mark.parametrize(
    ("method", "allocation"),
    [case for case in itertools.product(FAMILIES, ("kernel", "layer")) if case != ("snfs", "kernel")],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_under_every_kind_of_method(kind, method, allocation):
    layer, size = LAYERS[kind]
    model = nn.Sequential(copy.deepcopy(layer))
    model[0].reset_parameters()  # seeded here, whatever was drawn while the tests were collected
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    topology = chtconv.sparsify(
        model, optimizer, sparsity=0.7, method=method, zeta=0.5, interval=1, stop=4, layers=["*"],
        allocation=allocation,
    )  # fmt: skip
    first = topology.masks["0.weight"]
    for step in range(1, 4):
        optimizer.zero_grad()
        model(torch.randn(2, *size)).square().sum().backward()
        optimizer.step()
        assert_exact_links(topology, model, method, 0.7, step / 3, allocation)
        assert_nothing_off_the_mask(topology, model, optimizer)
    assert topology.evolutions == 3
    assert not torch.equal(topology.masks["0.weight"], first)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.regrowth])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "rprop", "adagrad"])
def test_new_links_start_fresh_and_chosen_again_ones_are_untouched(method, optimizer):
    model = mixed_network()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    topology = chtconv.sparsify(
        model, optimizer, sparsity=0.5, method=method, zeta=0.5, interval=10, stop=11, layers=["*"]
    )
    train(model, optimizer, 3)
    topology.capture_gradients()
    model(torch.randn(8, 3, 8, 8)).square().sum().backward()
    parameters, before = dict(model.named_parameters()), topology.masks
    weights = {name: parameters[name].detach().clone() for name in before}
    states = {n: {k: s.clone() for k, s in state_of(optimizer, parameters[n]).items()} for n in before}
    topology.evolve()
    seen_new = 0
    for name, mask in topology.masks.items():
        weight, new, kept = parameters[name], mask & ~before[name], mask & before[name]
        seen_new += int(new.sum())
        assert not weight[new].any()
        assert kept.any()
        assert torch.equal(weight[kept], weights[name][kept])
        fresh = fresh_state(optimizer, weight)
        for key, state in state_of(optimizer, weight).items():
            assert (state[new] == fresh[key]).all()
            assert torch.equal(state[kept], states[name][key][kept])
    assert seen_new > 0
    rechosen = sum(row["rechosen"] for row in topology.records)
    assert rechosen > 0, "the case of a link that is removed and chosen again did not occur"


def test_the_methods_whose_density_changes_are_those_that_these_tests_know():
    assert {name for name, method in METHODS.items() if method.density != "constant"} == set(FROM)
    assert {name: METHODS[name].initial_sparsity for name in FROM} == FROM
    assert {name for name, method in METHODS.items() if method.moves_links} == set(MOVING)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_optimizers_that_step_all_weights_at_once(optimizer, clip, foreach):
    model = small_network()
    optimizer = optimizer(model.parameters(), lr=0.01, weight_decay=0.1, foreach=foreach)
    topology = sparse(model, optimizer, sparsity=0.8, method="chts", interval=1)[2]
    train(model, optimizer, 4, clip=clip, after=lambda: assert_nothing_off_the_mask(topology, model, optimizer))
