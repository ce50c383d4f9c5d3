"""Every optimizer of torch.optim, one or several at once, and those of others: off the mask nothing moves, ever."""

import copy
import inspect

import pytest
import torch
from support import sparse
from torch import distributed, nn

import chtconv
from chtconv.errors import ConfigurationError

REFUSED = {"SparseAdam"}
SUPPORTED = {
    "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "Muon", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD",
}  # fmt: skip
CLASSES = {
    name: each
    for name, each in vars(torch.optim).items()
    if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
}
FLAGS = {
    "plain": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "maximize": {"maximize": True},
    "tensor": {"lr": torch.tensor(0.01)},
    "decay": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "momentum": {"momentum": 0.9, "centered": True},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "amsgrad": {"amsgrad": True},
    "accumulator": {"initial_accumulator_value": 0.3},
    "search": {"line_search_fn": "strong_wolfe"},
}


def accepts(cls, flags):
    return all(name in inspect.signature(cls).parameters for name in flags)


CASES = [
    pytest.param(name, key, id=f"{name}-{key}")
    for name in sorted(SUPPORTED & CLASSES.keys())
    for key, flags in FLAGS.items()
    if accepts(CLASSES[name], flags)
]


def make(name, parameters, **flags):
    # LBFGS with a step of 1 and no line search leaves for infinity.
    usual = {"lr": 0.05, "max_iter": 4} if name == "LBFGS" else {}
    return CLASSES[name](parameters, **usual | flags)


def network(name):
    """Without biases, as Muon takes matrices only; its layers for the others are convolutions too."""
    if name == "Muon":
        layers = nn.Flatten(), nn.Linear(48, 12, bias=False), nn.Tanh(), nn.Linear(12, 4, bias=False)
    else:
        layers = nn.Conv2d(3, 6, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(24, 4, bias=False)
    return nn.Sequential(*layers)


def closure_of(model, optimizer, step, after=lambda: None):
    draw = torch.Generator().manual_seed(step)
    images, labels = torch.randn(8, 3, 4, 4, generator=draw), torch.randint(4, (8,), generator=draw)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        after()
        return loss

    return closure


def untouched_state(name, flags, steps, shape):
    """State of a weight that is zero and has a gradient of zero, after so many steps of the same optimizer."""
    weight = nn.Parameter(torch.zeros(shape))
    twin = make(name, [weight], **flags)
    for _ in range(steps):
        weight.grad = torch.zeros(shape)
        twin.step(lambda: torch.zeros(()))
    return twin.state[weight]


def test_every_optimizer_of_torch_is_decided():
    assert CLASSES.keys() <= SUPPORTED | REFUSED
    assert CLASSES.keys() >= {"SGD", "Adam", "LBFGS"}


@pytest.mark.parametrize(("name", "key"), CASES)
def test_nothing_off_the_mask_at_any_step(name, key):
    flags, model = FLAGS[key], network(name)
    optimizer = make(name, model.parameters(), **flags)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.6, method="set", interval=2, layers=["*"])
    parameters, states = dict(model.named_parameters()), 0
    before = {name: weight.detach().clone() for name, weight in parameters.items()}
    for step in range(1, 8):
        optimizer.step(closure_of(model, optimizer, step))
        for layer, mask in topology.masks.items():
            weight, off = parameters[layer], ~mask
            assert not weight[off].any()
            assert not weight.grad[off].any()
            assert weight[mask].isfinite().all()
            fresh = untouched_state(name, flags, step, weight.shape)
            for what, state in optimizer.state[weight].items():
                if getattr(state, "shape", None) == weight.shape:
                    assert torch.equal(state[off], fresh[what][off]), (step, what)
                    states += 1
    assert (topology.step_count, topology.evolutions) == (7, 3)
    for layer, mask in topology.masks.items():
        assert (parameters[layer] != before[layer])[mask].any()
    assert states > 0 or name in ("SGD", "LBFGS", "Adafactor")


@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_fixed_topology_is_training_with_masks_by_hand(name, key):
    """The oracle is the plain optimizer in a loop that multiplies gradients and, after the step, weights by a mask."""
    model = network(name)
    optimizer = make(name, model.parameters(), **FLAGS[key])
    topology = chtconv.sparsify(model, optimizer, sparsity=0.6, method="static", layers=["*"])
    twin = copy.deepcopy(model)
    plain = make(name, twin.parameters(), **FLAGS[key])
    masks = [topology.masks[name] for name, _ in model.named_parameters()]

    def mask_gradients():
        for weight, mask in zip(twin.parameters(), masks, strict=True):
            weight.grad.mul_(mask)

    for step in range(4):
        optimizer.step(closure_of(model, optimizer, step))
        plain.step(closure_of(twin, plain, step, mask_gradients))
        with torch.no_grad():
            for weight, mask in zip(twin.parameters(), masks, strict=True):
                weight.mul_(mask)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_lbfgs_starts_again_from_the_gradient_after_an_evolution_and_goes_on_where_there_was_none():
    model, twin = network("LBFGS"), network("LBFGS")
    optimizer = make("LBFGS", model.parameters())
    topology = chtconv.sparsify(model, optimizer, sparsity=0.6, method="set", interval=3)
    for step in range(2):
        optimizer.step(closure_of(model, optimizer, step))
    remembered = optimizer.state[model[0].weight]
    topology.enforce()
    assert optimizer.state[model[0].weight] is remembered
    assert len(remembered["old_dirs"]) > 0
    optimizer.step(closure_of(model, optimizer, 2))
    assert topology.evolutions == 1
    fresh = make("LBFGS", twin.parameters())
    other = chtconv.sparsify(twin, fresh, sparsity=0.6, method="set", interval=99)
    other.load_state_dict(topology.state_dict())
    twin.load_state_dict(model.state_dict())
    optimizer.step(closure_of(model, optimizer, 3))
    fresh.step(closure_of(twin, fresh, 3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_sparse_adam_and_eps_of_zero_are_refused_with_the_reason():
    model = network("SGD")
    for optimizer, message in (
        (torch.optim.SparseAdam(model.parameters()), "SparseAdam: it takes sparse gradients only"),
        (torch.optim.RMSprop(model.parameters(), eps=0.0), "RMSprop: eps=0 divides zero by zero"),
        (torch.optim.Adafactor(model.parameters(), eps=(0.0, 1e-3)), "Adafactor: eps=0 divides zero by zero"),
        (Hookless(torch.optim.SGD(model.parameters(), lr=0.1)), "Hookless: it takes no hooks around its steps"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            chtconv.sparsify(model, optimizer)


class Hookless(torch.optim.Optimizer):
    """As torch's PostLocalSGDOptimizer is made."""

    def __init__(self, optim):
        self.optim, self.param_groups = optim, optim.param_groups


@pytest.fixture
def _one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without")
@pytest.mark.usefixtures("_one_rank")
def test_new_links_find_fresh_state_where_ranks_share_it_out():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network("SGD")
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adagrad, lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.6, method="set", interval=2)
    for step in range(5):
        optimizer.step(closure_of(model, optimizer, step))
        assert not optimizer.optim.state[model[0].weight]["sum"][~topology.masks["0.weight"]].any()
    assert topology.evolutions == 2


class Sharpness(torch.optim.Optimizer):
    """SAM (Foret et al., 2021): steps with the gradient of a point uphill, by the optimizer in it."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base_optimizer, self.param_groups = base, base.param_groups

    def weights(self):
        return [weight for group in self.param_groups for weight in group["params"]]

    @torch.no_grad()
    def first_step(self):
        for weight in self.weights():
            self.state[weight]["old"] = weight.detach().clone()
            weight.add_(0.05 * weight.grad.sign())

    @torch.no_grad()
    def second_step(self):
        for weight in self.weights():
            weight.copy_(self.state[weight]["old"])
        self.base_optimizer.step()


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_an_optimizer_that_looks_elsewhere_first_is_followed_within(method):
    model = network("SGD")
    optimizer = Sharpness(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    topology = chtconv.sparsify(model, optimizer, sparsity=0.6, method=method, interval=2)
    for step in range(5):
        for move in (optimizer.first_step, optimizer.second_step):
            closure_of(model, optimizer, step)()
            move()
        mask, weight = topology.masks["0.weight"], model[0].weight
        assert not weight[~mask].any()
        assert not optimizer.base_optimizer.state[weight]["momentum_buffer"][~mask].any()
    assert (topology.step_count, topology.evolutions) == (5, 2)


class Noisy(torch.optim.SGD):
    """Of another package: moves every weight, and remembers something of every weight."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(0.1)
                self.state[weight]["seen"] = self.state[weight].get("seen", torch.zeros_like(weight)) + 1
        return loss


def test_an_optimizer_that_moves_weights_without_gradient_is_masked_after_each_step():
    model = network("SGD")
    optimizer = Noisy(model.parameters(), lr=0.1, momentum=0.9)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.6, method="set", interval=2)
    (mask,) = topology.masks.values()
    for step in range(5):
        before = mask
        optimizer.step(closure_of(model, optimizer, step))
        (mask,) = topology.masks.values()
        assert not model[0].weight[~mask].any()
        for state in optimizer.state[model[0].weight].values():
            assert not state[~mask].any()
        # A new link finds nothing of the time before it; the step that it came in may go on after it.
        assert (optimizer.state[model[0].weight]["seen"][mask & ~before] <= 1).all()
    assert topology.evolutions == 2
    assert optimizer.state[model[0].weight]["seen"].max() == 5


def test_two_optimizers_and_a_step_of_only_one_of_them():
    model = network("SGD")
    first, second = torch.optim.Adam(model[:1].parameters()), torch.optim.SGD(model[3:].parameters(), lr=0.1)
    topology = chtconv.sparsify(model, [first, second], sparsity=0.6, method="set", interval=2, layers=["*"])
    for steps in range(4):
        for optimizer in (first, second)[: 1 if steps == 3 else 2]:
            optimizer.step(closure_of(model, optimizer, steps))
        for name, mask in topology.masks.items():
            assert not dict(model.named_parameters())[name][~mask].any()
    assert (topology.step_count, topology.evolutions) == (3, 1)


def test_a_group_that_is_added_later_and_made_sparse_by_a_second_call():
    model = network("SGD")
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    model[3].requires_grad_(False)
    with pytest.raises(ConfigurationError, match="layer 3: its weight is frozen"):
        chtconv.sparsify(model, optimizer, layers=["*"])
    topology = chtconv.sparsify(model, optimizer, sparsity=0.6, method="set", interval=1)
    model[3].requires_grad_(True)
    with pytest.raises(ConfigurationError, match="layer 3: no optimizer holds its weight"):
        chtconv.sparsify(model, optimizer, layers=["3"])
    optimizer.step(closure_of(model, optimizer, 0))
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.01})
    head = chtconv.sparsify(model, optimizer, sparsity=0.5, method="rigl", interval=2, layers=["3"])
    for step in range(4):
        optimizer.step(closure_of(model, optimizer, step))
        for mask, weight in ((topology.masks["0.weight"], model[0].weight), (head.masks["3.weight"], model[3].weight)):
            assert torch.equal(weight != 0, mask & (weight != 0))
            assert not optimizer.state[weight]["momentum_buffer"][~mask].any()
    assert (topology.evolutions, head.evolutions) == (5, 2)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_a_layer_that_is_frozen_stays_as_it_is_until_it_is_trained_again(method):
    model, optimizer, topology = sparse(network("SGD"), sparsity=0.6, method=method, interval=1, layers=["*"])
    optimizer.step(closure_of(model, optimizer, 0))
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    mask, weight, other = topology.masks["0.weight"], model[0].weight.detach().clone(), topology.masks["3.weight"]
    for step in range(2):
        optimizer.step(closure_of(model, optimizer, step))
    assert torch.equal(topology.masks["0.weight"], mask)
    assert torch.equal(model[0].weight, weight)
    assert not torch.equal(topology.masks["3.weight"], other)
    model[0].requires_grad_(True)
    optimizer.step(closure_of(model, optimizer, 9))
    assert not torch.equal(topology.masks["0.weight"], mask)
    assert not model[0].weight[~topology.masks["0.weight"]].any()
