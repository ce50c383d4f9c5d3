"""Exact link scores on the kernel graph, without building it (paper, section 3.2.2).

Translation symmetry turns the average of a position's scores over all sliding windows into two sums:

* over outputs, from the K x K Gram matrix of each kernel: which positions are active together in its slices;
* over inputs, slice by slice: through a table of patterns for kernels of up to 9 positions, and from pairs of
  slices for larger ones: each kernel takes the square of its input channels, for each pair of positions.

The cost does not depend on the size of the input. Shapes: O kernels, C slices of a kernel (D where each of C meets
each of D), K positions, L = K · K pairs of them, X pairs of slices.
"""

import torch
from torch import Tensor

from chtconv.scores.cases import Cases, constants, input_cases, mean_weights, output_cases
from chtconv.scores.patterns import MAX_POSITIONS, codes, histograms, look_up, pattern_table
from chtconv.scores.predictors import predictor_of
from chtconv.scores.rule import Rule

# Numbers held at once for pairs of slices: 256 MB in float32.
PAIRS = 2**26


def kernel_graph_scores(mask_OCK: Tensor, rule: Rule) -> Tensor:
    """Average score of each disabled position over the windows in which it is in bounds; 0 where it is active.

    Args:
        mask_OCK: bool, the active positions of each slice; kernels are those of the outputs, also where the
            layer is transposed.
        rule: geometry, predictor and arithmetic.

    Returns:
        Scores of shape [O, C, K] on the device of the mask, of the type of the arithmetic.
    """
    if rule.geometry.positions <= MAX_POSITIONS:
        return _scores_by_pattern(mask_OCK, rule)
    links_OCK = mask_OCK.to(rule.dtype)
    gram_OKK = links_OCK.mT @ links_OCK
    mean_OKK = _mean_of_outputs(gram_OKK.flatten(1), rule).view_as(gram_OKK)
    scores_OCK = links_OCK @ mean_OKK.mT
    scores_OCK += _sum_by_pairs(links_OCK, rule)
    # Finite times 0: cheaper than filling.
    return scores_OCK.mul_(~mask_OCK)


def _scores_by_pattern(mask_OCK: Tensor, rule: Rule) -> Tensor:
    """Both sums in one product, because both depend on nothing but the kernel and the pattern of the slice."""
    table = pattern_table(rule, predictor_of(rule.predictor), mask_OCK.device)
    code_OC = codes(mask_OCK)
    histogram_OS = histograms(code_OC, len(table.both_SL), rule.dtype)
    mean_OL = _mean_of_outputs(histogram_OS @ table.both_SL, rule)
    return look_up(torch.cat([histogram_OS, mean_OL], dim=1) @ table.values_XJ, code_OC, table)


def _mean_of_outputs(gram_OL: Tensor, rule: Rule) -> Tensor:
    """``F[o][p, q]``: the mean weight of the output that sees at ``q`` the input that another one sees at ``p``.

    The sum over outputs is ``sum over q of m[o, c, q] · F[o][p, q]``.
    """
    cases = constants(output_cases, rule.geometry, gram_OL.device, gram_OL.dtype)
    gram_LO = gram_OL.T.contiguous()
    degree_KO = gram_LO[:: rule.geometry.positions + 1].contiguous()
    return mean_weights(gram_LO, degree_KO, cases, rule).T.contiguous()


def _sum_by_pairs(links_OCK: Tensor, rule: Rule) -> Tensor:
    """Sum over the inputs that the output sees, from every pair of slices of a kernel."""
    cases = constants(input_cases, rule.geometry, links_OCK.device, links_OCK.dtype)
    _, C, K = links_OCK.shape
    # The pairs of slices of all kernels at once can be large, and so can those of one: as many as fit.
    kernels, slices = (max(1, PAIRS // (K * K * C * pairs)) for pairs in (C, 1))
    return torch.cat([
        torch.cat([_pairs_of(scored, links, cases, rule) for scored in links.split(slices, dim=1)], dim=1)
        for links in links_OCK.split(kernels)
    ])  # fmt: skip


def _pairs_of(scored_OCK: Tensor, links_ODK: Tensor, cases: Cases, rule: Rule) -> Tensor:
    """What all D slices of each kernel contribute to C of them."""
    O, C, K = scored_OCK.shape
    D = links_ODK.shape[1]
    scored_KOC, links_KOD = (links.permute(2, 0, 1).contiguous() for links in (scored_OCK, links_ODK))
    gram_LX = (scored_KOC[:, None, :, :, None] * links_KOD[None, :, :, None, :]).reshape(K * K, O * C * D)
    degree_KX = links_KOD[:, :, None, :].expand(K, O, C, D).reshape(K, O * C * D)
    mean_PQOCD = mean_weights(gram_LX, degree_KX, cases, rule).view(K, K, O, C, D)
    return torch.einsum("pqocd,odq->ocp", mean_PQOCD, links_ODK)
