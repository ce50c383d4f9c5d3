"""Exact link scores on the kernel graph, without building it (paper, section 3.2.2).

Translation symmetry turns the average of a position's scores over all sliding windows into two sums:

* over windows, from the K x K Gram matrix of each kernel: which positions are active together in its slices;
* over activations, from the K-bit patterns of its slices: what a channel with pattern ``q`` contributes to a
  position of a channel with pattern ``s`` is a constant of the geometry, so it is one matrix product of the
  histograms of patterns with a table.

The cost does not depend on the size of the input. Shapes: O kernels, C input channels of a kernel, K positions,
S = 2^K patterns, N cases.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError
from chtconv.geometry import Geometry
from chtconv.predictors import PREDICTORS, Predictor, community_weight
from chtconv.scores.cases import Cases, activation_cases, window_cases

MAX_POSITIONS = 9


class PatternTable(NamedTuple):
    """What a slice with one pattern contributes to the disabled positions of a slice with another.

    Attributes:
        values_SJ: contribution of a slice with pattern ``q`` to the target ``j``: a (pattern, disabled position).
        targets_J: index of each target in a flattened [S, K].
    """

    values_SJ: Tensor
    targets_J: Tensor


def kernel_graph_scores(mask_OCK: Tensor, geometry: Geometry, predictor: str, dtype: torch.dtype) -> Tensor:
    """Average score of each disabled position over the windows in which it is in bounds; 0 where it is active.

    Args:
        mask_OCK: bool, the active positions of each slice.
        geometry: the geometry of the layer, with the size of its input.
        predictor: a name in :data:`chtconv.predictors.PREDICTORS`.
        dtype: floating point type of the computation and the result.

    Returns:
        Scores of shape [O, C, K] on the device of the mask.

    Raises:
        ConfigurationError: more than 9 kernel positions.
    """
    if geometry.positions > MAX_POSITIONS:
        raise ConfigurationError(
            f"the kernel has {geometry.positions} positions; link scores on the kernel graph accept at most "
            f"{MAX_POSITIONS} (such as 3x3)."
        )
    links_OCK = mask_OCK.to(dtype)
    scores_OCK = _over_activations(links_OCK, geometry, predictor)
    scores_OCK += _over_windows(links_OCK, geometry, predictor)
    # Finite times 0: cheaper than filling.
    return scores_OCK.mul_(~mask_OCK)


def _over_windows(links_OCK: Tensor, geometry: Geometry, predictor: str) -> Tensor:
    """Sum over the windows that see the activation: ``sum over q of m[o, c, q] · F[o][p, q]``."""
    cases = _window_constants(geometry, links_OCK.device, links_OCK.dtype)
    gram_OKK = links_OCK.mT @ links_OCK
    common_ON = gram_OKK.flatten(1) @ cases.pairs_NKK.flatten(1).T
    degree_ON = gram_OKK.diagonal(dim1=1, dim2=2) @ cases.links_NK.T
    weight_ON = community_weight(PREDICTORS[predictor], common_ON, degree_ON)
    mean_OKK = (weight_ON @ cases.weight_NKK.flatten(1)).view_as(gram_OKK)
    return links_OCK @ mean_OKK.mT


def _over_activations(links_OCK: Tensor, geometry: Geometry, predictor: str) -> Tensor:
    """Sum over the activations that the window sees: histograms of patterns times the table, and a look-up."""
    O, C, K = links_OCK.shape
    table = pattern_table(geometry, predictor, links_OCK.device, links_OCK.dtype)
    bit_K = 2 ** torch.arange(K, device=links_OCK.device)
    # Counts up to 2^24 and codes below 512 are exact in float32, so the product may run in it.
    code_OC = (links_OCK @ bit_K.to(links_OCK.dtype)).long()
    code_OC += torch.arange(O, device=code_OC.device)[:, None] * 2**K
    histogram = links_OCK.new_zeros(O * 2**K).index_add_(0, code_OC.flatten(), links_OCK.new_ones(O * C))
    by_target = links_OCK.new_zeros(O, 2**K * K)
    by_target.index_copy_(1, table.targets_J, histogram.view(O, -1) @ table.values_SJ)
    return by_target.view(-1, K).index_select(0, code_OC.flatten()).view(O, C, K)


@lru_cache(maxsize=256)
def _window_constants(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> Cases:
    return Cases(*(constant.to(device, dtype) for constant in window_cases(geometry)))


@lru_cache(maxsize=64)
def pattern_table(geometry: Geometry, predictor: str, device: torch.device, dtype: torch.dtype) -> PatternTable:
    """The table of a geometry and predictor: 4.7 MB in float32 for 3x3, built once in a fraction of a second.

    Args:
        geometry: at most 9 positions.
        predictor: a name in :data:`chtconv.predictors.PREDICTORS`.
        device: where it will be used.
        dtype: the type that it will be used in.
    """
    K = geometry.positions
    cases = Cases(*(constant.to(device, dtype) for constant in activation_cases(geometry)))
    bits_SK = (torch.arange(2**K, device=device)[:, None] >> torch.arange(K, device=device) & 1).to(dtype)
    table_KSS = torch.zeros(K, 2**K, 2**K, device=device, dtype=dtype)
    linked = cases.weight_NKK.cpu().any(dim=2)
    for n in range(len(linked)):
        weight_SS = _weight_of_patterns(cases, n, bits_SK, PREDICTORS[predictor])
        share_SK = bits_SK @ cases.weight_NKK[n].T
        for p in linked[n].nonzero().flatten().tolist():
            table_KSS[p].addcmul_(share_SK[:, p, None], weight_SS)
    targets_J = (bits_SK == 0).flatten().nonzero().flatten()
    values_SJ = table_KSS.permute(1, 2, 0).flatten(1)[:, targets_J].contiguous()
    return PatternTable(values_SJ, targets_J)


def _weight_of_patterns(cases: Cases, n: int, bits_SK: Tensor, predictor: Predictor) -> Tensor:
    """Weight in the community of an activation with pattern ``q`` (rows) for one with pattern ``s`` (columns)."""
    common_SS = bits_SK @ cases.pairs_NKK[n].T @ bits_SK.T
    degree_S1 = (bits_SK @ cases.links_NK[n])[:, None]
    return community_weight(predictor, common_SS, degree_S1.expand_as(common_SS))
