"""Which links go: those of least importance, strictly or at random (paper, section 3.2.2, Removal).

A removal is a measure of importance and whether it is obeyed strictly (the smallest go) or softly (links are kept
at random, the important ones with larger probability). Shapes: G groups of O kernels, I positions of a kernel, and R
rows of N positions within which links compete: the kernels, or one row for the whole layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chtconv.selection import Count, by_value, exponentials, take_largest, take_smallest_links

# Weights, and gradients of active links for rules that need them, [G, O, I] of any floating point type, neither to be
# changed -> importance of that shape. Links of the smallest magnitude go; what is not a number counts as the largest.
# Positions that are not active have weight and gradient 0, and their importance is not looked at.
Importance = Callable[[Tensor, Tensor | None], Tensor]


def magnitude(weight_GOI: Tensor, gradient_GOI: Tensor | None = None) -> Tensor:
    """``|w|``: SET, RigL, CHT (paper, section 3.2.2)."""
    return weight_GOI.float()


def relative_importance(weight_GOI: Tensor, gradient_GOI: Tensor | None = None) -> Tensor:
    """``|w| / sum over its row + |w| / sum over its column``: what a link is to the neurons at its ends (CHTs).

    Columns are summed within a group, because groups share no input.

    >>> relative_importance(torch.tensor([[1.0, 3.0], [1.0, 0.0]]))
    tensor([[0.7500, 1.7500],
            [1.5000, 0.0000]])
    """
    size_GOI = weight_GOI.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    rows, columns = (size_GOI.sum(axis, keepdim=True).clamp_min(tiny) for axis in (-1, -2))
    return size_GOI / rows + size_GOI / columns


def magnitude_and_gradient(weight_GOI: Tensor, gradient_GOI: Tensor | None) -> Tensor:
    """``|w| + |dL/dw|``, with the gradient of the last step: MEST (Yuan et al. 2021, equation 1, lambda 1)."""
    assert gradient_GOI is not None
    return weight_GOI.float().abs() + gradient_GOI.float().abs()


class Removal(NamedTuple):
    """A rule of removal.

    Attributes:
        importance: of each link, from the weights and, where needed, the gradients of the active links.
        soft: whether links are kept at random in proportion to a power of it.
        needs_gradient: whether it looks at gradients.
    """

    importance: Importance
    soft: bool = False
    needs_gradient: bool = False


REMOVALS: dict[str, Removal] = {
    "magnitude": Removal(magnitude),
    "soft_magnitude": Removal(magnitude, soft=True),
    "relative_importance": Removal(relative_importance),
    "soft_relative_importance": Removal(relative_importance, soft=True),
    "magnitude_and_gradient": Removal(magnitude_and_gradient, needs_gradient=True),
}

# CHTs: delta grows along the training, from sampling in proportion to the importance to nearly its third power.
_DELTA = (0.5, 0.75)


def least_important(
    importance_RN: Tensor, mask_RN: Tensor, count: Count, generator: torch.Generator, links: int | None = None
) -> Tensor:
    """The active links of least importance in each row; equal ones in random order.

    Args:
        importance_RN: float32; the sign is ignored.
        mask_RN: bool, active links.
        count: how many to remove in each row.
        generator: breaks ties, such as new links that are still zero.
        links: how many links each row has, where all have as many: saves most of the time.

    Returns:
        bool of shape [R, N]: the links to remove.
    """
    if links is not None:
        return take_smallest_links(importance_RN, mask_RN, links, count, generator)
    return take_largest(by_value(importance_RN, generator, smallest=True), mask_RN, count)


def sampled_by_importance(
    importance_RN: Tensor, mask_RN: Tensor, count: Count, generator: torch.Generator, progress: float
) -> Tensor:
    """Those that remain when links are kept at random, with probability proportional to ``S^(delta / (1 - delta))``.

    Soft removal of CHTs: ``delta`` grows from 0.5 to 0.75 with the progress of training, from 0 to 1.
    """
    delta = _DELTA[0] + (_DELTA[1] - _DELTA[0]) * min(progress, 1.0)
    size_RN = importance_RN.abs()
    share_RN = size_RN / size_RN.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    arrival_RN = share_RN.pow_(delta / (1 - delta)).div_(exponentials(share_RN, generator))
    return least_important(arrival_RN, mask_RN, count, generator)
