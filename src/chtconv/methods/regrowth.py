"""Which links come (paper, section 3.2.2): by what a position is worth, sampled by it, or at random.

What a position is worth is its link score, the magnitude of the gradient that its weight would have, or their product.
Every rule turns that into keys, and the positions with the largest keys regrow. Worth of 0, of which there can be
much, comes after all that is positive and in random order.

Shapes: R rows of N positions within which links compete: the kernels, or one row for the whole layer.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from chtconv.scores.controls import CONTROLS
from chtconv.selection import Count, by_value, exponentials, random_integers, take_largest

# Scores are sums of few fractions in float32: equal ones agree to about 15 bits whatever the order of summation.
ROUNDING_BITS = 8
# Below every score divided by a time, so that positions without score come last.
_LAST = 2.0**-80

# What smoothing mixes into link scores.
PRIOR = "occupancy"
# What a kernel's share in the regrowth of a layer goes by: the scores as they are, its links, or nothing.
SHARES = ("scores", "links", "equal")

Worth = Literal["nothing", "scores", "gradient", "momentum", "scores_and_gradient"]
# The worth of positions, float32 [R, N], and a generator on its device -> keys of that shape: int32, int64 or float32,
# above 0 for every position, also for those of worth 0. The largest regrow. Equal keys would be chosen by their index:
# ties are to be broken by the generator. Keys are overwritten. Rules that sample take the keyword arguments of
# sampled_by_score as well.
Keys = Callable[..., Tensor]


def uniform(worth_RN: Tensor, generator: torch.Generator) -> Tensor:
    """Every disabled position is as likely as every other: SET. The worth only says shape and device."""
    return random_integers(worth_RN, generator)


def highest_score(scores_RN: Tensor, generator: torch.Generator) -> Tensor:
    """The highest scores: CHT. Ties are broken at random.

    Args:
        scores_RN: float32, at least 0.
        generator: breaks the ties.
    """
    return by_value(scores_RN, generator, drop_bits=ROUNDING_BITS)


def sampled_by_score(
    scores_RN: Tensor,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    explore: float = 0.0,
    allowed_RN: Tensor | None = None,
) -> Tensor:
    """Sampled without replacement, with probability proportional to the score: CHTs.

    The first arrivals of a race in which ``i`` arrives after an exponential time of rate ``score_i`` are such a
    sample, so the key is the inverse of that time; positions without score take part at a vanishing rate, so they
    follow after all others, in uniformly random order.

    Args:
        scores_RN: float32, at least 0.
        generator: draws the times.
        temperature: scores are raised to this power: 1 is the published rule, 0 uniform, infinity the highest score.
        explore: share of the probability that is spread evenly over all candidates; 0 is the published rule.
        allowed_RN: bool, the candidates; needed only where ``explore`` is above 0.
    """
    times_RN = exponentials(scores_RN, generator)
    rates_RN = scores_RN
    if temperature > 1 and not explore:
        # The order of powers over times is that of scores over roots of times, which do not underflow.
        arrivals_RN = scores_RN / times_RN.pow(1 / temperature)
        return by_value(torch.where(scores_RN > 0, arrivals_RN, _LAST / times_RN), generator)
    if temperature != 1:
        best_R1 = scores_RN.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        rates_RN = (scores_RN / best_R1).pow_(temperature) * (scores_RN > 0)
    if explore:
        assert allowed_RN is not None
        rates_RN = rates_RN * allowed_RN
        sum_R1 = rates_RN.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        even_R1 = explore / allowed_RN.sum(dim=1, keepdim=True).clamp_min(1)
        rates_RN = rates_RN.div_(sum_R1).mul_(1 - explore).add_(even_R1)
    return rates_RN.add(_LAST).div_(times_RN)


def shared_out(scores_OI: Tensor, links_OI: Tensor, by: str) -> Tensor:
    """Link scores made comparable between kernels, where links compete within a layer.

    On the kernel graph every kernel is a graph of its own: in one with more links more positions have a score, and
    larger ones, so that their sum grows faster than the links do. Sampled as they are, links gather in few kernels, and
    kernels with so few links that there is no path of length 3 get none.

    Args:
        scores_OI: float32, at least 0; a row a kernel.
        links_OI: bool, the active links.
        by: a name in :data:`SHARES`: what the sum of a kernel's scores is made proportional to.

    Returns:
        Scores of the same shape, with the same ratios within each kernel. What a kernel without scores gets is spread
        evenly over its disabled positions, as where links compete within a kernel.

    >>> links = torch.tensor([[True, False, False], [True, False, False], [True, True, True]])
    >>> shared_out(torch.tensor([[0.0, 6.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), links, "links")
    tensor([[0.0000, 0.7500, 0.2500],
            [0.0000, 0.5000, 0.5000],
            [0.0000, 0.0000, 0.0000]])
    """
    if by == "scores":
        return scores_OI
    known_OI = torch.where((scores_OI > 0).any(dim=1, keepdim=True), scores_OI, (~links_OI).to(scores_OI.dtype))
    sum_O1 = known_OI.sum(dim=1, keepdim=True)
    # A kernel without a disabled position has none, and gets none.
    sum_O1 = sum_O1.masked_fill(sum_O1 == 0, 1)
    return known_OI * (links_OI.sum(dim=1, keepdim=True) / sum_O1 if by == "links" else 1 / sum_O1)


def smoothed(scores_OI: Tensor, prior_OI: Tensor, share: float) -> Tensor:
    """Link scores of each kernel, of which a share goes by a prior instead.

    At high sparsity hardly any slice of a kernel has two links, and only where two are is there a path of length 3:
    most positions beside a link have no score, and get a link only by lot, where positive scores run out. A prior that
    sees them all, such as the links of the slice, lets them in: interpolation, as language models do with sequences
    that they have never seen.

    Args:
        scores_OI: float32, at least 0; a row a kernel.
        prior_OI: float32, at least 0, in units of its own.
        share: of the sum of a kernel's scores that is dealt out by the prior, from 0 to 1.

    Returns:
        Scores of the same shape and with the same sum in each kernel where both are known; where only one is, that one.
        What a kernel without scores gets is at the rate of scores to prior that the others have.

    >>> prior = torch.tensor([[2.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    >>> smoothed(torch.tensor([[0.0, 6.0, 2.0], [0.0, 0.0, 0.0]]), prior, 0.5)
    tensor([[2., 5., 1.],
            [2., 0., 0.]])
    """
    if not share:
        return scores_OI
    sum_O1, prior_O1 = scores_OI.sum(dim=1, keepdim=True), prior_OI.sum(dim=1, keepdim=True)
    both_O1 = (sum_O1 > 0) & (prior_O1 > 0)
    tiny = torch.finfo(scores_OI.dtype).tiny
    rate = (sum_O1 * both_O1).sum() / (prior_O1 * both_O1).sum().clamp_min(tiny)
    rate = torch.where(both_O1.any(), rate, 1.0)
    mixed_OI = (1 - share) * scores_OI + share * (sum_O1 / prior_O1.clamp_min(tiny)) * prior_OI
    return torch.where(both_O1, mixed_OI, torch.where(sum_O1 > 0, scores_OI, rate * prior_OI))


def usual_shares(predictor: str, graph: str) -> str:
    """How regrowth is shared out unless a method says otherwise: scores of one graph are compared as they are.

    >>> usual_shares("ch3_l3n", "kernel"), usual_shares("ch3_l3n", "layer"), usual_shares("occupancy", "kernel")
    ('links', 'scores', 'scores')
    """
    return "links" if graph == "kernel" and predictor not in CONTROLS else "scores"


def largest_gradient(gradient_RN: Tensor, generator: torch.Generator) -> Tensor:
    """The largest magnitude of the (smoothed) gradient: RigL, SNFS."""
    return by_value(gradient_RN, generator)


def shuffled(worth_RN: Tensor, allowed_RN: Tensor, generator: torch.Generator) -> Tensor:
    """The worth of the candidates of each row dealt out among them anew: a control that keeps its distribution.

    >>> worth = torch.tensor([[5.0, 0.0, 7.0, 6.0]])
    >>> allowed = torch.tensor([[True, False, True, True]])
    >>> sorted(shuffled(worth, allowed, torch.Generator().manual_seed(0))[0, [0, 2, 3]].tolist())
    [5.0, 6.0, 7.0]
    """
    # Candidates stand first in both orders, because the others have the smallest keys.
    here_RN = random_integers(worth_RN, generator).mul_(allowed_RN).argsort(dim=1, descending=True)
    there_RN = random_integers(worth_RN, generator).mul_(allowed_RN).argsort(dim=1, descending=True)
    return torch.zeros_like(worth_RN).scatter_(1, there_RN, worth_RN.gather(1, here_RN))


def random_at_turnover(
    chosen_RN: Tensor, removed_RN: Tensor, kept_RN: Tensor, count: Count, generator: torch.Generator
) -> Tensor:
    """A random choice that changes as many links in each row as another choice does.

    The control of true turnover: a rule that re-chooses most of what it removed changes little, and that alone may
    be what it is good for.

    Args:
        chosen_RN: bool, the other choice.
        removed_RN: bool, links that were just removed.
        kept_RN: bool, links that are active.
        count: how many are chosen in each row, at most.
        generator: draws the links.
    """
    keys_RN, most = random_integers(removed_RN, generator), min(count.most, removed_RN.shape[1])
    again_RN = _random_of(keys_RN, removed_RN, (chosen_RN & removed_RN).sum(1, keepdim=True), most)
    new_RN = _random_of(keys_RN, ~removed_RN & ~kept_RN, (chosen_RN & ~removed_RN).sum(1, keepdim=True), most)
    return again_RN | new_RN


def _random_of(keys_RN: Tensor, allowed_RN: Tensor, number_R1: Tensor, most: int) -> Tensor:
    """So many of the allowed of each row, by their keys."""
    _, index_RM = (keys_RN * allowed_RN).topk(most, dim=1)
    taken_RM = torch.arange(most, device=keys_RN.device) < number_R1
    return torch.zeros_like(allowed_RN).scatter_(1, index_RM, taken_RM)


class Regrowth(NamedTuple):
    """A rule of regrowth.

    Attributes:
        keys: from the worth of positions, float32; where it goes by nothing, from a tensor of the same shape and device
            of any other type.
        worth: what it goes by: ``"nothing"``, link ``"scores"``, the ``"gradient"`` of the step, its ``"momentum"``,
            or the product of ``"scores_and_gradient"``.
        shuffle: whether the worth is dealt out anew among the candidates of each kernel before (a control).
        random: whether a random choice of the same turnover in each kernel takes the place of the choice (a control).
        sampled: whether ``keys`` takes temperature and explored share.
    """

    keys: Keys
    worth: Worth
    shuffle: bool = False
    random: bool = False
    sampled: bool = False


REGROWTHS: dict[str, Regrowth] = {
    "uniform": Regrowth(uniform, "nothing"),
    "gradient": Regrowth(largest_gradient, "gradient"),
    "momentum": Regrowth(largest_gradient, "momentum"),
    "highest_score": Regrowth(highest_score, "scores"),
    "sampled_by_score": Regrowth(sampled_by_score, "scores", sampled=True),
    "score_times_gradient": Regrowth(highest_score, "scores_and_gradient"),
    "shuffled_scores": Regrowth(sampled_by_score, "scores", shuffle=True, sampled=True),
    "random_at_turnover": Regrowth(sampled_by_score, "scores", random=True, sampled=True),
}


def choose(
    rule: Regrowth,
    worth_RN: Tensor,
    kept_RN: Tensor,
    removed_RN: Tensor,
    count: Count,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    explore: float = 0.0,
    kernels: int = 1,
) -> Tensor:
    """The positions that regrow, among those that are not active.

    Args:
        rule: the rule.
        worth_RN: float32, what positions are worth.
        kept_RN: bool, links that are active.
        removed_RN: bool, links that were just removed; they may be chosen again.
        count: how many in each row.
        generator: every random choice.
        temperature: see :func:`sampled_by_score`.
        explore: see :func:`sampled_by_score`.
        kernels: how many each row consists of: controls shuffle, and keep the turnover, kernel by kernel.

    Returns:
        bool of shape [R, N].
    """

    def by_kernel(values_RN: Tensor) -> Tensor:
        return values_RN.reshape(len(values_RN) * kernels, -1)

    allowed_RN = ~kept_RN
    if rule.shuffle:
        worth_RN = shuffled(by_kernel(worth_RN), by_kernel(allowed_RN), generator).view(allowed_RN.shape)
    if rule.sampled:
        keys_RN = rule.keys(worth_RN, generator, temperature=temperature, explore=explore, allowed_RN=allowed_RN)
    else:
        keys_RN = rule.keys(worth_RN, generator)
    chosen_RN = take_largest(keys_RN, allowed_RN, count)
    if rule.random:
        rows = by_kernel(chosen_RN), by_kernel(removed_RN), by_kernel(kept_RN)
        return random_at_turnover(*rows, count, generator).view(allowed_RN.shape)
    return chosen_RN
