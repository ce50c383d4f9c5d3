"""How much of the scores two cheap rules explain: the links of the slice, and those of the input channel.

The fit is linear least squares with an intercept for each kernel, because regrowth chooses within a kernel: what makes
all scores of one kernel larger than those of another decides nothing.

Shapes: G groups, O kernels, C input channels, K kernel positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from chtconv.scores.controls import input_degree, occupancy

# Differences that regrowth counts as ties are rounding errors, and nothing explains those.
_RESOLUTION = 2.0**-16


@dataclass(frozen=True)
class Explained:
    """Shares of the variance of scores within kernels (R², in [0, 1]); None where the scores do not vary.

    Attributes:
        occupancy: by the active positions of the slice, of this kernel and input channel.
        input_degree: by the active links of the input channel, in all kernels of its group.
        both: by the two together; at least as much as by either.
    """

    occupancy: float | None
    input_degree: float | None
    both: float | None


def explained_variance(mask_GOCK: Tensor, scores_GOCK: Tensor) -> Explained:
    """The shares of the variance of the disabled positions' scores that the two cheap rules explain.

    Args:
        mask_GOCK: bool, active links.
        scores_GOCK: scores; those of active links are ignored.
    """
    links_GOCK = mask_GOCK.double()
    slices_OC, channels_OC = (rule(links_GOCK)[..., 0].flatten(0, 1) for rule in (occupancy, input_degree))
    disabled_OCK, scores_OCK = ~mask_GOCK.flatten(0, 1), scores_GOCK.flatten(0, 1).double()
    return Explained(
        r_squared(scores_OCK, disabled_OCK, [slices_OC]),
        r_squared(scores_OCK, disabled_OCK, [channels_OC]),
        r_squared(scores_OCK, disabled_OCK, [slices_OC, channels_OC]),
    )


def r_squared(scores_OCK: Tensor, disabled_OCK: Tensor, regressors_OC: list[Tensor]) -> float | None:
    """R² of the least-squares fit of scores on numbers of their slices, with an intercept for each kernel.

    Args:
        scores_OCK: float64.
        disabled_OCK: bool, the positions that are fitted.
        regressors_OC: float64, a number for each slice.

    Returns:
        The share in [0, 1] of the variance within kernels, None where that is nothing but rounding errors.

    >>> scores = torch.tensor([[[1.0, 1.0], [3.0, 3.0]]], dtype=torch.float64)
    >>> r_squared(scores, torch.ones(1, 2, 2, dtype=torch.bool), [torch.tensor([[0.0, 1.0]], dtype=torch.float64)])
    1.0
    """
    count_OC = disabled_OCK.sum(2).double()
    scores_OCK = scores_OCK * disabled_OCK
    total_O1 = count_OC.sum(1, keepdim=True).clamp(min=1)
    centred_OCK = (scores_OCK - scores_OCK.sum((1, 2))[:, None, None] / total_O1[..., None]) * disabled_OCK
    variation = float(centred_OCK.square().sum())
    if variation <= (_RESOLUTION * float(scores_OCK.max())) ** 2 * float(count_OC.sum()):
        return None
    # Regressors are constant within a slice, so sums over slices are all that the normal equations need.
    columns_ROC = torch.stack([x - (x * count_OC).sum(1, keepdim=True) / total_O1 for x in regressors_OC])
    scale_R = (columns_ROC.square() * count_OC).sum((1, 2)).sqrt()
    columns_ROC /= scale_R.where(scale_R > 0, 1)[:, None, None]
    gram_RR = torch.einsum("roc,soc,oc->rs", columns_ROC, columns_ROC, count_OC)
    product_R = torch.einsum("roc,oc->r", columns_ROC, centred_OCK.sum(2))
    # The pseudo-inverse, because the two can be the same number: in depthwise layers, and where nothing varies.
    fitted = float(product_R @ torch.linalg.pinv(gram_RR, rtol=1e-9, hermitian=True) @ product_R)
    return min(1.0, max(0.0, fitted / variation))
