"""Sparse initialisation: which links there are before training (paper, section 3.2.1)."""

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError
from chtconv.selection import Count, random_integers, take_largest


def links_per_kernel(sparsity: float, positions: int, layer: str) -> int:
    """Number of active links of a kernel with so many positions, the same in all kernels of a layer.

    Args:
        sparsity: share of disabled positions, in [0, 1).
        positions: input channels times kernel positions.
        layer: name of the layer, for the error.

    Raises:
        ConfigurationError: so sparse that a kernel would hold no link.

    >>> links_per_kernel(0.95, 27, "features.0")
    1
    """
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ConfigurationError(f"sparsity={sparsity!r}: accepted are numbers from 0 up to, but not including, 1.")
    links = round((1 - sparsity) * positions)
    if links < 1:
        raise ConfigurationError(
            f"layer {layer}: at sparsity {sparsity} a kernel of {positions} positions would hold no link; "
            f"accepted is less than {1 - 0.5 / positions:.6g}, or leave the layer out."
        )
    return links


def random_mask(kernels: int, positions: int, links: int, generator: torch.Generator) -> Tensor:
    """A random mask for each kernel, with the same number of links in all of them.

    Returns:
        bool of shape [kernels, positions] on the device of the generator.

    >>> random_mask(2, 6, 3, torch.Generator().manual_seed(0)).sum(1)
    tensor([3, 3])
    """
    everywhere = torch.ones(kernels, positions, dtype=torch.bool, device=generator.device)
    count = Count(links, torch.zeros(kernels, 1, dtype=torch.bool, device=generator.device))
    return take_largest(random_integers(everywhere, generator), everywhere, count)
