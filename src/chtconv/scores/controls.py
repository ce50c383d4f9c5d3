"""Cheap rules that any claim for link prediction has to beat, as scores like any other.

On random masks the mean score of a position grows with the number of links of its slice on the kernel graph, and
with the degree of its input channel on the layer graph. These are those numbers, and nothing else; and where scores
are averaged over all windows, they grow with the share of windows in which padding leaves the position.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from chtconv.layers.geometry import Geometry


def occupancy(links_GOCK: Tensor) -> Tensor:
    """Number of active positions of the slice: of this kernel and input channel."""
    return links_GOCK.sum(dim=3, keepdim=True).expand_as(links_GOCK)


def input_degree(links_GOCK: Tensor) -> Tensor:
    """Number of active links of the input channel, in all kernels of its group."""
    return links_GOCK.sum(dim=(1, 3), keepdim=True).expand_as(links_GOCK)


def in_bounds(links_GOCK: Tensor, geometry: Geometry) -> Tensor:
    """Share of the windows in which the position is in bounds, whatever the links."""
    share_K = torch.tensor(geometry.in_bounds, dtype=links_GOCK.dtype, device=links_GOCK.device)
    return share_K.expand_as(links_GOCK)


CONTROLS: dict[str, Callable[[Tensor, Geometry], Tensor]] = {
    "occupancy": lambda links_GOCK, _: occupancy(links_GOCK),
    "input_degree": lambda links_GOCK, _: input_degree(links_GOCK),
    "in_bounds": in_bounds,
}
