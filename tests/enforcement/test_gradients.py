"""Gradients as others see them: masked before clipping, accumulation, closures and steps; dense where RigL looks."""

import copy

import pytest
import torch
from support import assert_nothing_off_the_mask, small_network, sparse, train
from torch import nn

import chtconv


def test_clipping_sees_the_norm_of_the_masked_gradient():
    model = small_network().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.9, method="static")
    twin, images = copy.deepcopy(model), torch.randn(8, 3, 8, 8)
    model(images).square().mean().backward()
    norm = nn.utils.clip_grad_norm_([model[i].weight for i in (0, 3, 5)], 1e9).item()
    twin(images).square().mean().backward()
    dense = {f"{i}.weight": twin[i].weight.grad for i in (0, 3, 5)}
    masked = [gradient * topology.masks[name] for name, gradient in dense.items()]
    assert norm == pytest.approx(torch.cat([each.flatten() for each in masked]).norm().item(), rel=1e-6)
    assert norm < 0.9 * torch.cat([each.flatten() for each in dense.values()]).norm().item()


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_gradients_accumulate_over_micro_batches(method):
    model, optimizer, topology = sparse(small_network().eval(), sparsity=0.5, method=method, interval=1)
    images = torch.randn(8, 3, 8, 8)
    model(images).sum().backward()
    whole = model[0].weight.grad.clone()
    optimizer.zero_grad()
    for part in images.chunk(4):
        model(part).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, whole, rtol=1e-4, atol=1e-4)
    assert not whole[~topology.masks["0.weight"]].any()


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_a_gradient_written_by_hand_is_masked_before_the_step(method):
    model, optimizer, topology = sparse(sparsity=0.5, method=method)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    mask = topology.masks["0.weight"]
    assert not model[0].weight[~mask].any()
    assert model[0].weight[mask].isnan().all()


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_closures_that_write_gradients_themselves(noise, keyword):
    model, optimizer, topology = sparse(sparsity=0.8, method="static")

    def closure():
        loss = model(torch.randn(4, 3, 8, 8)).square().mean()
        parameters = list(model.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient + noise
        return loss

    loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert loss.item() > 0
    assert_nothing_off_the_mask(topology, model, optimizer)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("method", ["rigl", "snfs", "granet"])
def test_what_regrowth_sees_is_the_dense_gradient_of_the_whole_step(method, batches):
    """Of a twin without masks, micro-batches summed; what the optimizer sees is masked nevertheless."""
    model, optimizer, topology = sparse(small_network().eval(), sparsity=0.8, method=method, interval=1, stop=9)
    twin = copy.deepcopy(model)
    images = torch.randn(6, 3, 8, 8)
    optimizer.zero_grad()
    for part in images.chunk(batches):
        model(part).square().sum().backward()
    twin(images).square().sum().backward()
    for layer in topology._layers:
        gradient = dict(twin.named_parameters())[layer.name].grad
        captured, largest = layer.dense_gradient.captured, gradient.abs().max().item()
        torch.testing.assert_close(captured, gradient, rtol=1e-3, atol=1e-4 * largest)
        assert gradient[~topology.masks[layer.name]].any()
        assert not layer.weight.grad[~topology.masks[layer.name]].any()


def test_gradients_are_dense_only_on_the_steps_before_an_evolution():
    model, optimizer, topology = sparse(method="rigl", interval=3)
    kept = []
    for _ in range(7):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        kept.append(topology._layers[0].dense_gradient.captured is not None)
        optimizer.step()
    assert kept == [False, False, True, False, False, True, False]
    assert [layer.dense_gradient.steps for layer in topology._layers] == [2, 2, 2]


def test_a_gradient_that_was_thrown_away_is_forgotten():
    model, optimizer, topology = sparse(small_network().eval(), method="rigl", interval=1, sparsity=0.8)
    images = torch.randn(2, 3, 8, 8)
    model(images).sum().backward()
    wanted = topology._layers[0].dense_gradient.captured.clone()
    optimizer.zero_grad()
    model(100 * images).sum().backward()
    optimizer.zero_grad()
    model(images).sum().backward()
    torch.testing.assert_close(topology._layers[0].dense_gradient.captured, wanted)


def test_regrowth_by_gradient_needs_one_that_was_kept():
    model, optimizer, topology = sparse(method="rigl", interval=10)
    train(model, optimizer, 1)
    before = topology.masks
    with pytest.raises(chtconv.ConfigurationError, match=r"layer 0\.weight: regrowth 'gradient' .*capture_gradients"):
        topology.evolve()
    assert all(torch.equal(mask, before[name]) for name, mask in topology.masks.items())
    topology.capture_gradients()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    topology.evolve()
    assert topology.evolutions == 1
    topology.capture_gradients()
    with pytest.raises(chtconv.ConfigurationError, match=r"none are kept; .* run the backward pass"):
        topology.evolve()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    with pytest.raises(chtconv.ConfigurationError, match=r"let the optimizer step only after the evolution"):
        topology.evolve()
    assert topology.evolutions == 1


def test_a_layer_without_use_and_gradients_that_are_not_finite_do_not_stop_regrowth():
    for method in ("rigl", "snfs", "mest"):
        model, optimizer, topology = sparse(
            nn.ModuleList([nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)]), method=method, interval=1, sparsity=0.5
        )
        for _ in range(2):
            optimizer.zero_grad()
            (model[0](torch.randn(1, 2, 5, 5)).sum() * float("inf")).backward()
            optimizer.step()
        assert topology.evolutions == 2
        assert topology.stats()["links"] == 72
