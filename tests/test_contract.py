"""What every method promises with every optimizer: exact links, and nothing off the mask, ever."""

import copy

import pytest
import torch
from torch import nn

import chtconv
from chtconv.methods import METHODS
from chtconv.optimizer_state import per_weight_state

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.3),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "asgd": lambda p: torch.optim.ASGD(p),
}


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


def assert_nothing_off_the_mask(topology, model, optimizer):
    parameters = dict(model.named_parameters())
    for name, mask in topology.masks.items():
        weight = parameters[name]
        off = ~mask
        assert not weight[off].any(), f"weight {name}"
        assert not torch.signbit(weight[off]).any(), f"negative zero in {name}"
        assert weight.grad is None or not weight.grad[off].any(), f"gradient {name}"
        for key, state, fresh in per_weight_state(optimizer, weight):
            assert (state[off] == fresh).all(), f"state {key} of {name}"


@pytest.mark.parametrize("closure", [False, True], ids=["step", "closure"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_exact_links_and_nothing_off_the_mask(method, optimizer_name, closure):
    model = small_network()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    topology = chtconv.sparsify(model, optimizer, sparsity=0.6, method=method, zeta=0.4, interval=2)
    links = {name: mask.flatten(1).sum(1) for name, mask in topology.masks.items()}
    first = {name: mask.clone() for name, mask in topology.masks.items()}

    def check():
        assert_nothing_off_the_mask(topology, model, optimizer)
        for name, mask in topology.masks.items():
            assert torch.equal(mask.flatten(1).sum(1), links[name])

    check()
    train(model, optimizer, 7, closure=closure, clip=0.5 if closure else None, after=check)
    assert topology.step_count == 7
    assert topology.evolutions == (0 if method == "static" else 3)
    changed = any(not torch.equal(mask, first[name]) for name, mask in topology.masks.items())
    assert changed == (method != "static")
    # Training itself must have happened: active weights moved, so that zeros off the mask say something.
    assert all((dict(model.named_parameters())[name][mask] != 0).any() for name, mask in topology.masks.items())


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_foreach_and_clipping(optimizer_class, clip, foreach):
    model = small_network()
    optimizer = optimizer_class(model.parameters(), lr=0.01, weight_decay=0.1, foreach=foreach)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.8, method="chts", interval=1)
    train(model, optimizer, 4, clip=clip, after=lambda: assert_nothing_off_the_mask(topology, model, optimizer))


def test_clipping_sees_the_norm_of_the_masked_gradient():
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.9, method="static")
    model(torch.randn(8, 3, 8, 8)).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.grad = None
    twin(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))).sum().backward()
    masked = [
        p.grad * topology.masks[name] if name in topology.masks else p.grad for name, p in model.named_parameters()
    ]
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in masked]).norm().item(), rel=1e-6)
    assert any(p.grad[~topology.masks[n]].any() for n, p in twin.named_parameters() if n in topology.masks)


def test_gradients_accumulate_over_micro_batches():
    model = small_network().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.5, method="set")
    images = torch.randn(8, 3, 8, 8)
    model(images).sum().backward()
    whole = model[0].weight.grad.clone()
    optimizer.zero_grad()
    for part in images.chunk(4):
        model(part).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, whole, rtol=1e-4, atol=1e-4)
    assert not whole[~topology.masks["0.weight"]].any()


def test_a_gradient_written_by_hand_is_masked_before_the_step():
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.5, method="static")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    mask = topology.masks["0.weight"]
    assert not model[0].weight[~mask].any()
    assert model[0].weight[mask].isnan().all()


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.regrowth])
@pytest.mark.parametrize("optimizer_name", ["sgd", "adam", "rmsprop", "rprop", "adagrad"])
def test_new_links_start_fresh_and_chosen_again_ones_are_untouched(method, optimizer_name):
    model = small_network()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    topology = chtconv.sparsify(model, optimizer, sparsity=0.5, method=method, zeta=0.5, interval=10**9)
    train(model, optimizer, 3)
    parameters = dict(model.named_parameters())
    before = {name: mask.clone() for name, mask in topology.masks.items()}
    weights = {name: parameters[name].detach().clone() for name in before}
    states = {n: {k: s.clone() for k, s, _ in per_weight_state(optimizer, parameters[n])} for n in before}
    topology.evolve()
    seen_new = seen_kept = 0
    for name, mask in topology.masks.items():
        new, kept = mask & ~before[name], mask & before[name]
        seen_new, seen_kept = seen_new + int(new.sum()), seen_kept + int(kept.sum())
        assert not parameters[name][new].any()
        assert torch.equal(parameters[name][kept], weights[name][kept])
        for key, state, fresh in per_weight_state(optimizer, parameters[name]):
            assert (state[new] == fresh).all()
            assert torch.equal(state[kept], states[name][key][kept])
    assert seen_new > 0
    assert seen_kept > 0
    rechosen = sum(row["rechosen"] for row in topology.records)
    assert rechosen > 0, "the case of a link that is removed and chosen again did not occur"


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(method):
    def run(seed):
        torch.manual_seed(5)
        model = small_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        topology = chtconv.sparsify(model, optimizer, sparsity=0.7, method=method, interval=2, seed=seed)
        train(model, optimizer, 6)
        return topology.masks, [p.detach().clone() for p in model.parameters()]

    (masks, weights), (again, same), (other, _) = run(0), run(0), run(1)
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert any(not torch.equal(masks[name], other[name]) for name in masks)


def test_methods_of_one_seed_start_from_the_same_masks_whatever_was_drawn_before():
    starts = []
    for method in METHODS:
        model = small_network()
        torch.rand(len(starts) + 1)
        topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters()), method=method, seed=14)
        starts.append(topology.masks)
    for masks in starts[1:]:
        assert all(torch.equal(masks[name], starts[0][name]) for name in masks)


@pytest.mark.parametrize("method", METHODS)
def test_state_round_trip_continues_with_the_same_bits(method):
    def start():
        torch.manual_seed(3)
        model = small_network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, chtconv.sparsify(model, optimizer, sparsity=0.7, method=method, interval=2, seed=4)

    model, optimizer, topology = start()
    train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), topology.state_dict()))
    train(model, optimizer, 5, seed=1)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        resumed = start()
        for i in order:
            resumed[i].load_state_dict(copy.deepcopy(saved[i]))
        train(resumed[0], resumed[1], 5, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed[0].parameters(), strict=True))
        assert all(torch.equal(topology.masks[n], m) for n, m in resumed[2].masks.items())
        assert topology.records == resumed[2].records
        assert topology.step_count == resumed[2].step_count == 10


def test_a_dense_run_and_sparsity_zero_give_the_same_bits():
    def run(sparse):
        torch.manual_seed(2)
        model = small_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        if sparse:
            chtconv.sparsify(model, optimizer, sparsity=0.0, method="chts", interval=1)
        train(model, optimizer, 4)
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
