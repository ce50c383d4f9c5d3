"""Removal that goes on along the chain of layers: no dead channel is left after it, and no link is lost."""

import pytest
import torch
from torch import nn

import chtconv
import chtconv.topology.topology
from chtconv.layers.chains import remove_dead
from chtconv.layers.consecutive import consecutive_layers
from chtconv.layers.matrix import by_channel


def network():
    return nn.Sequential(
        nn.Conv2d(2, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(24, 16, 1), nn.Flatten(), nn.Linear(16 * 4, 4),
    )  # fmt: skip


def alive(channels):
    """Which channels have links on both sides, by name of the two layers: from masks as [O, C]."""
    first, second, third = channels
    grouped = torch.zeros(24, 24, dtype=torch.bool)
    for group in range(2):
        part = slice(12 * group, 12 * group + 12)
        grouped[part, part] = second[part]
    return (first.any(1), grouped.any(0)), (grouped.any(1), third.any(0))


@pytest.mark.parametrize("base", ["set", "cht", "chtss"])
def test_after_removal_no_channel_is_dead_and_as_many_links_regrow(base, monkeypatch):
    seen, real = [], chtconv.topology.topology.evolve

    def evolve(layers, **options):
        before = {layer: layer.matrix(layer.mask) for layer in layers}
        results = real(layers, **options)
        seen.append([(each.layer, before[each.layer], each.removed.clone(), each.mask.clone()) for each in results])
        return results

    monkeypatch.setattr(chtconv.topology.topology, "evolve", evolve)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(
        model, optimizer, method=chtconv.method(base, prune_dead=True), sparsity=0.95, interval=1, stop=5, zeta=0.3,
        zeta_schedule="constant", layers=["*"],
    )  # fmt: skip
    assert all(layer.settings.allocation == "layer" for layer in topology._layers)
    links, beyond = consecutive_layers(model, ["0", "3", "5", "7"]), 0
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        optimizer.step()
        kept = {}
        for layer, before, removed, after in seen[-1]:
            assert not (removed & ~before).any()
            assert not (before & ~removed & ~after).any()
            assert after.sum() == layer.links == topology.masks[layer.name].sum()
            kept[layer.module_name] = by_channel(before & ~removed, layer.module)
            beyond += int(removed.sum() > 0.3 * before.sum() + (before.sum() - after.sum()) + 1)
        again = remove_dead(kept, links)
        assert all(torch.equal(again[name], mask) for name, mask in kept.items())
        for incoming, outgoing in alive([kept[name].any(2) for name in ("0", "3", "5")]):
            assert torch.equal(incoming, outgoing)
    assert beyond > 0, "no channel died, so that nothing was tested"


def test_layers_of_other_methods_keep_their_links():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(
        model, optimizer, method="set", sparsity=0.9, interval=1, layers=["*"],
        overrides={"[03]": {"method": chtconv.method("set", prune_dead=True)}},
    )  # fmt: skip
    links = {name: int(mask.sum()) for name, mask in topology.masks.items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        optimizer.step()
    assert {name: int(mask.sum()) for name, mask in topology.masks.items()} == links
    ordinary = [row for row in topology.records if row["layer"] in ("5.weight", "7.weight")]
    assert all(row["removed"] <= 0.3 * row["links"] + 16 for row in ordinary)


def test_pruning_needs_allocation_by_layer_and_a_model_that_can_be_read():
    method = chtconv.method("cht", prune_dead=True)

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    for model, options, message in (
        (network(), {"allocation": "kernel"}, "layer 0: .*prune_dead=True.* accepted is allocation='layer'"),
        (Branching(), {}, "trace"),
    ):
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(chtconv.ConfigurationError, match=message):
            chtconv.sparsify(model, torch.optim.SGD(model.parameters()), method=method, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
