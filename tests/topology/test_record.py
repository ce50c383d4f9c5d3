"""The record and the statistics, counted again from masks saved before and after."""

import pytest
import torch
from support import FROM, kernels, small_network, sparse, train
from torch import nn

import chtconv
import chtconv.topology.topology
from chtconv.layers.matrix import from_matrix
from chtconv.methods import METHODS


def network():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, stride=2), nn.ReLU(),
        nn.Conv2d(6, 20, 3, stride=2), nn.Flatten(), nn.Linear(20 * 36, 4),
    )  # fmt: skip


class Witness:
    """What evolutions did, noted beside the record: masks before and after, and what was removed in between."""

    def __init__(self, monkeypatch):
        self.seen, real = [], chtconv.topology.topology.evolve

        def evolve(layers, **options):
            before = {layer.name: layer.mask for layer in layers}
            results = real(layers, **options)
            self.seen.append(
                {
                    each.layer.name: (
                        before[each.layer.name],
                        *(from_matrix(m, each.layer.module) for m in (each.removed, each.mask)),
                    )
                    for each in results
                }
            )
            return results

        monkeypatch.setattr(chtconv.topology.topology, "evolve", evolve)


def run(monkeypatch, steps=9, **options):
    witness = Witness(monkeypatch)
    model, optimizer, topology = sparse(network(), interval=2, stop=8, layers=["*"], **options)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6, 6, generator=draw)).square().mean().backward()
        optimizer.step()
    return witness, model, topology


def links_of_slices(mask, module):
    """Links of each kernel and input channel, by loops."""
    positions = mask[0, 0].numel()
    return [int(row[c : c + positions].sum()) for row in kernels(mask, module) for c in range(0, len(row), positions)]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "static"])
def test_every_count_of_the_record(method, monkeypatch):
    witness, model, topology = run(monkeypatch, method=method, sparsity=0.7, zeta=0.5)
    modules, rows = dict(model.named_modules()), iter(topology.records)
    ever, newest = {name: before.clone() for name, (before, _, _) in witness.seen[0].items()}, {}
    for evolution, layers in enumerate(witness.seen):
        for name, (before, removed, after) in layers.items():
            row, module = next(rows), modules[name.removesuffix(".weight")]
            kept = before & ~removed
            assert not (kept & ~after).any()
            new, links, size = after & ~before, int(after.sum()), after.numel()
            ever[name] |= after
            last = newest.get(name)
            expected = {
                "evolution": evolution,
                "step": 2 * evolution + 2,
                "layer": name,
                "size": size,
                "links": links,
                "density": links / size,
                "removed": int(removed.sum()),
                "rechosen": int((removed & after).sum()),
                "new": int(new.sum()),
                "overlap": int((removed & after).sum()) / max(1, int(removed.sum())),
                "turnover": int(new.sum()) / links,
                "survival": int((last & after).sum()) / int(last.sum()) if last is not None and last.any() else None,
                "itop": int(ever[name].sum()) / size,
            }
            newest[name] = new
            assert {key: row[key] for key in expected} == pytest.approx(expected)
            assert set(row) == {*expected, "slices", "empty_slices", "zero_scores", "tied_scores"}
            assert (row["zero_scores"] is None) == (row["tied_scores"] is None) == (not METHODS[method].uses_scores)
            slices = links_of_slices(after, module)
            assert row["slices"] == len(slices)
            assert row["empty_slices"] == pytest.approx(slices.count(0) / len(slices))
    assert next(rows, None) is None
    assert len(witness.seen) == 3


@pytest.mark.parametrize("method", ["cht", "chts", "chtss", "shuffled", "random_turnover"])
@pytest.mark.parametrize("predictor", ["occupancy", "ch3_l3n"])
def test_shares_of_zero_and_of_tied_scores(method, predictor, monkeypatch):
    """Over the candidates: all positions that are not kept. Ties by brute force, pair by pair."""
    witness, model, topology = run(monkeypatch, method=method, predictor=predictor, sparsity=0.8, zeta=0.5)
    geometry = {
        "0.weight": (6, {"padding": 1, "groups": 2}),
        "2.weight": (6, {"stride": 2, "transposed": True}),
        "4.weight": (13, {"stride": 2}),
        "6.weight": ((), {}),
    }
    modules, seen = dict(model.named_modules()), set()
    for row in topology.records:
        name = row["layer"]
        before, removed, _ = witness.seen[row["evolution"]][name]
        module = modules[name.removesuffix(".weight")]
        kept = before & ~removed
        size, options = geometry[name]
        scores = kernels(chtconv.link_scores(kept, size, predictor=predictor, **options), module).double()
        free = ~kernels(kept, module)
        assert row["zero_scores"] == pytest.approx((scores[free] == 0).double().mean().item(), abs=1e-6)
        if len(free) > 8:
            continue
        tied = 0
        for values, allowed in zip(scores, free, strict=True):
            positive = values[allowed & (values > 0)]
            equal = (positive[:, None] - positive).abs() <= 2**-15 * positive
            tied += int((equal.sum(1) > 1).sum())
        assert row["tied_scores"] == pytest.approx(tied / int(free.sum()), abs=1e-6)
        seen.add(0 < tied < int(free.sum()))
    assert True in seen


def conv_flops(module, size):
    """Two for each multiplication: every weight once for each window, for each input of a transposed one."""
    if isinstance(module, nn.Linear):
        return 2 * module.weight.numel()
    out = [(s + 2 * p - k) // d + 1 for s, p, k, d in zip(size, module.padding, module.kernel_size, module.stride)]  # noqa: B905
    windows = size[0] * size[1] if isinstance(module, nn.ConvTranspose2d) else out[0] * out[1]
    return 2 * module.weight.numel() * windows


@pytest.mark.parametrize("method", ["static", "set", "rigl", "snfs", "gmp", "granet", "chtss"])
def test_flops_summed_by_hand_over_the_steps(method):
    """Forward and gradient of the inputs with the links there are, gradient of the weights dense where RigL looks."""
    sizes = {"0": (6, 6), "2": (6, 6), "4": (13, 13), "6": ()}
    model, optimizer, topology = sparse(network(), interval=3, stop=8, layers=["*"], method=method, sparsity=0.7)
    modules, total, steps = dict(model.named_modules()), dict.fromkeys(sizes, 0.0), 0
    for step in range(1, 10):
        for name, module in modules.items():
            if name in sizes:
                mask = topology.masks[f"{name}.weight"]
                density, dense = int(mask.sum()) / mask.numel(), conv_flops(module, sizes[name])
                looks = method == "snfs" or (method in ("rigl", "granet") and step in (3, 6))
                total[name] += dense * density * 2 + dense * (1 if looks else density)
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        optimizer.step()
        steps += 1
    stats = topology.stats()
    for name, flops in total.items():
        layer, dense = stats["layers"][f"{name}.weight"], conv_flops(modules[name], sizes[name])
        assert layer["dense_forward_flops"] == dense
        assert layer["forward_flops"] == pytest.approx(dense * layer["density"])
        assert layer["dense_training_flops"] == 3 * dense * steps
        # Exact where the number of links does not change; where it does, dense gradients are a small correction.
        exact = method not in (*FROM, "snfs") or method in ("gmp", "chtss")
        assert layer["training_flops"] == pytest.approx(flops, rel=1e-9 if exact else 0.05)
    for key in ("forward_flops", "dense_forward_flops", "training_flops", "dense_training_flops", "links", "size"):
        assert stats[key] == pytest.approx(sum(layer[key] for layer in stats["layers"].values()))


def test_stats_count_links_and_everything_ever_explored(monkeypatch):
    witness, model, topology = run(monkeypatch, method="set", sparsity=0.5)
    modules = dict(model.named_modules())
    stats, size, explored = topology.stats(), 0, 0
    assert (stats["step"], stats["evolutions"]) == (9, 3)
    for name, mask in topology.masks.items():
        module, layer = modules[name.removesuffix(".weight")], stats["layers"][name]
        ever = witness.seen[0][name][0]
        for each in witness.seen:
            ever = ever | each[name][2]
        size, explored = size + mask.numel(), explored + int(ever.sum())
        slices = links_of_slices(mask, module)
        assert layer["explored"] == ever.sum()
        assert layer["itop"] == pytest.approx(int(ever.sum()) / mask.numel())
        assert layer["empty_slices"] == pytest.approx(slices.count(0) / len(slices))
        assert (layer["shape"], layer["links"], layer["size"]) == (list(mask.shape), int(mask.sum()), mask.numel())
        assert layer["sparsity"] == pytest.approx(1 - layer["density"]) == pytest.approx(0.5, abs=0.06)
        last = next(row for row in reversed(topology.records) if row["layer"] == name)
        assert all(layer[key] == last[key] for key in ("overlap", "turnover", "survival", "zero_scores"))
    rows = [row for row in topology.records if row["evolution"] == 2]
    removed, rechosen, new = (sum(row[key] for row in rows) for key in ("removed", "rechosen", "new"))
    assert stats["overlap"] == rechosen / removed > 0
    assert stats["turnover"] == new / stats["links"]
    assert stats["itop"] == pytest.approx(explored / size)
    assert stats["density"] == pytest.approx(stats["links"] / size)


def test_active_channels_between_layers_that_follow_each_other():
    """By hand: a channel counts if it has links on both sides, again and again until nothing changes."""
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 3))
    topology = sparse(model, sparsity=0.95, method="static", allocation="layer")[2]
    first, second, third = (topology.masks[f"{i}.weight"].flatten(2).any(2) for i in (0, 2, 4))
    for _ in range(20):
        into, out = first.any(1) & second.any(0), second.any(1) & third.any(0)
        first, third = first & into[:, None], third & out
        second = second & into & out[:, None]
    assert topology.stats()["anp"] == pytest.approx((into.sum() + out.sum()).item() / 28)
    assert 0 < topology.stats()["anp"] < 0.9
    assert sparse(nn.Sequential(nn.Conv2d(2, 16, 3)), method="static")[2].stats()["anp"] is None


def test_before_anything_ran_flops_are_unknown_and_nothing_is_recorded():
    topology = sparse()[2]
    stats = topology.stats()
    assert topology.records == []
    assert stats["forward_flops"] is stats["training_flops"] is None
    for numbers in (stats, stats["layers"]["0.weight"]):
        assert numbers["overlap"] is numbers["turnover"] is None


def test_a_layer_that_was_frozen_has_no_numbers_of_the_latest_evolution():
    model, optimizer, topology = sparse(method="set", interval=1, sparsity=0.5)
    train(model, optimizer, 1)
    name = next(iter(topology.masks))
    assert topology.stats()["layers"][name]["overlap"] is not None
    model.get_parameter(name).requires_grad_(False)
    topology.evolve()
    stats = topology.stats()
    assert stats["layers"].pop(name)["overlap"] is None
    assert all(layer["overlap"] is not None for layer in stats["layers"].values())


def test_records_and_masks_are_copies():
    model, optimizer, topology = sparse(method="set", interval=1, sparsity=0.5)
    train(model, optimizer, 1)
    topology.records.clear()
    topology.records[0]["links"] = -1
    for mask in topology.masks.values():
        mask.fill_(True)
    assert len(topology.records) == 3
    assert topology.records[0]["links"] == topology.masks["0.weight"].sum() > 0


@pytest.mark.parametrize("there", [True, False])
def test_the_record_goes_on_under_the_names_of_the_model_that_loads_it(there):
    """In a wrapper and out of it again, as from DistributedDataParallel to one process."""
    plain, wrapped = small_network(), nn.Sequential()
    wrapped.add_module("module", small_network())
    first, second = (plain, wrapped) if there else (wrapped, plain)
    model, optimizer, topology = sparse(first, sparsity=0.5, interval=1)
    train(model, optimizer, 2)
    other, optimizer, goes_on = sparse(second, sparsity=0.5, interval=1)
    state = dict(zip(other.state_dict(), model.state_dict().values(), strict=True))
    other.load_state_dict(state)
    goes_on.load_state_dict(topology.state_dict())
    rows = goes_on.records
    assert {row["layer"] for row in rows} == set(goes_on.masks) != set(topology.masks)
    for row, old in zip(rows, topology.records, strict=True):
        assert row | {"layer": old["layer"]} == old
    assert all(layer["overlap"] is not None for layer in goes_on.stats()["layers"].values())


def test_flops_of_a_transposed_convolution_whose_output_is_padded_by_less_than_its_dilation():
    layer = nn.ConvTranspose2d(4, 4, 3, stride=1, dilation=2, output_padding=1)
    model, optimizer, topology = sparse(nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Flatten()), method="set")
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    assert topology.stats()["layers"]["1.weight"]["dense_forward_flops"] == 2 * 5 * 5 * 4 * 4 * 9
