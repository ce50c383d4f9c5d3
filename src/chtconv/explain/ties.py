"""Ties: where the hard rule has to choose between equal scores, and so chooses at random.

Shapes: O kernels, I positions of a kernel (input channels x kernel positions).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from chtconv.methods.regrowth import ROUNDING_BITS

_NOT_ALLOWED = -1


@dataclass(frozen=True)
class Ties:
    """How often regrowth has to choose between equal scores.

    Attributes:
        at_cut: share of the candidates that tie at the cut of the hard rule: their score is the lowest that still
            regrows, and there are more of them than places.
        drawn: share of the links to regrow that go to such candidates, so by lot.
        positive: share of the positive scores that equal another of their kernel.
        unscored: share of the links to regrow for which no positive score is left, under the hard and the soft rule.
    """

    at_cut: float
    drawn: float
    positive: float
    unscored: float


def ties(scores_OI: Tensor, allowed_OI: Tensor, count_O: Tensor) -> Ties:
    """The ties of a layer; arguments as in :func:`chance_of_choice`.

    >>> everywhere = torch.ones(1, 4, dtype=torch.bool)
    >>> ties(torch.tensor([[3.0, 0.0, 0.0, 0.0]]), everywhere, torch.tensor([2]))
    Ties(at_cut=0.75, drawn=0.5, positive=0.0, unscored=0.5)
    """
    chance_OI = chance_of_choice(scores_OI, allowed_OI, count_O)
    lot_OI = (chance_OI > 0) & (chance_OI < 1)
    positive_O = (allowed_OI & (scores_OI > 0)).sum(1)
    regrown = max(1, int(count_O.sum()))
    return Ties(
        at_cut=int(lot_OI.sum()) / max(1, int(allowed_OI.sum())),
        drawn=float(chance_OI[lot_OI].sum()) / regrown,
        positive=share_of_positive_ties(scores_OI, allowed_OI),
        unscored=int((count_O - positive_O).clamp(min=0).sum()) / regrown,
    )


def expected_overlap(one_OI: Tensor, other_OI: Tensor, allowed_OI: Tensor, count_O: Tensor) -> float:
    """Share of the hard rule's choice by one score that another makes too, expected over the lots of both.

    It is below 1 even for a score and itself, where lots decide: two draws of the same rule differ as much.
    """
    one_OI, other_OI = (chance_of_choice(scores, allowed_OI, count_O) for scores in (one_OI, other_OI))
    return float((one_OI * other_OI).sum()) / max(1, int(count_O.sum()))


def links_to_regrow(mask_OI: Tensor, zeta: float) -> Tensor:
    """Links that an evolution regrows in each kernel: ``zeta`` of its links, rounded up, as far as there is room.

    >>> links_to_regrow(torch.tensor([[True] * 4 + [False] * 6, [True] * 9 + [False]]), 0.3)
    tensor([2, 1])
    """
    # A product such as 0.1 * 30 may lie just above the whole number that it stands for.
    wanted = [math.ceil(zeta * links - 1e-9) for links in mask_OI.sum(1).tolist()]
    return torch.tensor(wanted).minimum((~mask_OI).sum(1).cpu())


def rounded(scores: Tensor) -> Tensor:
    """int32 in the order of float32 scores of at least 0, equal where regrowth counts two scores as equal."""
    return scores.abs().contiguous().view(torch.int32).add(1 << ROUNDING_BITS - 1).bitwise_right_shift(ROUNDING_BITS)


def chance_of_choice(scores_OI: Tensor, allowed_OI: Tensor, count_O: Tensor) -> Tensor:
    """The probability with which the hard rule regrows each position.

    1 above the cut, 0 below it; those at the cut, whose scores are equal, share the places that are left.

    Args:
        scores_OI: float32, at least 0.
        allowed_OI: bool, the candidates.
        count_O: how many are regrown in each kernel, at most as many as are allowed.

    Returns:
        float64 [O, I]; row ``o`` sums to ``count_O[o]``.

    >>> everywhere = torch.ones(1, 4, dtype=torch.bool)
    >>> chance_of_choice(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), everywhere, torch.tensor([2])).tolist()
    [[1.0, 0.5, 0.5, 0.0]]
    """
    keys_OI = rounded(scores_OI).masked_fill(~allowed_OI, _NOT_ALLOWED)
    ordered_OI = keys_OI.sort(dim=1, descending=True).values
    cut_O1 = ordered_OI.gather(1, (count_O - 1).clamp(min=0)[:, None])
    above_OI, level_OI = keys_OI > cut_O1, keys_OI == cut_O1
    places_O = (count_O - above_OI.sum(1)).clamp(min=0)
    return above_OI.double() + level_OI * (places_O.double() / level_OI.sum(1))[:, None]


def share_of_positive_ties(scores_OI: Tensor, allowed_OI: Tensor) -> float:
    """Share of the positive scores that equal another of their kernel; 0 where there is no positive score.

    >>> share_of_positive_ties(torch.tensor([[2.0, 2.0, 1.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool))
    0.6666666666666666
    """
    keys_OI = rounded(scores_OI).masked_fill(~allowed_OI, 0).sort(dim=1).values
    same_OJ = keys_OI[:, 1:] == keys_OI[:, :-1]
    edge_O1 = same_OJ.new_zeros(len(same_OJ), 1)
    tied_OI = torch.cat([same_OJ, edge_O1], 1) | torch.cat([edge_O1, same_OJ], 1)
    positive = int((keys_OI > 0).sum())
    return int((tied_OI & (keys_OI > 0)).sum()) / positive if positive else 0.0
