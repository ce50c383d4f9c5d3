"""How far link prediction sees beside the links of a slice.

Shapes: G groups, O kernels, C input channels, K kernel positions.
"""

from torch import Tensor

from chtconv.scores.controls import occupancy


def reach(mask_GOCK: Tensor, scores_GOCK: Tensor) -> float | None:
    """Share of the disabled positions in slices with links that have a positive score; None without such positions.

    On the kernel graph no other position can have one. Of these, a position ``d`` is at the end of a path of length 3
    only if it is ``a - b + c``, from a link ``a`` of its slice and two links ``b`` and ``c`` of any one slice of its
    kernel. Where links are few, hardly any slice has two, so that most places beside a link are out of sight; counting
    the links of the slice, as the control does, sees them all.

    Args:
        mask_GOCK: bool, active links.
        scores_GOCK: scores, at least 0; those of active links are ignored.

    Returns:
        A share in [0, 1], or None.

    >>> import torch
    >>> mask = torch.tensor([[True, False, False], [False, False, False]]).view(1, 1, 2, 3)
    >>> reach(mask, torch.tensor([[9.0, 0.5, 0.0], [0.0, 0.0, 0.0]]).view(1, 1, 2, 3))
    0.5
    """
    beside_GOCK = (occupancy(mask_GOCK) > 0) & ~mask_GOCK
    places = int(beside_GOCK.sum())
    return int((beside_GOCK & (scores_GOCK > 0)).sum()) / places if places else None
