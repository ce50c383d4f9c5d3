"""What tests of several subjects share: networks, optimizers, training, and what methods promise, stated again."""

import inspect
import itertools
import math
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import chtconv
from chtconv.selection import Count

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.3),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p),
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, 4),
    )


def mixed_network():
    """Ordinary, grouped, depthwise, 1x1 and transposed convolutions, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 7 * 7, 4),
    )


def sparse(model=None, optimizer=None, **options):
    model = model or small_network()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, chtconv.sparsify(model, optimizer, **options)


def train(model, optimizer, steps, *, closure=False, clip=None, after=lambda: None, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images, labels = torch.randn(8, 3, 8, 8, generator=draw), torch.randint(4, (8,), generator=draw)

        def backward(images=images, labels=labels):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        if closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()
        after()


def fresh_state(optimizer, weight):
    """What an optimizer of this kind and group remembers of a weight that is zero and never had a gradient."""
    group = next(group for group in optimizer.param_groups if any(each is weight for each in group["params"]))
    accepted = inspect.signature(type(optimizer)).parameters
    nothing = nn.Parameter(torch.zeros(3, 2, dtype=weight.dtype))
    nothing.grad = torch.zeros_like(nothing)
    twin = type(optimizer)(
        [nothing], **{key: value for key, value in group.items() if key in accepted and key != "params"}
    )
    twin.step()
    return {key: value[0, 0] for key, value in twin.state[nothing].items() if getattr(value, "shape", ()) == (3, 2)}


def state_of(optimizer, weight):
    """What the optimizer remembers weight by weight."""
    return {
        key: value
        for key, value in optimizer.state.get(weight, {}).items()
        if getattr(value, "shape", ()) == weight.shape
    }


def assert_nothing_off_the_mask(topology, model, optimizer):
    parameters = dict(model.named_parameters())
    for name, mask in topology.masks.items():
        weight, off = parameters[name], ~mask
        assert not weight[off].any(), f"weight {name}"
        assert not torch.signbit(weight[off]).any(), f"negative zero in {name}"
        assert weight.grad is None or not weight.grad[off].any(), f"gradient {name}"
        fresh, states = fresh_state(optimizer, weight), state_of(optimizer, weight)
        assert set(states) <= set(fresh)
        for key, state in states.items():
            # Adamax keeps a maximum that is 0 at first and eps after a step without a gradient.
            assert ((state[off] == fresh[key]) | ((state[off] == 0) & (key == "exp_inf"))).all(), (
                f"state {key} of {name}"
            )
            assert not torch.signbit(state[off]).any(), f"negative zero in state {key} of {name}"


def kernels(values, module):
    """Whatever has the shape of a layer's weight, cut by hand into a row for each output channel."""
    if not isinstance(module, TRANSPOSED):
        return torch.stack([each.flatten() for each in values])
    inputs = module.in_channels // module.groups
    parts = values.split(inputs)
    return torch.stack([part[:, o].flatten() for part in parts for o in range(values.shape[1])])


# Sparsity at the start, and how the density goes to its end: all that is said of methods whose density changes.
FROM = {"gmp": 0.0, "granet": 0.5, "chtss": 0.5}


def _logistic(x):
    return 1 / (1 + math.exp(-x))


def way(method, progress):
    """How far the density of a method is from its first to its last value."""
    if method in ("gmp", "granet"):
        return 1 - (1 - progress) ** 3
    if method == "chtss":
        return (_logistic(6 * progress - 3) - _logistic(-3)) / (_logistic(3) - _logistic(-3))
    return 1.0


def expected_density(method, sparsity, progress):
    start = FROM.get(method, sparsity)
    return (1 - start) + (start - sparsity) * way(method, progress)


def assert_exact_links(topology, model, method, sparsity, progress, allocation):
    """Kernel by kernel or layer by layer, as promised; in all together for a method that moves links between layers."""
    density, modules = expected_density(method, sparsity, progress), dict(model.named_modules())
    total = 0
    for name, mask in topology.masks.items():
        rows = kernels(mask, modules[name.removesuffix("weight").rstrip(".")])
        if allocation == "kernel":
            assert rows.sum(1).tolist() == [round(density * rows.shape[1])] * len(rows), name
        elif method != "snfs":
            assert mask.sum() == round(density * mask.numel()), name
        total += round(density * mask.numel())
    if method == "snfs":
        assert sum(int(mask.sum()) for mask in topology.masks.values()) == total


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def exactly(rows, count):
    return Count(count, torch.zeros(rows, 1, dtype=torch.bool))


def sampling_without_replacement(weights, count):
    """The probability of each set, by enumerating the orders in which it can be drawn."""
    chances = {}
    for order in itertools.permutations(range(len(weights)), count):
        chance, left = 1.0, sum(weights)
        for i in order:
            chance, left = chance * weights[i] / left if weights[i] else 0.0, left - weights[i]
        chances[frozenset(order)] = chances.get(frozenset(order), 0) + chance
    return chances


def assert_sampled(taken, chances):
    """That the rows of ``taken`` are independent draws of sets with these probabilities, to 5 standard deviations."""
    sets, rows = Counter(frozenset(row.nonzero().flatten().tolist()) for row in taken), len(taken)
    assert set(sets) <= set(chances)
    for chosen, chance in chances.items():
        assert abs(sets[chosen] / rows - chance) <= 5 * (chance * (1 - chance) / rows) ** 0.5, chosen


class Numbers(TorchDispatchMode):
    """How many numbers the dense tensors that are made in this context hold: the largest of them, and all together."""

    largest = total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and each.layout == torch.strided:
                numbers = each.untyped_storage().nbytes() // each.element_size()
                self.largest, self.total = max(self.largest, numbers), self.total + numbers
        return made
