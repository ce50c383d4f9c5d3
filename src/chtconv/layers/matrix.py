"""Weights of any layer as a matrix with a row for each kernel, and back.

Rows are output channels; columns are what one of them sees, position by position: all input channels of its group at
the first kernel position, then those at the second one. That is how weights lie in memory where a model is
``channels_last``, so that they are rows without a copy, and it is the order in which link scores are looked up. It is
the same whatever the memory format, and so are the random choices.
"""

import math
from typing import TypeAlias

from torch import Tensor, nn

Layer: TypeAlias = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LAYERS = (*CONVOLUTIONS, nn.Linear)


def groups_of(layer: Layer) -> int:
    """Number of groups of channels; 1 for a linear layer."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def positions_of(layer: Layer) -> int:
    """Number of kernel positions K; 1 for a linear layer."""
    return 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)


def kernel_shape(layer: Layer) -> tuple[int, ...]:
    """What one kernel sees: input channels of its group, and the kernel's size on each axis."""
    if isinstance(layer, nn.Linear):
        return (layer.in_features,)
    return layer.in_channels // layer.groups, *layer.kernel_size


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """Kernels and positions of a kernel, [O, I].

    >>> matrix_shape(nn.Conv2d(4, 6, 3, groups=2)), matrix_shape(nn.ConvTranspose2d(4, 6, 3, groups=2))
    ((6, 18), (6, 18))
    """
    kernels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return kernels, layer.weight.numel() // kernels


def to_matrix(values: Tensor, layer: Layer) -> Tensor:
    """Anything of the shape of the layer's weight as [O, I]: a view where it is ``channels_last``, else a copy.

    >>> import torch
    >>> to_matrix(torch.tensor([[[1, 2, 3], [4, 5, 6]]]), nn.Conv1d(2, 1, 3))
    tensor([[1, 4, 2, 5, 3, 6]])
    """
    if not isinstance(layer, TRANSPOSED):
        return values.movedim(1, -1).flatten(1)
    groups, positions = layer.groups, positions_of(layer)
    grouped_GCOK = values.reshape(groups, layer.in_channels // groups, layer.out_channels // groups, positions)
    return grouped_GCOK.permute(0, 2, 3, 1).reshape(matrix_shape(layer))


def from_matrix(matrix_OI: Tensor, layer: Layer) -> Tensor:
    """The inverse of :func:`to_matrix`."""
    if not isinstance(layer, TRANSPOSED):
        kernels, channels, *kernel = layer.weight.shape
        return matrix_OI.view(kernels, *kernel, channels).movedim(-1, 1)
    groups, positions = layer.groups, positions_of(layer)
    grouped_GOKC = matrix_OI.view(groups, layer.out_channels // groups, positions, layer.in_channels // groups)
    return grouped_GOKC.permute(0, 3, 1, 2).reshape(layer.weight.shape)


def by_channel(matrix_OI: Tensor, layer: Layer) -> Tensor:
    """A matrix of kernels as [O, C, K]: kernels, input channels of their group, kernel positions; a view.

    >>> import torch
    >>> by_channel(torch.zeros(6, 18), nn.Conv2d(4, 6, 3, groups=2)).shape
    torch.Size([6, 2, 9])
    """
    return matrix_OI.view(len(matrix_OI), positions_of(layer), -1).mT


def from_channels(values_OCK: Tensor) -> Tensor:
    """The inverse of :func:`by_channel`."""
    return values_OCK.mT.flatten(1)
