"""Exact link scores on the layer graph: all kernels of a layer (of each group of it) in one bipartite graph.

For linear layers and 1x1 convolutions this is the graph that CHT and CHTs use on fully connected layers. The two
sums of an L3n score are mirror images: one function, with outputs and inputs exchanged. The cost is that of a few
products of (O·K x O·K) matrices and does not depend on the size of the input.

Shapes: G groups, O outputs, C inputs, K positions; A nodes of one side, B of the other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from chtconv.layers.geometry import Geometry
from chtconv.scores.cases import Cases, constants, input_cases, mean_weights, output_cases
from chtconv.scores.rule import Rule


def layer_graph_scores(mask_GOCK: Tensor, rule: Rule) -> Tensor:
    """Average score of each disabled position over the windows in which it is in bounds; 0 where it is active.

    Args:
        mask_GOCK: bool, active positions of each group, output channel and input channel.
        rule: geometry, predictor and arithmetic.

    Returns:
        Scores of shape [G, O, C, K] on the device of the mask.
    """
    nodes_KGOC = mask_GOCK.permute(3, 0, 1, 2).to(rule.dtype, memory_format=torch.contiguous_format)
    scores_KGOC = torch.zeros_like(nodes_KGOC)
    K, G, O, C = nodes_KGOC.shape
    by_position = scores_KGOC.view(K * G, O, C)
    mean_KKGOO = _mean_weights(nodes_KGOC, output_cases, rule)
    for q in range(K):
        everywhere = nodes_KGOC[q].expand(K, G, O, C).flatten(0, 1)
        by_position.baddbmm_(mean_KKGOO[:, q].flatten(0, 1), everywhere)
    del mean_KKGOO
    mean_KKGCC = _mean_weights(nodes_KGOC.mT, input_cases, rule)
    for q in range(K):
        everywhere = nodes_KGOC[q].expand(K, G, O, C).flatten(0, 1)
        by_position.baddbmm_(everywhere, mean_KKGCC[:, q].flatten(0, 1).mT)
    return scores_KGOC.permute(1, 2, 3, 0) * ~mask_GOCK


def _mean_weights(nodes_KGAB: Tensor, which: Callable[[Geometry], Cases], rule: Rule) -> Tensor:
    """``F[p, q][a, a']``: the mean weight of node a' in the community of node a, [K, K, G, A, A]."""
    K, G, A, _ = nodes_KGAB.shape
    cases = constants(which, rule.geometry, nodes_KGAB.device, rule.dtype)
    degree_KGA = nodes_KGAB.sum(3)[:, :, None, :]
    return mean_weights(_gram(nodes_KGAB).flatten(0, 1), degree_KGA, cases, rule).view(K, K, G, A, A)


def _gram(nodes_KGAB: Tensor) -> Tensor:
    """Common neighbours of every two nodes at every two positions: [K, K, G, A, A]."""
    K, G, A, _ = nodes_KGAB.shape
    gram_KKGAA = nodes_KGAB.new_empty(K, K, G, A, A)
    for r in range(K):
        torch.matmul(nodes_KGAB[r], nodes_KGAB[r:].mT, out=gram_KKGAA[r, r:])
        # Exchanging the two nodes and their positions changes nothing.
        gram_KKGAA[r + 1 :, r] = gram_KKGAA[r, r + 1 :].mT
    return gram_KKGAA
