"""Weights as a matrix with a row for each kernel: what a row sees, checked by what an output depends on."""

import pytest
import torch
from support import kernels
from torch import nn

from chtconv.layers.matrix import (
    LAYERS,
    by_channel,
    from_channels,
    from_matrix,
    groups_of,
    kernel_shape,
    matrix_shape,
    positions_of,
    to_matrix,
)

KINDS = {
    "conv1d": nn.Conv1d(4, 6, 5, groups=2),
    "conv2d": nn.Conv2d(3, 4, (2, 3)),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3),
    "conv3d": nn.Conv3d(2, 3, (1, 2, 3)),
    "linear": nn.Linear(5, 4),
    "transposed1d": nn.ConvTranspose1d(4, 6, 3),
    "transposed2d": nn.ConvTranspose2d(4, 6, (2, 3), groups=2),
    "transposed depthwise": nn.ConvTranspose2d(3, 6, 2, groups=3),
    "transposed3d": nn.ConvTranspose3d(2, 4, 2, groups=2),
}
every_kind = pytest.mark.parametrize("layer", KINDS.values(), ids=KINDS)


@every_kind
def test_rows_are_output_channels(layer):
    """The gradient of one output channel touches the weights of its row and no other."""
    assert isinstance(layer, LAYERS)
    axes = len(getattr(layer, "kernel_size", ()))
    inputs = layer.in_features if axes == 0 else layer.in_channels
    outputs = layer(torch.rand(1, inputs, *[5] * axes) + 0.5)
    rows = []
    for o in range(outputs.shape[1]):
        (gradient,) = torch.autograd.grad(outputs[0, o].sum(), layer.weight, retain_graph=True)
        rows.append(to_matrix(gradient, layer) != 0)
        assert rows[-1][o].all()
        assert rows[-1].sum() == rows[-1].shape[1]
    assert matrix_shape(layer) == rows[0].shape == (len(rows), layer.weight.numel() // len(rows))


@every_kind
def test_a_matrix_goes_back_to_where_it_came_from(layer):
    values = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    matrix = to_matrix(values, layer)
    channels = kernel_shape(layer)[0]
    # Position by position: the channels of the first position come first.
    by_position = kernels(values, layer).view(len(matrix), channels, -1).mT
    assert torch.equal(matrix, by_position.flatten(1))
    assert torch.equal(from_matrix(matrix, layer), values)
    assert torch.equal(to_matrix(from_matrix(matrix, layer), layer), matrix)


@every_kind
def test_columns_are_input_channels_times_positions(layer):
    channels, *kernel = kernel_shape(layer)
    outputs, columns = matrix_shape(layer)
    positions = torch.Size(kernel).numel()
    assert positions == positions_of(layer)
    assert channels * positions == columns
    if not isinstance(layer, nn.Linear):
        assert channels * groups_of(layer) == layer.in_channels
    values = torch.randn(layer.weight.shape)
    split = by_channel(to_matrix(values, layer), layer)
    assert split.shape == (outputs, channels, positions)
    assert torch.equal(split, kernels(values, layer).view(split.shape))
    assert torch.equal(from_channels(split), to_matrix(values, layer))
    # The channels are the second axis of ordinary weights, and the first, within a group, of transposed ones.
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    for o, c in ((0, 0), (outputs - 1, channels - 1)):
        group, inner = divmod(o, outputs // groups_of(layer))
        expected = values[group * channels + c, inner] if transposed else values[o, c]
        assert torch.equal(split[o, c], expected.flatten())


def test_channels_last_changes_nothing():
    for layer in (nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)):
        values = torch.randn(layer.weight.shape)
        last = values.to(memory_format=torch.channels_last)
        assert torch.equal(to_matrix(values, layer), to_matrix(last, layer))
