"""Which links come (paper, section 3.2.2, Regrowth): by their score, sampled by their score, or at random.

Every rule turns the scores of the disabled positions into keys; the positions with the largest keys are
regrown. Scores of 0, of which there can be many, come after all positive ones and in random order.

Shapes: O kernels, I positions of a kernel.
"""

import torch
from torch import Tensor

from chtconv.selection import by_value, exponentials, random_integers

# Scores are sums of few fractions in float32: equal ones agree to about 15 bits whatever the order of summation.
ROUNDING_BITS = 8
# Below every score divided by a time, so that positions without score come last.
_LAST = 2.0**-80


def uniform(scores_OI: Tensor, generator: torch.Generator) -> Tensor:
    """Every disabled position is as likely as every other: SET. The scores only say shape and device."""
    return random_integers(scores_OI, generator)


def highest_score(scores_OI: Tensor, generator: torch.Generator) -> Tensor:
    """The highest scores: CHT. Ties are broken at random.

    Args:
        scores_OI: float32, at least 0.
        generator: breaks the ties.
    """
    return by_value(scores_OI, generator, drop_bits=ROUNDING_BITS)


def sampled_by_score(scores_OI: Tensor, generator: torch.Generator) -> Tensor:
    """Sampled without replacement, with probability proportional to the score: CHTs.

    The first arrivals of a race in which ``i`` arrives after an exponential time of rate ``score_i`` are such a
    sample, so the key is the inverse of that time; positions without score take part at a vanishing rate, so they
    follow after all others, in uniformly random order.

    Args:
        scores_OI: float32, at least 0.
        generator: draws the times.
    """
    times_OI = exponentials(scores_OI, generator)
    return scores_OI.add(_LAST).div_(times_OI)
