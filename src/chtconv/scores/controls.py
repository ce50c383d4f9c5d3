"""Two cheap rules that any claim for link prediction has to beat, as scores like any other.

On random masks the mean score of a position grows with the number of links of its slice on the kernel graph, and
with the degree of its input channel on the layer graph. These are those numbers, and nothing else.
"""

from collections.abc import Callable

from torch import Tensor


def occupancy(links_GOCK: Tensor) -> Tensor:
    """Number of active positions of the slice: of this kernel and input channel."""
    return links_GOCK.sum(dim=3, keepdim=True).expand_as(links_GOCK)


def input_degree(links_GOCK: Tensor) -> Tensor:
    """Number of active links of the input channel, in all kernels of its group."""
    return links_GOCK.sum(dim=(1, 3), keepdim=True).expand_as(links_GOCK)


CONTROLS: dict[str, Callable[[Tensor], Tensor]] = {"occupancy": occupancy, "input_degree": input_degree}
