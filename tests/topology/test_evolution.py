"""Whole evolutions against independent ones: RigL, GraNet, SNFS and gradual pruning, done again on a twin."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import kernels, source, sparse, train
from torch import nn

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.methods import METHODS
from chtconv.methods.regrowth import REGROWTHS, Regrowth
from chtconv.methods.removal import REMOVALS, Removal
from chtconv.topology.evolution import turnover

SWAPPING = [name for name, method in METHODS.items() if method.regrowth and method.density == "constant"]


@given(
    links=st.integers(1, 50), target=st.integers(1, 50), share=st.floats(0, 1), rows=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_turnover_exchanges_so_many_of_the_smaller_number_and_prunes_or_grows_to_the_target(
    links, target, share, rows, seed
):
    exchanged = share * min(links, target)
    counts = turnover(links, target, exchanged, rows, source(seed))
    removed, regrown = (count.most - count.fewer_O.flatten().long() for count in counts)
    assert (links - removed + regrown == target).all()
    assert ((torch.minimum(removed, regrown) - exchanged).abs() < 1).all()
    assert (torch.minimum(removed, regrown) >= 0).all()
    assert (removed <= links).all()
    assert (regrown <= target).all()


@pytest.mark.parametrize("allocation", ["kernel", "layer"])
@pytest.mark.parametrize("name", SWAPPING)
@given(density=st.floats(0.05, 1), zeta=st.floats(0.01, 1), seed=st.integers(0, 2**31))
def test_an_evolution_keeps_the_number_of_links_and_what_it_did_not_remove(name, allocation, density, zeta, seed):
    if name == "snfs":
        allocation = "layer"
    model, _, topology = sparse(
        nn.Sequential(nn.Linear(20, 4)), method=name, sparsity=1 - density, zeta=zeta, interval=10**9,
        layers=["*"], allocation=allocation, seed=seed,
    )  # fmt: skip
    topology.capture_gradients()
    (model(torch.randn(3, 20, generator=source(seed))) ** 2).sum().backward()
    before, rows = topology.masks["0.weight"], 4 if allocation == "kernel" else 1
    topology.evolve()
    mask, (row,) = topology.masks["0.weight"], topology.records
    links = round(density * 80 / rows)
    assert mask.view(rows, -1).sum(1).tolist() == [links] * rows
    # A layer that links may move away from keeps one; one without a free position has nothing to exchange.
    wanted = min(zeta * links, links - 1) if name == "snfs" else zeta * links * rows * (links * rows < 80)
    assert abs(row["removed"] - wanted) < rows
    assert (before & ~mask).sum() == (mask & ~before).sum() == row["removed"] - row["rechosen"]


@pytest.mark.parametrize("name", METHODS)
def test_the_default_device_is_not_that_of_the_model(name):
    masks = []
    for device in ("cpu", "meta"):
        network = nn.Sequential(nn.Conv2d(3, 5, (3, 2)), nn.ReLU(), nn.Conv2d(5, 4, 2))
        model, _, topology = sparse(
            copy.deepcopy(network), method=name, sparsity=0.5, interval=10**9, total_steps=10**10, seed=1
        )
        for weight in model.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=source(2)))
        images = torch.randn(2, 3, 7, 6, generator=source(3))
        with torch.device(device):
            topology.capture_gradients()
            model(images).square().sum().backward()
            topology.evolve()
        masks.append(topology.masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_a_single_link_evolves_at_the_rate_of_zeta():
    """The first convolution has one link a kernel at 95 %: rounding down, it would never change."""
    topology = sparse(
        nn.Sequential(nn.Conv2d(3, 20_000, 3)), method="set", sparsity=1 - 1 / 27, zeta=0.3, interval=10**9
    )[2]
    topology.evolve()
    assert abs(topology.records[0]["removed"] / 20_000 - 0.3) < 0.02


class Twin:
    """A dense copy that a step is done with again: SGD by hand, removal and regrowth by sorting."""

    def __init__(self, model, topology):
        self.modules = dict(model.named_modules())
        self.masks = topology.masks
        self.momentum = {name: torch.zeros_like(mask, dtype=torch.float32) for name, mask in self.masks.items()}

    def step(self, model, images, lr=0.1):
        """Dense gradients and the weights after a step of plain SGD on masked ones."""
        twin = copy.deepcopy(model)
        twin.zero_grad()
        twin(images).square().mean().backward()
        parameters = dict(twin.named_parameters())
        self.gradients = {name: parameters[name].grad for name in self.masks}
        self.weights = {
            name: parameters[name].detach() - lr * self.gradients[name] * mask for name, mask in self.masks.items()
        }
        for name, gradient in self.gradients.items():
            self.momentum[name] = 0.9 * self.momentum[name] + 0.1 * gradient

    def evolved(self, name, removed, regrown, worth, allocation):
        """The mask after removal of the smallest and regrowth of the largest, row by row."""
        module = self.modules[name.removesuffix(".weight")]
        mask, size, worth = (
            kernels(values, module) for values in (self.masks[name], self.weights[name].abs(), worth[name].abs())
        )
        shape = mask.shape
        if allocation == "layer":
            mask, size, worth = (values.view(1, -1) for values in (mask, size, worth))
        result = torch.zeros_like(mask)
        for row, (active, sizes, values) in enumerate(zip(mask.tolist(), size.tolist(), worth.tolist(), strict=True)):
            alive = sorted((i for i, on in enumerate(active) if on), key=lambda i: sizes[i])[removed:]
            free = sorted(set(range(len(active))) - set(alive), key=lambda i: -values[i])[:regrown]
            result[row, alive + free] = True
        return result.view(shape)


def gradient_network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 5, 2), nn.Tanh(), nn.Conv2d(5, 3, 2)
    )


def stepped(model, optimizer, twin):
    images = torch.randn(4, 2, 6, 6)
    twin.step(model, images)
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("allocation", ["kernel", "layer"])
def test_rigl_is_rigl(allocation):
    """The smallest of the weights after the step go, the largest dense gradients of the step come; three times."""
    model = gradient_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(
        model, optimizer, method="rigl", sparsity=0.5, zeta=0.5, interval=2, allocation=allocation
    )
    modules, changed = dict(model.named_modules()), 0
    twin = Twin(model, topology)
    for step in range(1, 7):
        stepped(model, optimizer, twin)
        if step % 2:
            continue
        for name, mask in topology.masks.items():
            kept = kernels(twin.masks[name], modules[name.removesuffix(".weight")])
            each = int(kept.sum()) if allocation == "layer" else int(kept[0].sum())
            # Half of an odd number is rounded up or down at random, and which it was the record says.
            removed = {row["layer"]: row for row in topology.records}[name]["removed"]
            removed = removed if allocation == "layer" else removed / len(kept)
            assert abs(removed - each / 2) <= 0.5
            if removed == int(removed):
                expected = twin.evolved(name, int(removed), int(removed), twin.gradients, allocation)
                assert torch.equal(kernels(mask, modules[name.removesuffix(".weight")]), expected), (name, step)
                changed += int((mask & ~twin.masks[name]).sum())
        twin.masks = topology.masks
    assert changed > 20


def test_scores_over_all_windows_leave_the_corners_of_small_maps_alone():
    """On a map of 2x2 and weighted by the share of windows, corners are chosen far less often than the center."""
    chosen = {}
    for method, windows in (("in_bounds", "in_bounds"), ("occupancy", "in_bounds"), ("occupancy", "all")):
        model = nn.Sequential(nn.Conv2d(40, 60, 3, padding=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        topology = chtconv.sparsify(
            model, optimizer, method=method, windows=windows, sparsity=0.95, zeta=0.5, interval=1
        )
        before = topology.masks["0.weight"]
        model(torch.randn(2, 40, 2, 2)).sum().backward()
        optimizer.step()
        chosen[method, windows] = (topology.masks["0.weight"] & ~before).sum((0, 1)).flatten() / (~before).sum(
            (0, 1)
        ).flatten()
    corners = {name: float(rate[[0, 2, 6, 8]].mean() / rate[4]) for name, rate in chosen.items()}
    # Somewhat more than a quarter, because without replacement the best run out.
    assert 0.2 < corners["in_bounds", "in_bounds"] < 0.45
    assert 0.8 < corners["occupancy", "in_bounds"] < 1.25
    assert 0.2 < corners["occupancy", "all"] < 0.45


def test_score_times_gradient_takes_the_largest_products():
    """Of the link scores of what removal left, and the dense gradients of the step."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, method="cht_gradient", sparsity=0.5, zeta=1 / 3, interval=1)
    twin = Twin(model, topology)
    images = torch.randn(4, 6, 6, 6)
    twin.step(model, images)
    model(images).square().mean().backward()
    optimizer.step()
    size = twin.weights["0.weight"].abs().masked_fill(~twin.masks["0.weight"], float("inf")).flatten(1)
    kept = twin.masks["0.weight"].flatten(1).scatter(1, size.argsort(1)[:, :9], False)
    scores = chtconv.link_scores(kept.view(8, 6, 3, 3), (6, 6), padding=1).flatten(1)
    worth = scores * twin.gradients["0.weight"].abs().flatten(1)
    mask = topology.masks["0.weight"].flatten(1)
    assert mask[kept].all()
    chosen, rest = mask & ~kept, ~mask
    assert chosen.sum(1).tolist() == [9] * 8
    lowest = worth.masked_fill(~chosen, float("inf")).amin(1)
    highest = worth.masked_fill(~rest, 0.0).amax(1)
    assert (lowest >= 0.999 * highest).all()
    assert (worth[chosen] > 0).float().mean() > 0.9
    assert topology.stats()["layers"]["0.weight"]["training_flops"] == 2 * 8 * 54 * 36 * (3 * 0.5 + 0.5)


def granet_steps(**options):
    """Four steps that evolve: each with its number, the topology, its twin of before the evolution, and the modules."""
    model = gradient_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    topology = chtconv.sparsify(
        model, optimizer, method="granet", sparsity=0.8, zeta=0.5, zeta_schedule="constant", interval=1, stop=5,
        **options,
    )  # fmt: skip
    modules, twin = dict(model.named_modules()), Twin(model, topology)
    for step in range(1, 5):
        images = torch.randn(4, 2, 6, 6)
        twin.step(model, images, lr=0.05)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        yield step, topology, twin, modules
        twin.masks = topology.masks


def test_granet_prunes_first_and_exchanges_among_what_remains():
    """Links after each evolution along the cubic; removed and regrown as a share of those; which ones, as RigL."""
    for step, topology, twin, modules in granet_steps(allocation="layer"):
        for row in topology.records[-3:]:
            name = row["layer"]
            mask, before = topology.masks[name], int(twin.masks[name].sum())
            target = round((0.2 + 0.3 * (1 - step / 4) ** 3) * mask.numel())
            assert row["links"] == mask.sum() == target
            regrown = row["removed"] - (before - target)
            assert abs(regrown - 0.5 * target) < 1
            expected = twin.evolved(name, row["removed"], regrown, twin.gradients, "layer")
            assert torch.equal(kernels(mask, modules[name.removesuffix(".weight")]), expected)


def test_snfs_regrows_by_momentum_where_the_momentum_of_links_is_large():
    model = gradient_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, method="snfs", sparsity=0.6, zeta=0.5, interval=3)
    modules, twin, moved = dict(model.named_modules()), Twin(model, topology), 0
    for step in range(1, 10):
        stepped(model, optimizer, twin)
        if step % 3:
            continue
        links = {name: int(mask.sum()) for name, mask in twin.masks.items()}
        removed = {name: round(0.5 * number) for name, number in links.items()}
        means = {n: float((twin.momentum[n].abs() * m).sum()) / links[n] for n, m in twin.masks.items()}
        total = sum(removed.values())
        for name, mask in topology.masks.items():
            gained = int(mask.sum()) - links[name] + removed[name]
            room = mask.numel() - links[name] + removed[name]
            assert abs(gained - total * means[name] / sum(means.values())) < 1 or gained == room
            expected = twin.evolved(name, removed[name], gained, twin.momentum, "layer")
            assert torch.equal(kernels(mask, modules[name.removesuffix(".weight")]), expected)
            moved += abs(int(mask.sum()) - links[name])
        assert sum(int(mask.sum()) for mask in topology.masks.values()) == sum(links.values())
        twin.masks = topology.masks
    assert moved > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradients_off_the_mask_that_are_not_finite_count_as_none_in_momentum(value):
    model, optimizer, topology = sparse(nn.Sequential(nn.Conv2d(2, 1, 1)), method="snfs", sparsity=0.5, interval=9)
    mask = topology.masks["0.weight"]
    images = torch.where(mask[0], 1.0, value).expand(1, 2, 5, 5)
    model(images).sum().backward()
    optimizer.step()
    (layer,) = topology._layers
    torch.testing.assert_close(layer.dense_gradient.momentum, torch.where(mask, 0.1 * 25, 0.0))


def test_a_layer_that_links_move_away_from_keeps_one_and_gets_more_again():
    """Without any, it would have no momentum to get one back by."""
    model = nn.ModuleList([nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)])
    model, optimizer, topology = sparse(model, method="snfs", sparsity=0.9, zeta=1.0, interval=1)
    for used in (0, 0, 1, 1, 1):
        optimizer.zero_grad()
        model[used](torch.randn(2, 2, 5, 5)).square().sum().backward()
        optimizer.step()
        links = [int(mask.sum()) for mask in topology.masks.values()]
        assert sum(links) == 14
        assert links[1] == 1 or used == 1
    assert links[1] > 1
    assert topology.stats()["links"] == 14


@pytest.mark.parametrize("allocation", ["kernel", "layer"])
def test_gradual_pruning_takes_the_smallest_and_never_brings_one_back(allocation):
    model = gradient_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, method="gmp", sparsity=0.7, interval=2, stop=9, allocation=allocation)
    modules, twin = dict(model.named_modules()), Twin(model, topology)
    assert all(mask.all() for mask in twin.masks.values())
    for step in range(1, 11):
        stepped(model, optimizer, twin)
        for name, mask in topology.masks.items():
            module = modules[name.removesuffix(".weight")]
            rows = len(kernels(mask, module)) if allocation == "kernel" else 1
            gone = int(twin.masks[name].sum() - mask.sum())
            assert gone % rows == 0
            assert (gone > 0) == (step in (2, 4, 6, 8) and gone > 0)
            assert torch.equal(kernels(mask, module), twin.evolved(name, gone // rows, 0, twin.gradients, allocation))
        twin.masks = topology.masks
    assert all(mask.sum() == pytest.approx(0.3 * mask.numel(), abs=4) for mask in twin.masks.values())
    assert all(row["rechosen"] == row["new"] == 0 for row in topology.records)


def largest_of_all(twin, number):
    """How many of the largest weights of all layers together lie in each of them: one ``topk`` of one vector."""
    sizes = [twin.weights[name].abs().masked_fill(~mask, -1).flatten() for name, mask in twin.masks.items()]
    kept = torch.zeros(sum(map(len, sizes)), dtype=torch.bool)
    kept[torch.cat(sizes).topk(number).indices] = True
    return dict(zip(twin.masks, kept.split([len(size) for size in sizes]), strict=True))


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_gradual_pruning_of_the_model_keeps_the_largest_of_all_layers(distribution):
    model = gradient_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(
        model, optimizer, method="gmp", sparsity=0.6, interval=1, stop=5, allocation="model", distribution=distribution
    )
    twin = Twin(model, topology)
    total = sum(mask.numel() for mask in twin.masks.values())
    for step in range(1, 5):
        stepped(model, optimizer, twin)
        links = sum(int(mask.sum()) for mask in topology.masks.values())
        assert links == pytest.approx((0.4 + 0.6 * (1 - step / 4) ** 3) * total, abs=1.5)
        kept = largest_of_all(twin, links)
        assert all(torch.equal(mask.flatten(), kept[name]) for name, mask in topology.masks.items())
        twin.masks = topology.masks
    densities = [float(mask.float().mean()) for mask in twin.masks.values()]
    assert max(densities) - min(densities) > 0.1


def test_granet_of_the_model_prunes_by_one_threshold_and_exchanges_within_layers():
    """As published: first those below a threshold over all layers go, then layers exchange their own."""
    for step, topology, twin, modules in granet_steps(allocation="model", distribution="erk"):
        total = sum(mask.numel() for mask in twin.masks.values())
        links = sum(int(mask.sum()) for mask in topology.masks.values())
        assert links == pytest.approx((0.2 + 0.3 * (1 - step / 4) ** 3) * total, abs=1.5)
        left = {name: int(kept.sum()) for name, kept in largest_of_all(twin, links).items()}
        for row in topology.records[-3:]:
            name, mask = row["layer"], topology.masks[row["layer"]]
            assert row["links"] == mask.sum() == left[name]
            regrown = row["removed"] - int(twin.masks[name].sum()) + left[name]
            assert abs(regrown - 0.5 * left[name]) < 1
            expected = twin.evolved(name, row["removed"], regrown, twin.gradients, "layer")
            assert torch.equal(kernels(mask, modules[name.removesuffix(".weight")]), expected)
    share = [left[name] / mask.numel() for name, mask in twin.masks.items()]
    assert max(share) - min(share) > 0.1


def test_a_layer_of_small_weights_that_is_pruned_with_others_keeps_its_largest_link():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    largest = int(model[1].weight.abs().argmax())
    model, _, topology = sparse(model, method="gmp", sparsity=0.8, interval=1, stop=2, allocation="model")
    for _ in range(2):
        topology.step()
    links = [int(mask.sum()) for mask in topology.masks.values()]
    assert links[1] == 1
    assert topology.masks["1.weight"].view(-1)[largest]
    assert sum(links) == round(0.2 * 216) + round(0.2 * 576) + round(0.2 * 288)


def test_layers_that_choose_again_what_they_removed_stop_evolving():
    """From the evolution after the first in which they do, for good, also in a resumed run."""
    method = chtconv.method("cht", early_stop=0.6)

    def run():
        torch.manual_seed(0)
        return sparse(method=method, sparsity=0.5, zeta=0.4, interval=1)

    model, optimizer, topology = run()
    train(model, optimizer, 12)
    stopped = {}
    for row in topology.records:
        if row["layer"] in stopped:
            assert row["removed"] == row["new"] == 0
        else:
            assert row["removed"] > 0
        if row["removed"] and row["rechosen"] / row["removed"] >= 0.6:
            stopped[row["layer"]] = row["evolution"]
    assert stopped
    assert max(stopped.values()) < 11
    assert {name for name, stats in topology.stats()["layers"].items() if stats["stopped"]} == set(stopped)
    again, other, resumed = run()
    for part, loaded in ((again, model), (other, optimizer), (resumed, topology)):
        part.load_state_dict(copy.deepcopy(loaded.state_dict()))
    train(again, other, 1)
    assert all(row["removed"] == 0 for row in resumed.records[-3:] if row["layer"] in stopped)


def test_without_an_early_stop_no_layer_stops():
    model, optimizer, topology = sparse(method="cht", sparsity=0.5, zeta=0.4, interval=1)
    train(model, optimizer, 12)
    assert all(row["removed"] > 0 for row in topology.records)


def new_links(mask, method, **options):
    """The links that one evolution brings to a layer with this mask, on maps of 8x8."""
    layer = nn.Conv2d(mask.shape[1], mask.shape[0], 3, padding=1)
    sparsity = 1 - float(mask.float().mean())
    model, _, topology = sparse(nn.Sequential(layer), sparsity=sparsity, interval=10**9, method=method, **options)
    with torch.no_grad():
        layer.weight.copy_(mask * (1 + torch.rand(mask.shape, generator=source(0))))
    topology.load_state_dict(topology.state_dict() | {"masks": {"0.weight": mask}})
    model(torch.zeros(1, mask.shape[1], 8, 8))
    topology.evolve()
    return topology.masks["0.weight"] & ~mask


def test_where_links_compete_within_a_layer_kernels_can_share_regrowth_by_their_links():
    """As they are, scores of kernels with many links are larger, so that these get more than their part of new ones."""
    mask = torch.zeros(16, 8, 3, 3, dtype=torch.bool)
    for kernel in range(16):
        mask[kernel].view(-1)[torch.randperm(72, generator=source(kernel))[: 12 if kernel < 8 else 36]] = True
    gained = {}
    for shares in ("scores", "links", "equal", None):
        new = new_links(mask, chtconv.method("chts", kernel_shares=shares), zeta=0.3, allocation="layer")
        gained[shares] = int(new[8:].sum()) / int(new.sum())
    # Of the links, three quarters are in the second half of the kernels.
    assert gained["equal"] == pytest.approx(1 / 2, abs=0.1)
    assert gained["links"] == pytest.approx(3 / 4, abs=0.1)
    assert gained["scores"] > gained["links"] + 0.05
    assert gained[None] == gained["links"]


def test_controls_know_the_kernels_where_links_compete_within_a_layer():
    """As many new links in each kernel as CHTs brings; shuffled, about as many in each part of the layer."""
    mask = torch.zeros(32, 16, 3, 3, dtype=torch.bool)
    for kernel in range(32):
        mask[kernel].view(-1)[torch.randperm(144, generator=source(kernel))[: 4 + kernel]] = True
    options = {"zeta": 0.3, "allocation": "layer"}
    new = {name: new_links(mask, chtconv.method(name), **options) for name in ("chts", "random_turnover", "shuffled")}
    brought = {name: links.flatten(1).sum(1) for name, links in new.items()}
    assert torch.equal(brought["random_turnover"], brought["chts"])
    assert not torch.equal(new["random_turnover"], new["chts"])
    share = float(brought["shuffled"][16:].sum() / brought["shuffled"].sum())
    assert share == pytest.approx(float(mask[16:].sum() / mask.sum()), abs=0.08)


def test_shares_of_kernels_make_no_difference_where_every_kernel_has_as_many_links():
    masks = []
    for shares in ("scores", "links", "equal"):
        method = chtconv.method("chts", kernel_shares=shares)
        torch.manual_seed(0)
        with pytest.warns(chtconv.ChtconvWarning, match="kernel_shares=.* makes no difference"):
            model, _, topology = sparse(nn.Sequential(nn.Conv2d(3, 8, 3)), method=method, sparsity=0.6, interval=10**9)
        model(torch.zeros(1, 3, 7, 7))
        topology.evolve()
        masks.append(topology.masks["0.weight"])
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("windows", ["in_bounds", "all"])
def test_smoothing_leads_from_link_prediction_to_the_control_of_occupancy(windows):
    masks = {}
    for name, method in {
        "predicted": chtconv.method("chts"),
        "none": chtconv.method("chts", smoothing=0.0),
        "half": chtconv.method("chts", smoothing=0.5),
        "all": chtconv.method("chts", smoothing=1.0),
        "control": chtconv.method("occupancy"),
    }.items():
        torch.manual_seed(0)
        convolution = nn.Conv2d(8, 16, 3, padding=1)
        model, _, topology = sparse(
            nn.Sequential(convolution), method=method, sparsity=0.9, zeta=0.5, interval=10**9, windows=windows
        )
        model(torch.zeros(1, 8, 3, 3))
        before = topology.masks["0.weight"]
        topology.evolve()
        masks[name] = topology.masks["0.weight"] & ~before
    assert torch.equal(masks["none"], masks["predicted"])
    assert torch.equal(masks["all"], masks["control"])
    assert not torch.equal(masks["half"], masks["predicted"])
    assert not torch.equal(masks["half"], masks["control"])


def test_smoothing_reaches_positions_that_no_path_leads_to():
    """One link in each of its slices: no path anywhere, so that links come at random; with the prior, beside links."""
    mask = torch.zeros(16, 32, 3, 3, dtype=torch.bool)
    mask[:, :8, 1, 1] = True
    beside = {}
    for share in (0.0, 0.5):
        new = new_links(mask, chtconv.method("chts", smoothing=share), zeta=0.25)
        beside[share] = float(new[:, :8].sum() / new.sum())
    assert beside[0.5] == 1
    assert beside[0.0] < 0.5


def evolved(method):
    """A topology after two evolutions by a method, at a sparsity at which few positions have a score."""
    model, optimizer, topology = sparse(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)), method=method, sparsity=0.9, interval=1
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return topology


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (lambda worth, source: worth, r"gave the key 0\.0 to a position; accepted are keys above 0 for all"),
        (lambda worth, source: -worth - 1, r"gave the key -.*; accepted are keys above 0"),
        (lambda worth, source: worth * float("nan"), "gave the key nan"),
        (lambda worth, source: torch.zeros_like(worth, dtype=torch.int64), "gave the key 0 to"),
        (lambda worth, source: worth.double() + 1, r"gave keys of torch\.float64 .*; accepted are torch\.int32"),
        (
            lambda worth, source: worth[:, 1:] + 1,
            r"gave keys of torch\.float32 of shape \[8, 26\]; accepted are .* of shape \[8, 27\]",
        ),
        (lambda worth, source: None, "gave keys of NoneType"),
    ],
)
def test_keys_of_an_own_rule_that_lose_links_are_refused_with_layer_and_rule(keys, message, monkeypatch):
    monkeypatch.setitem(REGROWTHS, "mine", Regrowth(keys, "scores"))
    with pytest.raises(ConfigurationError, match=rf"layer 0\.weight: regrowth 'mine' {message}"):
        evolved(chtconv.Method("magnitude", "mine"))


@pytest.mark.parametrize(
    "keys",
    [
        lambda worth, source: worth + 1,
        lambda worth, source: torch.rand(worth.shape, generator=source).add_(0.1),
        lambda worth, source: torch.arange(1, worth.numel() + 1).view(worth.shape),
        lambda worth, source: torch.arange(1, worth.numel() + 1, dtype=torch.int32).view(worth.shape),
    ],
)
def test_an_own_regrowth_keeps_the_number_of_links(keys, monkeypatch):
    monkeypatch.setitem(REGROWTHS, "mine", Regrowth(keys, "scores"))
    topology = evolved(chtconv.Method("magnitude", "mine"))
    assert [mask.flatten(1).sum(1).unique().tolist() for mask in topology.masks.values()] == [[3], [7]]


def test_an_own_regrowth_that_samples_is_asked_with_temperature_and_explored_share(monkeypatch):
    asked = []

    def keys(worth, source, *, temperature, explore, allowed_RN):
        asked.append((temperature, explore, allowed_RN.shape == worth.shape))
        return worth + 1

    monkeypatch.setitem(REGROWTHS, "mine", Regrowth(keys, "scores", sampled=True))
    evolved(chtconv.Method("magnitude", "mine", temperature=2.0, explore=0.25))
    assert set(asked) == {(2.0, 0.25, True)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_an_own_importance_of_any_type_removes_the_same_links(dtype, monkeypatch):
    """Rounded to numbers that all of these types hold."""
    removed = []
    for kind in (torch.float32, dtype):
        rule = Removal(lambda weight, gradient, kind=kind: (weight.abs() * 1000).round().to(kind))
        monkeypatch.setitem(REMOVALS, "mine", rule)
        torch.manual_seed(0)
        removed.append(evolved(chtconv.Method("mine", "uniform")).masks)
    assert all(torch.equal(removed[0][name], removed[1][name]) for name in removed[0])


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (lambda weight, gradient: weight.abs().sum(-1), r"Tensor of shape \[1, 8\]; accepted is .* \[1, 8, 27\]"),
        (lambda weight, gradient: None, "NoneType"),
    ],
)
def test_importance_of_an_own_rule_that_is_of_no_link_is_refused(importance, message, monkeypatch):
    monkeypatch.setitem(REMOVALS, "mine", Removal(importance))
    with pytest.raises(ConfigurationError, match=rf"layer 0\.weight: removal 'mine' gave {message}"):
        evolved(chtconv.Method("mine", "uniform"))


@pytest.mark.parametrize("changes", [{"explore": 0.1}, {"temperature": 0.5}])
def test_kernels_that_filled_up_do_not_stop_a_layer(changes):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1))
    method = chtconv.method("chts", **changes)
    topology = sparse(model, method=method, allocation="layer", sparsity=0.5, interval=10**9)[2]
    state = topology.state_dict()
    mask = torch.zeros(16, 27, dtype=torch.bool)
    mask[:8] = True
    state["masks"]["0.weight"] = mask.view(16, 3, 3, 3)
    topology.load_state_dict(state)
    topology.enforce()
    model(torch.randn(1, 3, 8, 8))
    topology.evolve()
    assert topology.masks["0.weight"].sum() == 216


def test_a_layer_that_is_dense_has_nothing_to_exchange():
    method = chtconv.method("chts", early_stop=0.9)
    model, optimizer, topology = sparse(
        method=method, sparsity=0.5, interval=1, overrides={"0": {"sparsity": 0.0}}, layers=["0", "3"]
    )
    train(model, optimizer, 1)
    stats = topology.stats()
    dense, other = stats["layers"]["0.weight"], stats["layers"]["3.weight"]
    assert (dense["density"], dense["overlap"], dense["zero_scores"], dense["stopped"]) == (1.0, 0.0, None, False)
    assert stats["overlap"] == other["overlap"]
    assert other["turnover"] > 0
