"""One evolution of one layer: removal, link prediction, regrowth (paper, section 3.2.2).

Data flows one way: weights -> removal -> mask -> link scores -> regrowth -> mask. Nothing is changed in place
here; :mod:`chtconv.topology` puts the new mask into force.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chtconv.methods import Method
from chtconv.removal import smallest_magnitudes
from chtconv.selection import stochastic_round, take_largest


class Evolved(NamedTuple):
    """What an evolution did to the links of a layer; bool tensors of shape [O, I], a row a kernel.

    Attributes:
        mask: the links that are active now.
        removed: the links that were removed, whether they were chosen again or not.
        scores: float32, what regrowth went by; all 0 for a method without link prediction.
    """

    mask: Tensor
    removed: Tensor
    scores: Tensor


def evolve(
    weight_OI: Tensor,
    mask_OI: Tensor,
    *,
    method: Method,
    links: int,
    zeta: float,
    link_scores: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Evolved:
    """Removes a fraction of the links of every kernel and regrows as many.

    Args:
        weight_OI: weights, a row a kernel.
        mask_OI: bool, the active links.
        method: how regrowth chooses; it must have a regrowth.
        links: number of active links of each kernel, before and after.
        zeta: the fraction to remove; a fraction of a link is rounded up or down at random, kernel by kernel.
        link_scores: the scores of a mask [O, I], float32 of the same shape.
        generator: every random choice of this evolution, on the device of the mask.

    Returns:
        The new mask, with exactly ``links`` links in each kernel, and what led to it.
    """
    assert method.regrowth is not None
    count = stochastic_round(zeta * links, len(mask_OI), generator)
    removed_OI = smallest_magnitudes(weight_OI, mask_OI, count, generator)
    kept_OI = mask_OI & ~removed_OI
    scores_OI = link_scores(kept_OI) if method.uses_scores else torch.zeros(kept_OI.shape, device=kept_OI.device)
    regrown_OI = take_largest(method.regrowth(scores_OI, generator), ~kept_OI, count)
    return Evolved(kept_OI | regrown_OI, removed_OI, scores_OI)
