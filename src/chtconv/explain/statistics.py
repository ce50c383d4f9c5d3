"""The numbers that describe the link scores of one layer."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from chtconv.errors import ConfigurationError
from chtconv.explain.distribution import Spread, effective_candidates, spread
from chtconv.explain.means import Means, means
from chtconv.explain.reach import reach
from chtconv.explain.ties import Ties, expected_overlap, links_to_regrow, ties
from chtconv.explain.variance import Explained, explained_variance
from chtconv.layers.geometry import Geometry, PerAxis
from chtconv.scores.api import by_group, link_scores


@dataclass(frozen=True, eq=False)
class ScoreStatistics:
    """What the link scores of a layer look like over its disabled positions, the candidates of regrowth.

    Attributes:
        predictor: the link predictor.
        graph: the graph that links are predicted on.
        shape: shape of the weight.
        links: active links.
        candidates: disabled positions.
        zero_scores: share of the candidates with score 0.
        reach: share of the candidates beside a link of their slice that have a positive score; None without any. See
            :func:`chtconv.explain.reach.reach`.
        ties: how often regrowth has to choose between equal scores.
        spread: distribution of the positive scores; None without any.
        effective_candidates: of the soft rule, as a share of all candidates; 1 where CHTs samples like SET. See
            :func:`chtconv.explain.distribution.effective_candidates`.
        explained: shares of the variance of scores that two cheap rules explain.
        means: mean scores by kernel position, channel and slice.
        overlap: share of the hard rule's choice that another predictor or graph makes too; None if not asked for.
    """

    predictor: str
    graph: str
    shape: tuple[int, ...]
    links: int
    candidates: int
    zero_scores: float
    reach: float | None
    ties: Ties
    spread: Spread | None
    effective_candidates: float
    explained: Explained
    means: Means
    overlap: float | None


def score_statistics(
    mask: Tensor,
    input_size: PerAxis,
    *,
    predictor: str = "ch3_l3n",
    graph: str = "kernel",
    zeta: float = 0.3,
    tau: float = 1.0,
    versus: tuple[str, str] | None = None,
    **layer: Any,
) -> ScoreStatistics:
    """The statistics of a layer's link scores.

    The mask is scored as it is. An evolution scores what is left after removal: pass that mask to see what it sees.

    Args:
        mask: active links, bool of the weight's shape, see :func:`chtconv.link_scores`.
        input_size: spatial size of the layer's input.
        predictor: a predictor of :func:`chtconv.link_scores`.
        graph: ``"kernel"`` or ``"layer"``.
        zeta: share of a kernel's links that regrow (rounded up), in (0, 1].
        tau: exponent of the scores in the soft rule, above 0.
        versus: predictor and graph to compare the hard rule's choice with.
        **layer: stride, padding, dilation, groups and so on, as in :func:`chtconv.link_scores`.

    Raises:
        ConfigurationError: what :func:`chtconv.link_scores` refuses, a zeta or tau out of range, or a mask without
            disabled positions.

    Example:
        >>> import torch
        >>> mask = torch.rand(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.1
        >>> found = score_statistics(mask, 32, padding=1, versus=("ch2_l3n", "kernel"))
        >>> f"zero {found.zero_scores:.2f}, effective {found.effective_candidates:.2f}, overlap {found.overlap:.2f}"
        'zero 0.79, effective 0.26, overlap 0.88'
        >>> found.means.position.shape, found.explained.both >= found.explained.occupancy
        (torch.Size([3, 3]), True)
    """
    check_rule(zeta, tau)
    mask_GOCK, scores_GOCK = _scored(mask, input_size, predictor, graph, layer)
    mask_OI, scores_OI = _by_kernel(mask_GOCK), _by_kernel(scores_GOCK)
    allowed_OI, count_O = ~mask_OI, links_to_regrow(mask_OI, zeta)
    candidates = int(allowed_OI.sum())
    if not candidates:
        raise ConfigurationError(
            f"mask of shape {list(mask.shape)} has no disabled position, so there is nothing to score; "
            "accepted is a mask with at least one."
        )
    overlap = None
    if versus is not None:
        other_OI = _by_kernel(_scored(mask, input_size, *versus, layer)[1])
        overlap = expected_overlap(scores_OI, other_OI, allowed_OI, count_O)
    positive = scores_OI[allowed_OI & (scores_OI > 0)]
    return ScoreStatistics(
        predictor=predictor,
        graph=graph,
        shape=tuple(mask.shape),
        links=int(mask.sum()),
        candidates=candidates,
        zero_scores=1 - positive.numel() / candidates,
        reach=reach(mask_GOCK, scores_GOCK),
        ties=ties(scores_OI, allowed_OI, count_O),
        spread=spread(positive),
        effective_candidates=effective_candidates(scores_OI, allowed_OI, tau),
        explained=explained_variance(mask_GOCK, scores_GOCK),
        means=means(scores_GOCK, mask_GOCK, mask.shape[2:]),
        overlap=overlap,
    )


def check_rule(zeta: float, tau: float) -> None:
    """Refuses a zeta or tau that regrowth could not use.

    Raises:
        ConfigurationError: naming the value and what is accepted.
    """
    if not 0 < zeta <= 1:
        raise ConfigurationError(f"zeta={zeta!r}: accepted is a number above 0 and at most 1.")
    if not (math.isfinite(tau) and tau > 0):
        raise ConfigurationError(f"tau={tau!r}: accepted is a finite number above 0.")


def _scored(
    mask: Tensor, input_size: PerAxis, predictor: str, graph: str, layer: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Mask and scores on the CPU as [G, O, C, K], outputs before inputs also where transposed."""
    scores = link_scores(mask, input_size, predictor=predictor, graph=graph, **layer)
    axes = {name: value for name, value in layer.items() if name not in ("groups", "windows", "exact")}
    geometry = Geometry.of(mask.shape[2:], input_size, **axes)
    groups = layer.get("groups", 1)
    return by_group(mask, groups, geometry).cpu(), by_group(scores, groups, geometry).cpu()


def _by_kernel(values_GOCK: Tensor) -> Tensor:
    return values_GOCK.flatten(0, 1).flatten(1)
