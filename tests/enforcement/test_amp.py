"""Gradient scaling: steps that are skipped count for nothing, and nobody sees the scale."""

import copy

import pytest
import torch
from support import assert_nothing_off_the_mask
from torch import nn

import chtconv

KINDS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "sgd-foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "sgd-fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "adamw-fused": (torch.optim.AdamW, {"fused": True}),
    "adagrad-fused": (torch.optim.Adagrad, {"fused": True}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
zeroing = pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zero"])


def network():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 1))


def start(kind="sgd", **options):
    model = network()
    cls, flags = KINDS[kind]
    optimizer = cls(model.parameters(), lr=0.1, **flags)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.7, **{"interval": 1} | options)
    return model, optimizer, topology, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


def loss_of(model, seed):
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return model(images).square().mean()


def dense_gradients(model, *seeds):
    """Gradients of a twin that has no masks; those of several batches are summed."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    for seed in seeds:
        loss_of(twin, seed).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters()}


def what_regrowth_saw(topology):
    """Filled at each evolution, by name of layer."""
    seen = {}

    def see(_):
        seen.update({layer.name: layer.dense_gradient.captured.clone() for layer in topology._layers})

    topology.on_evolution(see)
    return seen


def assert_all_close(seen, expected, factor=1.0):
    for name, values in seen.items():
        wanted = expected[name] * factor
        torch.testing.assert_close(values, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


@kinds
@zeroing
@pytest.mark.parametrize("method", ["set", "rigl"])
def test_a_skipped_step_counts_for_nothing(method, set_to_none, kind):
    model, optimizer, topology, scaler = start(kind, method=method)
    masks, weights = topology.masks, [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad(set_to_none=set_to_none)
    scaler.scale(loss_of(model, 0) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert topology.step_count == topology.evolutions == 0
    assert all(torch.equal(mask, topology.masks[name]) for name, mask in masks.items())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    optimizer.zero_grad(set_to_none=set_to_none)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    assert topology.step_count == topology.evolutions == 1
    assert any(not torch.equal(mask, topology.masks[name]) for name, mask in masks.items())
    assert_nothing_off_the_mask(topology, model, optimizer)


@kinds
@zeroing
def test_nothing_of_a_skipped_step_or_of_the_scale_is_left_in_what_regrowth_sees(set_to_none, kind):
    model, optimizer, topology, scaler = start(kind, method="rigl")
    seen = what_regrowth_saw(topology)
    for factor in (float("inf"), 1.0):
        dense = dense_gradients(model, 1, 2)
        optimizer.zero_grad(set_to_none=set_to_none)
        for seed in (1, 2):
            scaler.scale(loss_of(model, seed) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert topology.evolutions == 1
    assert_all_close(seen, dense)


@zeroing
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_clipping_sees_the_masked_gradient_and_regrowth_the_clipped_dense_one(limit, scaled, set_to_none):
    model, optimizer, topology, scaler = start(method="rigl")
    seen = what_regrowth_saw(topology)
    for seed in (1, 2):
        dense, masks = dense_gradients(model, seed), topology.masks
        optimizer.zero_grad(set_to_none=set_to_none)
        (scaler.scale(loss_of(model, seed)) if scaled else loss_of(model, seed)).backward()
        if scaled:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        masked = [gradient * masks.get(name, 1) for name, gradient in dense.items()]
        expected = torch.cat([each.flatten() for each in masked]).norm().item()
        assert norm.item() == pytest.approx(expected, rel=1e-4)
        if scaled:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        assert_all_close(seen, dense, min(1.0, limit / expected))
    assert topology.evolutions == 2


@zeroing
def test_closures_called_several_times_leave_the_gradient_of_the_last_call(set_to_none):
    model, calls, dense = network(), [], {}

    class Thrice(torch.optim.Optimizer):
        """A step that calls its closure three times, as a line search does."""

        @torch.no_grad()
        def step(self, closure):
            for _ in range(3):
                with torch.enable_grad():
                    loss = closure()
                for group in self.param_groups:
                    for weight in group["params"]:
                        weight.sub_(weight.grad, alpha=0.01)
            return loss

    optimizer = Thrice(model.parameters(), {})
    topology = chtconv.sparsify(model, optimizer, sparsity=0.7, method="rigl", interval=1)
    seen = what_regrowth_saw(topology)

    def closure():
        calls.append(1)
        dense.update(dense_gradients(model, len(calls)))
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = loss_of(model, len(calls))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(calls) == 3
    assert topology.step_count == topology.evolutions == 1
    assert_all_close(seen, dense)


def test_gradients_written_by_hand_are_what_regrowth_sees():
    model, optimizer, topology, _ = start(method="rigl")
    seen = what_regrowth_saw(topology)
    for seed in (1, 2):
        dense = dense_gradients(model, seed)
        for name, parameter in model.named_parameters():
            parameter.grad = dense[name].clone()
        optimizer.step()
        assert_all_close(seen, dense)
        assert_nothing_off_the_mask(topology, model, optimizer)


@kinds
def test_averages_of_gradients_do_not_know_the_scale(kind):
    """SNFS averages over steps, between which the scale changes."""
    model, optimizer, topology, scaler = start(kind, method="snfs", interval=100, stop=200)
    average, scales = dict.fromkeys(topology.masks, 0.0), set()
    for seed in range(5):
        dense = dense_gradients(model, seed)
        average = {name: 0.9 * each + 0.1 * dense[name] for name, each in average.items()}
        optimizer.zero_grad()
        scales.add(scaler.get_scale())
        scaler.scale(loss_of(model, seed)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert len(scales) > 1
    assert_all_close({layer.name: layer.dense_gradient.momentum for layer in topology._layers}, average)


def test_autocast_trains_masks_in_the_type_of_the_weights():
    model, optimizer, topology, scaler = start(method="rigl")
    for seed in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, seed)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_nothing_off_the_mask(topology, model, optimizer)
    assert topology.evolutions == 3
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


@pytest.mark.parametrize("skipping", [[0], [1], [0, 1]])
def test_what_a_fused_step_that_was_skipped_leaves_behind_is_cut_to_the_masks(skipping):
    """Momentum that a skipped first step makes is whatever lay in the memory."""
    model = network()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1, momentum=0.9, fused=True) for i in (0, 2)]
    skipped = []

    def leave_rubbish(optimizer, *_):
        if bool(optimizer.found_inf):
            skipped.append(optimizers.index(optimizer))
            for state in optimizer.state.values():
                state["momentum_buffer"].fill_(7.7)

    for optimizer in optimizers:
        optimizer.register_step_post_hook(leave_rubbish)
    topology = chtconv.sparsify(model, optimizers, sparsity=0.7, interval=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        scaler.scale(loss_of(model, step)).backward()
        for index, optimizer in enumerate(optimizers):
            if step == 0 and index in skipping:
                optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, mask in topology.masks.items():
            weight = dict(model.named_parameters())[name]
            (momentum,) = [each.state[weight]["momentum_buffer"] for each in optimizers if weight in each.state]
            assert not weight[~mask].any()
            assert not momentum[~mask].any()
            assert momentum[mask].any()
    assert skipped == skipping
    assert topology.step_count == (2 if 1 in skipping else 3)
