"""How unequal scores are, and how many candidates the soft rule really has."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BINS = 40


@dataclass(frozen=True, eq=False)
class Spread:
    """The distribution of the positive scores of a layer.

    Attributes:
        variation: coefficient of variation, standard deviation over mean; 0 where all are equal.
        quartiles: minimum, lower quartile, median, upper quartile, maximum.
        counts: int64 [40], how many scores lie in each bin of a histogram.
        edges: float64 [41], the edges of the bins, evenly spaced from the minimum to the maximum.
    """

    variation: float
    quartiles: tuple[float, float, float, float, float]
    counts: Tensor
    edges: Tensor


def spread(positive: Tensor) -> Spread | None:
    """The spread of some positive scores, None if there are none.

    >>> spread(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).quartiles
    (1.0, 2.0, 3.0, 4.0, 5.0)
    """
    if not positive.numel():
        return None
    values = positive.double().cpu().numpy()
    # torch.quantile refuses large layers.
    low, lower, median, upper, high = map(float, np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
    counts, edges = np.histogram(values, _BINS)
    return Spread(
        float(values.std() / values.mean()),
        (low, lower, median, upper, high),
        torch.from_numpy(counts),
        torch.from_numpy(edges),
    )


def effective_candidates(scores_OI: Tensor, allowed_OI: Tensor, tau: float) -> float:
    """Effective number of candidates of the soft rule as a share of all, averaged over kernels.

    ``exp(entropy of p) / number of candidates`` with ``p`` proportional to ``score^tau`` within the kernel: 1 where the
    first link is drawn as in SET, 1/n where one of n candidates takes all. A kernel in which every score is 0 counts
    as 1, because regrowth then chooses uniformly.

    Args:
        scores_OI: float32, at least 0.
        allowed_OI: bool, the candidates; kernels without any are left out.
        tau: exponent of the soft rule, above 0; 1 is the published rule.

    >>> effective_candidates(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool), 1.0)
    0.5
    """
    scores_OI = scores_OI.double() * allowed_OI
    best_O1 = scores_OI.amax(dim=1, keepdim=True)
    # Relative to the best: a power of a small score must not vanish.
    weight_OI = torch.where(scores_OI > 0, (scores_OI / best_O1) ** tau, 0)
    total_O1 = weight_OI.sum(dim=1, keepdim=True)
    p_OI = weight_OI / total_O1.clamp(min=torch.finfo(torch.float64).tiny)
    count_O = allowed_OI.sum(1)
    share_O = torch.where(total_O1[:, 0] > 0, torch.exp(-torch.xlogy(p_OI, p_OI).sum(1)) / count_O, 1.0)
    return float(share_O[count_O > 0].mean())
