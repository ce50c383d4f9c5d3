"""Every family of networks trains sparse as it is: exact links, nothing off the mask, plain to everyone else."""

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from support import assert_nothing_off_the_mask
from torch import nn
from zoo import ZOO, Attention, Case, TorchAttention, UNet, ViT

import chtconv

SPARSITY = 0.8
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
# On the graph of a kernel with a single position there is nothing to predict; the graph of the layer is for those.
RUNS = [(name, method, "kernel") for name in ZOO for method in ("set", "rigl", "chts")] + [
    (name, "chts", "layer") for name in ZOO if ZOO[name].linear or name in ("resnet_bottleneck", "mobilenet_v2")
]


def sparse(model: nn.Module, layers, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    options = {"sparsity": SPARSITY, "interval": 1, "seed": 14} | options
    return optimizer, chtconv.sparsify(model, optimizer, layers=layers, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    outputs = model(inputs)
    outputs.square().mean().backward()
    optimizer.step()
    return outputs.detach()


def asked_for(model: nn.Module, case: Case) -> dict[str, nn.Module]:
    """The layers that ought to be sparse, by name of their weight, found in another way than the library's."""
    kinds = (*CONVOLUTIONS, nn.Linear) if case.layers else CONVOLUTIONS
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and any(fnmatchcase(name, pattern) for pattern in case.layers or ["*"])
    }


def by_output(module: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """The mask with a row for each output channel, whatever the order of the weight's axes."""
    if not isinstance(module, TRANSPOSED):
        return mask.flatten(1)
    groups = module.groups
    return mask.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)


@pytest.mark.parametrize(("name", "method", "graph"), RUNS)
def test_every_network_trains_with_exact_links(name, method, graph):
    case = ZOO[name]
    model = case.build()
    keys = list(model.state_dict())
    optimizer, topology = sparse(model, case.layers, method=method, graph=graph)
    layers = asked_for(model, case)
    assert set(topology.masks) == set(layers)
    assert case.linear == any(isinstance(module, nn.Linear) for module in layers.values())
    first = {name: mask.clone() for name, mask in topology.masks.items()}
    for _ in range(3):
        assert step(model, optimizer, case.inputs(4)).isfinite().all()
        assert_nothing_off_the_mask(topology, model, optimizer)
        for key, mask in topology.masks.items():
            rows = by_output(layers[key], mask)
            assert (rows.sum(1) == round((1 - SPARSITY) * rows.shape[1])).all(), key
    assert (topology.step_count, topology.evolutions) == (3, 3)
    # Two kernels of a few links (the head of the U-Net) may well get back what they lost.
    assert not [k for k, mask in topology.masks.items() if len(mask) > 2 and torch.equal(mask, first[k])]
    links = sum(int(mask.sum()) for mask in topology.masks.values())
    assert topology.stats()["sparsity"] == pytest.approx(1 - links / sum(m.numel() for m in first.values()))
    # Kernels of few positions cannot be sparse to the percent.
    assert topology.stats()["sparsity"] == pytest.approx(SPARSITY, abs=0.03)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ZOO)
def test_to_everyone_else_the_model_is_a_plain_one(name):
    case = ZOO[name]
    model = case.build()
    optimizer, topology = sparse(model, case.layers)
    step(model, optimizer, case.inputs(4))
    inputs = case.inputs(2)
    plain, twin = case.build(), copy.deepcopy(model)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(inputs)
        for other in (plain, twin):
            assert torch.equal(other.eval()(inputs), expected)

    # A copy is sparse, trains by itself, and becomes dense where nobody holds it sparse.
    before = [parameter.detach().clone() for parameter in model.parameters()]
    copied = dict(twin.named_parameters())
    step(twin.train(), torch.optim.AdamW(twin.parameters(), lr=0.01), case.inputs(4))
    assert any(copied[key][~mask].any() for key, mask in topology.masks.items())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert topology.step_count == 1

    # Or sparse with a topology of its own, while the first one goes on.
    twin_optimizer, twin_topology = sparse(twin, case.layers, seed=15)
    step(twin, twin_optimizer, case.inputs(4))
    assert_nothing_off_the_mask(twin_topology, twin, twin_optimizer)
    step(model.train(), optimizer, case.inputs(4))
    assert_nothing_off_the_mask(topology, model, optimizer)
    assert (topology.evolutions, twin_topology.evolutions) == (2, 1)


def test_a_fully_convolutional_network_takes_images_of_several_sizes_in_turn():
    model = UNet(depth=1, width=8)
    optimizer, topology = sparse(model, None, method="chts")
    for size in [(16, 16), (6, 10), (16, 16)]:
        assert step(model, optimizer, torch.randn(2, 3, *size)).shape == (2, 2, *size)
        assert_nothing_off_the_mask(topology, model, optimizer)
    assert topology.evolutions == 3


def test_the_size_last_seen_decides_the_scores():
    masks = []
    for size in (16, 8):
        torch.manual_seed(0)
        model = UNet(depth=2, width=8)
        _optimizer, topology = sparse(model, None, method="cht", interval=10**9)
        for seen in (32, size):
            model(torch.zeros(1, 3, seen, seen))
        topology.evolve()
        masks.append(topology.masks)
    assert any(not torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_the_first_projection_of_torchs_attention_is_a_parameter_of_no_layer_and_stays_dense():
    small = {"image": 16, "patch": 4, "width": 24, "depth": 1}
    topologies = {}
    for attention in (Attention, TorchAttention):
        model = ViT(**small, attention=attention)
        topologies[attention] = sparse(model, ["blocks.*"], method="set")[1]
    own, torchs = ({key.split(".attn.")[-1] for key in t.masks if ".attn." in key} for t in topologies.values())
    assert own == {"qkv.weight", "proj.weight"}
    assert torchs == {"out_proj.weight"}
    assert model.blocks[0].attn.in_proj_weight.all()


@pytest.mark.parametrize("graph", ["kernel", "layer"])
def test_the_second_projection_of_torchs_attention_evolves_though_it_is_never_called(graph):
    model = ZOO["vit_torch"].build()
    called = []
    model.blocks[0].attn.out_proj.register_forward_hook(lambda *_: called.append(1))
    optimizer, topology = sparse(model, ["blocks.0.attn.out_proj"], graph=graph)
    before = topology.masks["blocks.0.attn.out_proj.weight"].clone()
    step(model, optimizer, ZOO["vit_torch"].inputs(4))
    assert not called
    assert topology.evolutions == 1
    assert not torch.equal(topology.masks["blocks.0.attn.out_proj.weight"], before)
    # Torch's fused attention reads the weights itself in evaluation; it must see the same sparse ones.
    inputs = ZOO["vit_torch"].inputs(2)
    with torch.no_grad():
        assert torch.allclose(model.eval()(inputs), model.train()(inputs), atol=1e-5)
