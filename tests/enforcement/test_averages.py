"""Averages of weights (EMA, SWA) that stay as sparse as the model, and schedulers of the learning rate."""

import copy
import gc
import warnings

import pytest
import torch
from support import small_network, sparse, train
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

import chtconv
from chtconv.errors import ConfigurationError

AVERAGES = {
    "swa": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "ema-one-by-one": {"avg_fn": get_ema_avg_fn(0.8)},
    "ema-buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.8), "use_buffers": True},
}


def links(model, topology):
    """Weights that are not zero, of each layer."""
    parameters = {name.removeprefix("module."): weight for name, weight in model.named_parameters()}
    return {name: parameters[name] != 0 for name in topology.masks}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_has_exactly_the_links_of_the_model(kind):
    model, optimizer, topology = sparse(sparsity=0.8, method="set", interval=2, zeta=0.5)
    followed, forgotten = (AveragedModel(model, **AVERAGES[kind]) for _ in range(2))
    topology.follow(followed)

    def update():
        for average in (followed, forgotten):
            average.update_parameters(model)
        for name, active in links(followed, topology).items():
            assert not (active & ~topology.masks[name]).any()

    train(model, optimizer, 13, after=update)
    assert topology.evolutions == 6
    denser = 0
    for name, active in links(followed, topology).items():
        assert not (active & ~topology.masks[name]).any()
        # All of them, but for those that the model itself has at exactly 0.
        assert active[links(model, topology)[name]].all()
        denser += int(links(forgotten, topology)[name].sum()) - int(active.sum())
    assert denser > 0, "an average that nobody masks has the same links, so this test says nothing"


def test_the_average_of_links_that_stay_is_the_plain_average():
    model, optimizer, topology = sparse(sparsity=0.6, method="static")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    topology.follow(average)
    expected = None

    def update():
        nonlocal expected
        now = model[0].weight.detach().clone()
        expected = now if expected is None else 0.8 * expected + 0.2 * now
        average.update_parameters(model)

    train(model, optimizer, 4, after=update)
    topology.enforce()
    torch.testing.assert_close(average.module[0].weight, expected)


def test_an_average_is_masked_at_once_by_enforce_and_no_more_after_its_end():
    model, optimizer, topology = sparse(sparsity=0.6, method="set", interval=1)
    average = AveragedModel(small_network())
    handle = topology.follow(average)
    mask = topology.masks["0.weight"]
    assert not average.module[0].weight[~mask].any()
    average.module[0].weight.data.fill_(1.0)
    topology.enforce()
    assert torch.equal(average.module[0].weight != 0, mask)
    handle.remove()
    train(model, optimizer, 1)
    assert torch.equal(average.module[0].weight != 0, mask)
    assert not torch.equal(topology.masks["0.weight"], mask)


class Scaled(nn.Module):
    """A parameter of its own beside the layers, which lie below a name that wrappers use too."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.module = nn.Sequential(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
@pytest.mark.parametrize("make", [Scaled, lambda: nn.Conv2d(3, 4, 3)], ids=["parameter", "single layer"])
def test_copies_are_followed_whatever_the_names_of_other_parameters(make, wrap):
    model = wrap(make())
    topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters()), method="set", sparsity=0.5)
    (mask,) = topology.masks.values()
    for copied in (AveragedModel(model), copy.deepcopy(model)):
        weight = next(parameter for parameter in copied.parameters() if parameter.ndim == 4)
        with torch.no_grad():
            weight.fill_(1.0)
        topology.follow(copied)
        assert torch.equal(weight != 0, mask)


def test_an_average_that_is_gone_is_not_kept_alive():
    model, optimizer, topology = sparse(sparsity=0.6, method="set", interval=1)
    topology.follow(AveragedModel(model))
    gc.collect()
    assert topology._averages._copies[next(iter(topology._averages._copies))]() is None
    train(model, optimizer, 1)
    assert not topology._averages._copies


@pytest.mark.parametrize("other", [nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(3, 9, 3))])
def test_a_copy_of_another_model_is_refused_and_left_alone(other):
    topology = sparse(sparsity=0.6)[2]
    before = copy.deepcopy(other)
    with pytest.raises(ConfigurationError, match=r"has (none|one of shape .*) where the model has 0\.weight"):
        topology.follow(other)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), before.parameters(), strict=True))
    assert not topology._averages._copies


def test_a_run_with_an_average_continues_from_its_states():
    def begin():
        torch.manual_seed(3)
        model, optimizer, topology = sparse(sparsity=0.7, method="set", interval=2)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        topology.follow(average)
        return model, optimizer, topology, average

    def go(parts, steps, seed):
        train(*parts[:2], steps, seed=seed, after=lambda: parts[3].update_parameters(parts[0]))

    whole = begin()
    go(whole, 5, 0)
    states = [copy.deepcopy(each.state_dict()) for each in whole]
    go(whole, 5, 1)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        resumed = begin()
        for index in order:
            resumed[index].load_state_dict(copy.deepcopy(states[index]))
        go(resumed, 5, 1)
        for ours, theirs in zip(resumed[3].parameters(), whole[3].parameters(), strict=True):
            assert torch.equal(ours, theirs)


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "swalr": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


@pytest.mark.parametrize("order", ["scheduler first", "sparsify first"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_work_without_a_warning_and_as_without_us(name, order):
    def run(is_sparse):
        torch.manual_seed(0)
        model = small_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if is_sparse and order == "sparsify first":
            chtconv.sparsify(model, optimizer, interval=1, method="set")
        scheduler = SCHEDULERS[name](optimizer)
        if is_sparse and order == "scheduler first":
            chtconv.sparsify(model, optimizer, interval=1, method="set")
        rates = []

        def after():
            scheduler.step(*(1.0,) if name == "plateau" else ())
            rates.append(optimizer.param_groups[0]["lr"])

        train(model, optimizer, 7, after=after)
        return rates

    with warnings.catch_warnings():
        # Of torch itself, in a scheduler of schedulers.
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
        dense = run(False)
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
        assert run(True) == dense
    assert len(set(dense)) > 1


def test_the_whole_recipe_of_swa():
    model, optimizer, topology = sparse(sparsity=0.7, method="set", interval=2)
    average, scheduler = AveragedModel(model), SWALR(optimizer, swa_lr=0.05)
    topology.follow(average)
    images = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    train(model, optimizer, 6, after=lambda: (average.update_parameters(model), scheduler.step()))
    update_bn(images, average)
    assert topology.step_count == 6
    assert average(images[0]).isfinite().all()
    for name, active in links(average, topology).items():
        assert not (active & ~topology.masks[name]).any()
