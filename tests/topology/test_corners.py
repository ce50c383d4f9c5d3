"""What users do that nobody planned for: refused states, callbacks that detach, several optimizers, odd layers."""

import pytest
import torch
from support import small_network, sparse, train
from torch import nn
from torch.nn.utils import parametrizations, prune

import chtconv
from chtconv.errors import ConfigurationError


def test_a_state_that_is_refused_leaves_the_model_alone():
    topology = sparse(sparsity=0.5)[2]
    state = topology.state_dict()
    topology.detach()
    other = small_network()
    before = [parameter.detach().clone() for parameter in other.parameters()]
    for wrong in (state, {}, 5):
        with pytest.raises(ConfigurationError, match=r"mask to load has|accepted is what topology.state_dict"):
            sparse(other, sparsity=0.9, state=wrong)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert sparse(other, sparsity=0.5, state=state)[2].masks.keys() == state["masks"].keys()


class Foreign(torch.optim.SGD):
    """Of which nobody knows that it keeps zeros: weights are masked after its steps."""


@pytest.mark.parametrize("kind", [torch.optim.SGD, Foreign])
def test_a_callback_may_detach(kind):
    model = small_network()
    model, optimizer, topology = sparse(model, kind(model.parameters(), lr=0.1), interval=2, method="set")
    optimizer.register_step_post_hook(lambda *_: None)
    topology.on_evolution(lambda each: each.detach())
    train(model, optimizer, 5)
    assert topology.evolutions == 1
    assert any((parameter != 0).all() for parameter in model.parameters() if parameter.ndim == 4)
    with pytest.raises(ConfigurationError, match="was detached"):
        topology.evolve()


def test_a_callback_may_write_weights():
    model, optimizer, topology = sparse(interval=2, method="set")
    seen = []
    topology.on_evolution(lambda _: seen.append(torch.is_grad_enabled()) or model[0].weight.mul_(0.5))
    train(model, optimizer, 2)
    topology.evolve()
    assert seen == [False, False]


def test_steps_by_hand_of_a_topology_that_was_detached_are_refused():
    model, optimizer, topology = sparse(interval=1, method="set")
    train(model, optimizer, 1)
    topology.detach()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    with pytest.raises(ConfigurationError, match="was detached"):
        topology.step()
    assert (model[0].weight == 1).all()


def test_a_gradient_that_is_written_behind_the_back_of_torch_is_seen():
    """Into the same tensor again and again, through ``.data`` or NumPy, which counts no version."""
    model, optimizer, topology = sparse(nn.Sequential(nn.Linear(6, 8)), layers=["*"], method="rigl", interval=2)
    written = torch.arange(48.0).view(8, 6) + 1
    model[0].weight.grad = torch.zeros(8, 6)
    for _ in range(4):
        model[0].weight.grad.data.copy_(written)
        before = topology.masks["0.weight"]
        optimizer.step()
    assert topology.evolutions == 2
    new, moved = topology.masks["0.weight"] & ~before, 0
    for came, free, gradient in zip(new, ~before, written, strict=True):
        largest = gradient[free].topk(int(came.sum())).values.tolist()
        assert sorted(gradient[came].tolist(), reverse=True) == largest
        moved += len(largest)
    assert moved > 0


def test_the_dense_gradient_of_an_optimizer_is_final_when_it_has_stepped():
    """As in a GAN, where the loss of the second network reaches the first one after it has stepped."""
    first, second = nn.Linear(6, 8), nn.Linear(8, 8)
    model = nn.Sequential(first, second)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in model]
    topology = chtconv.sparsify(model, optimizers, method="rigl", interval=1, layers=["*"], sparsity=0.5)
    first(torch.randn(4, 6)).square().sum().backward()
    optimizers[0].step()
    (kept, _), expected = topology._layers, topology._layers[0].dense_gradient.captured.clone()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=False)
    model(torch.randn(4, 6)).sum().backward()
    assert torch.equal(kept.dense_gradient.captured, expected)
    optimizers[1].step()
    assert topology.evolutions == 1


def test_a_layer_may_take_its_input_as_it_likes():
    class Named(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    class Listed(nn.Conv2d):
        def forward(self, images):
            return [super(Listed, self).forward(each) for each in images]

    model = nn.ModuleList([Named(3, 4, 3), Listed(3, 4, 3)])
    topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method="set")
    model[0](x=torch.randn(1, 3, 8, 9))
    model[1]([torch.randn(1, 3, 8, 8)])
    assert [layer.input_size for layer in topology._layers] == [(8, 9), None]


def test_a_layer_that_was_replaced_is_named_when_links_evolve():
    model, optimizer, topology = sparse(method="set", interval=2)
    model[3] = nn.Conv2d(8, 8, 3, stride=2, groups=2)
    optimizer.add_param_group({"params": model[3].parameters()})
    masks = topology.masks
    with pytest.raises(ConfigurationError, match=r"layer 3\.weight: the model does not have it any more.*detach\(\)"):
        train(model, optimizer, 2)
    assert all(torch.equal(mask, topology.masks[name]) for name, mask in masks.items())
    topology.detach()
    again = chtconv.sparsify(model, optimizer, method="set", interval=2)
    train(model, optimizer, 2)
    assert again.evolutions == 1


def test_layers_evolve_where_the_module_that_held_them_is_gone():
    layers = list(small_network())
    optimizer = torch.optim.SGD([weight for layer in layers for weight in layer.parameters()], lr=0.1)
    topology = chtconv.sparsify(nn.ModuleList(layers), optimizer, method="set", interval=1)
    train(nn.Sequential(*layers), optimizer, 1)
    assert topology.evolutions == 1


@pytest.mark.parametrize(
    "compute",
    [parametrizations.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.1)],
    ids=["weight_norm", "prune"],
)
def test_a_weight_that_is_computed_from_others_since_is_named(compute):
    model, optimizer, topology = sparse(method="set", interval=2)
    compute(model[3])
    for use in (lambda: train(model, optimizer, 1), topology.state_dict, topology.evolve):
        with pytest.raises(ConfigurationError, match=r"layer 3\.weight: its weight is computed .*Call detach\(\)"):
            use()
    topology.detach()
    train(model, optimizer, 1)


def test_weights_that_were_replaced_are_named():
    model, optimizer, topology = sparse(method="set")
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: its weight is another parameter .*assign=True"):
        optimizer.step()
    topology.detach()
    again = torch.optim.SGD(model.parameters(), lr=0.1)
    assert chtconv.sparsify(model, again, method="set", state=topology.state_dict()).masks.keys()


@pytest.mark.parametrize("lacking", ["links", "explored", "newest", "stopped", "link_steps", "dense_steps", "momentum"])
def test_a_state_that_lacks_something_is_refused_before_anything_is_loaded(lacking):
    topology = sparse(sparsity=0.5, seed=1)[2]
    state = sparse(sparsity=0.5, seed=2)[2].state_dict()
    del state["layers"]["5.weight"][lacking]
    before = topology.masks
    with pytest.raises(ConfigurationError, match=rf"layer 5\.weight: the state to load lacks {lacking}"):
        topology.load_state_dict(state)
    for part in ("masks", "layers"):
        for wrong in (5, dict.fromkeys(state[part], 5)):
            with pytest.raises(ConfigurationError, match=r"accepted is what topology\.state_dict\(\) returned"):
                topology.load_state_dict(state | {part: wrong})
    del state["layers"]["5.weight"]
    with pytest.raises(ConfigurationError, match=r"layer 5\.weight: the state to load lacks dense_steps, explored"):
        topology.load_state_dict(state)
    assert all(torch.equal(mask, before[name]) for name, mask in topology.masks.items())


@pytest.mark.parametrize(
    ("part", "value", "found"),
    [
        *(
            (part, torch.ones(3, 2, dtype=torch.bool), r"of shape \[3, 2\]")
            for part in ("explored", "newest", "momentum")
        ),
        *((part, None, "NoneType") for part in ("explored", "newest")),
    ],
)
def test_a_state_of_another_shape_is_refused_before_anything_is_loaded(part, value, found):
    topology = sparse(sparsity=0.5, seed=1)[2]
    state = sparse(sparsity=0.5, seed=2)[2].state_dict()
    state["layers"]["5.weight"][part] = value
    before = topology.masks
    with pytest.raises(ConfigurationError, match=rf"layer 5\.weight: {part} of the state to load is {found}"):
        topology.load_state_dict(state)
    assert all(torch.equal(mask, before[name]) for name, mask in topology.masks.items())


def test_nothing_follows_a_topology_that_was_detached():
    model, _, topology = sparse(method="set")
    topology.detach()
    with pytest.raises(ConfigurationError, match="was detached"):
        topology.follow(model)
