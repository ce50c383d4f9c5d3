"""Which links go (paper, section 3.2.2, Removal)."""

import torch
from torch import Tensor

from chtconv.selection import Count, by_value, take_largest


def smallest_magnitudes(weight_OI: Tensor, mask_OI: Tensor, count: Count, generator: torch.Generator) -> Tensor:
    """The active links of smallest magnitude in each kernel; equal magnitudes in random order.

    Args:
        weight_OI: weights of the layer, a row a kernel, any floating point type.
        mask_OI: bool, active links.
        count: how many to remove in each kernel.
        generator: breaks ties, such as new links that are still zero.

    Returns:
        bool of shape [O, I]: the links to remove.
    """
    return take_largest(by_value(weight_OI.float(), generator, smallest=True), mask_OI, count)
