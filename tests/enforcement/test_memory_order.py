"""Evolution goes position by position: the same in every memory format, without a copy where weights lie so."""

import pytest
import torch
from torch import nn

import chtconv
from chtconv.layers.matrix import from_matrix, to_matrix
from chtconv.topology.metrics import empty_slices

FORMATS = [torch.contiguous_format, torch.channels_last]


def test_channels_last_weights_are_a_matrix_as_they_lie():
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    weight = layer.weight.detach()
    matrix = to_matrix(weight, layer)
    assert matrix.data_ptr() == weight.data_ptr()
    assert matrix.is_contiguous()
    assert from_matrix(matrix, layer).stride() == weight.stride()


@pytest.mark.parametrize("method", ["set", "cht", "chts"])
def test_evolution_does_not_depend_on_the_memory_format(method):
    masks = []
    for memory_format in FORMATS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)).to(
            memory_format=memory_format
        )
        topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.6, method=method)
        model(torch.zeros(1, 3, 8, 8))
        for _ in range(3):
            topology.evolve()
        masks.append((topology.masks, topology.records))
    assert all(torch.equal(mask, masks[1][0][name]) for name, mask in masks[0][0].items())
    assert masks[0][1] == masks[1][1]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_empty_slices_are_counted(memory_format):
    layer = nn.Conv2d(5, 7, 3)
    mask = (torch.rand(7, 5, 3, 3) < 0.1).to(memory_format=memory_format)
    expected = sum(not mask[o, c].any() for o in range(7) for c in range(5)) / 35
    assert empty_slices(to_matrix(mask, layer), layer).item() == pytest.approx(expected)


KINDS = {
    "circular": (nn.Conv2d(3, 6, 5, padding=2, padding_mode="circular"), 9),
    "depthwise": (nn.Conv2d(6, 6, 7, padding="same", groups=6), 9),
    "grouped": (nn.Conv2d(6, 4, (1, 3), padding=(0, 1), groups=2), 9),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, output_padding=1), 5),
    "1-D": (nn.Conv1d(4, 6, 4, stride=2, dilation=2), 11),
    "3-D": (nn.Conv3d(2, 4, (1, 2, 3)), 4),
}


@pytest.mark.parametrize("graph", ["kernel", "layer"])
@pytest.mark.parametrize(("layer", "size"), KINDS.values(), ids=KINDS)
def test_a_layer_scores_its_own_matrix_as_link_scores_does_the_mask(layer, size, graph):
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.6, graph=graph)
    axes = len(layer.kernel_size)
    model(torch.zeros(1, layer.in_channels, *[size] * axes))
    arguments = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
    if isinstance(layer, nn.ConvTranspose2d):
        arguments |= {"transposed": True, "output_padding": layer.output_padding}
    (sparse,), mask = topology._layers, topology.masks["0.weight"]
    expected = chtconv.link_scores(mask, size, graph=graph, **arguments) * ~mask
    assert expected.any()
    torch.testing.assert_close(sparse.link_scores(sparse.matrix(mask)), sparse.matrix(expected))
    topology.detach()
