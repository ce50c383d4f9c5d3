"""Adversarial training and the like: several optimizers, graphs that wait for the other, layers frozen in turns."""

import copy

import pytest
import torch
from torch import nn

import chtconv

ADAM = {"adam": lambda p: torch.optim.Adam(p, lr=1e-3)}


class Sign(torch.optim.SGD):
    """Not one of torch's: nobody knows that it keeps zeros, so that weights are masked after its steps."""


OPTIMIZERS = ADAM | {"foreign": lambda p: Sign(p, lr=1e-2)}


def adversaries(optimizer, **options):
    """A generator and a discriminator, their optimizers in the order in which they step, and their topology."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.ConvTranspose2d(8, 16, 4), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1))
    judged = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 1, 4))
    model = nn.ModuleDict({"judge": judged, "maker": made})
    optimizers = [optimizer(each.parameters()) for each in model.values()]
    options = {"sparsity": 0.7, "method": "set", "interval": 3} | options
    return model, optimizers, chtconv.sparsify(model, optimizers, **options)


def step(model, optimizers, freeze=lambda on, off: None):
    """The usual loop: images are made once, and judged before and after the judge has learnt."""
    judge, maker = model["judge"], model["maker"]
    loss = nn.functional.binary_cross_entropy_with_logits
    images = maker(torch.randn(4, 8, 1, 1))
    freeze(judge, maker)
    real, false = judge(torch.randn(4, 3, 8, 8)), judge(images.detach())
    optimizers[0].zero_grad()
    (loss(real, torch.ones_like(real)) + loss(false, torch.zeros_like(false))).backward()
    optimizers[0].step()
    freeze(maker, judge)
    false = judge(images)
    optimizers[1].zero_grad()
    loss(false, torch.ones_like(false)).backward()
    optimizers[1].step()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_writes_no_weight_that_another_loss_goes_back_through(kind):
    model, optimizers, topology = adversaries(OPTIMIZERS[kind])
    for _ in range(7):
        step(model, optimizers)
        for name, mask in topology.masks.items():
            assert (model.get_parameter(name)[~mask] == 0).all()
    assert topology.evolutions == 2


def test_nor_does_the_first_step_after_states_were_loaded():
    parts = adversaries(ADAM["adam"])
    for _ in range(4):
        step(*parts[:2])
    model, optimizers, topology = adversaries(ADAM["adam"])
    for new, old in zip((model, *optimizers, topology), (parts[0], *parts[1], parts[2]), strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    for each in (parts, (model, optimizers, topology)):
        torch.manual_seed(1)
        for _ in range(3):
            step(*each[:2])
    for name, weight in model.named_parameters():
        assert torch.equal(weight, parts[0].get_parameter(name))


def test_layers_that_are_frozen_while_another_optimizer_steps_evolve():
    """As with toggle_optimizer of Lightning, and in pix2pix."""

    def freeze(on, off):
        for network, trains in ((on, True), (off, False)):
            network.requires_grad_(trains)

    model, optimizers, topology = adversaries(ADAM["adam"], method="gmp", sparsity=0.9, stop=13)
    for _ in range(14):
        step(model, optimizers, freeze)
    assert topology.evolutions == 4
    assert {round(layer["sparsity"], 1) for layer in topology.stats()["layers"].values()} == {0.9}


def test_layers_that_their_own_optimizer_finds_frozen_stay():
    model, optimizers, topology = adversaries(ADAM["adam"])
    before = topology.masks

    def freeze(on, off):
        model["judge"][0].weight.requires_grad_(False)

    for _ in range(4):
        step(model, optimizers, freeze)
        model["judge"][0].weight.requires_grad_(False)
    # It trained in the first step, before it was frozen.
    assert topology.evolutions == 1
    assert torch.equal(topology.masks["judge.0.weight"], before["judge.0.weight"])
    assert not torch.equal(topology.masks["judge.2.weight"], before["judge.2.weight"])


class Twice(torch.optim.SGD):
    """Its step runs that of its parent, and with it the hooks again."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Twice])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("method", ["rigl", "snfs"])
def test_gradients_are_kept_where_optimizers_step_after_the_one_that_counts(method, clip, kind):
    """Listed in another order than they step in: the others are a step late, with whole gradients all the same."""
    layers = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)]
    model = nn.Sequential(*layers)
    optimizers = [kind(each.parameters(), lr=0.01) for each in layers]
    topology = chtconv.sparsify(model, optimizers, method=method, interval=2, layers=["*"], sparsity=0.5)
    for number in range(1, 9):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        for layer in topology._layers:
            if layer.dense_gradient.capturing:
                assert layer.dense_gradient.captured[~layer.mask].abs().sum() > 0
                assert not layer.dense_gradient.settled
        assert topology.keeps_gradients == (method == "snfs" or number % 2 == 0)
        for optimizer in reversed(optimizers):
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    assert topology.evolutions == 4


def dense_gradient(layer, images):
    """Of a weight as if it had no mask."""
    twin = copy.deepcopy(layer)
    twin(images).square().mean().backward()
    return twin.weight.grad


def test_links_regrow_by_the_latest_step_of_their_own_optimizer():
    """Of two networks, the one whose optimizer counts steps every third batch only."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"often": nn.Linear(20, 30), "rarely": nn.Linear(4, 4)})
    often, rarely = (torch.optim.SGD(each.parameters(), lr=0.1) for each in model.values())
    topology = chtconv.sparsify(
        model, [often, rarely], method="rigl", sparsity=0.8, interval=1, stop=50, layers=["often"], allocation="layer"
    )
    for _ in range(2):
        for _ in range(3):
            images, mask = torch.randn(8, 20), topology.masks["often.weight"]
            gradient = dense_gradient(model["often"], images)
            often.zero_grad()
            model["often"](images).square().mean().backward()
            often.step()
        weights = model["often"].weight.detach().clone()
        rarely.step()
        [record] = topology.records[-1:]
        magnitude = torch.where(mask, weights.abs(), torch.inf).flatten()
        kept = mask.flatten().clone()
        kept[magnitude.argsort()[: record["removed"]]] = False
        worth = torch.where(kept, -1.0, gradient.abs().flatten())
        kept[worth.argsort(descending=True)[: record["removed"]]] = True
        assert torch.equal(topology.masks["often.weight"], kept.view(mask.shape))


def test_gradients_that_another_loss_adds_are_not_those_of_the_step():
    """Of the judge, what it stepped by; its maker's loss goes through it, too."""
    model, optimizers, topology = adversaries(lambda p: torch.optim.SGD(p, lr=0.01), method="rigl", interval=1, stop=9)
    judge = topology._layers[0]
    kept = []
    optimizers[0].register_step_post_hook(lambda *_: kept.append(judge.dense_gradient.captured.clone()))
    optimizers[1].register_step_pre_hook(lambda *_: kept.append(judge.dense_gradient.captured.clone()))
    step(model, optimizers)
    assert torch.equal(*kept)
    assert kept[0].any()


@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize("fused", [False, True])
def test_layers_whose_optimizer_skips_its_step_do_not_evolve_by_its_gradients(fused, method):
    torch.manual_seed(0)
    layers = nn.Linear(20, 30), nn.Linear(20, 30)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, fused=fused) for each in layers]
    topology = chtconv.sparsify(
        nn.ModuleList(layers), optimizers, method=method, sparsity=0.8, interval=1, stop=50, layers=["*"]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for skips in (True, False):
        scaler.scale(sum(layer(torch.randn(8, 20)).square().mean() for layer in layers)).backward()
        if skips:
            layers[0].bias.grad[0] = torch.inf
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
    evolved = [[row["layer"] for row in topology.records if row["step"] == number] for number in (1, 2)]
    both = ["0.weight", "1.weight"]
    assert evolved == [both if method == "set" else both[1:], both]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("skipping", [0, 1])
def test_a_step_that_one_of_several_optimizers_skips_is_in_no_average(skipping, fused):
    """Scaled gradients that are not finite would outweigh all others; the last optimizer counts steps."""
    torch.manual_seed(0)
    layers = nn.Linear(20, 30), nn.Linear(20, 30)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, fused=fused) for each in layers]
    topology = chtconv.sparsify(
        nn.ModuleList(layers), optimizers, method="snfs", sparsity=0.8, interval=50, total_steps=500, layers=["*"]
    )
    scaler, expected = torch.amp.GradScaler("cpu", init_scale=2.0**16), torch.zeros(30, 20)
    for number in range(6):
        images = torch.randn(8, 20)
        gradient = dense_gradient(layers[0], images)
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(sum(layer(images).square().mean() for layer in layers)).backward()
        if number == 2:
            layers[skipping].bias.grad[0] = torch.inf
        else:
            expected = 0.9 * expected + 0.1 * gradient
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert topology.step_count == (6 if skipping == 0 else 5)
    torch.testing.assert_close(topology._layers[0].dense_gradient.momentum, expected)
