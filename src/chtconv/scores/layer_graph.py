"""Exact link scores on the layer graph: all kernels of a layer (of each group of it) in one bipartite graph.

For linear layers and 1x1 convolutions this is the graph that CHT and CHTs use on fully connected layers. The two
sums of an L3n score are mirror images: one function, with outputs and inputs exchanged. The cost is that of a few
products of (O·K x O·K) matrices and does not depend on the size of the input.

Shapes: G groups, A nodes on the side that is summed over (B on the other), K positions, L = K · K
pairs of them, X pairs of nodes (or a node and position).
"""

import torch
from torch import Tensor

from chtconv.geometry import Geometry
from chtconv.scores.cases import Cases, constants, input_cases, mean_weights, output_cases


def layer_graph_scores(mask_GOCK: Tensor, geometry: Geometry, predictor: str, dtype: torch.dtype) -> Tensor:
    """Average score of each disabled position over the windows in which it is in bounds; 0 where it is active.

    Args:
        mask_GOCK: bool, active positions of each group, output channel and input channel.
        geometry: the geometry of the layer, with the size of its input.
        predictor: a name in :data:`chtconv.predictors.PREDICTORS`.
        dtype: floating point type of the computation and the result.

    Returns:
        Scores of shape [G, O, C, K] on the device of the mask.
    """
    links_GOCK = mask_GOCK.to(dtype)
    over_outputs, over_inputs = (constants(c, geometry, links_GOCK.device, dtype) for c in (output_cases, input_cases))
    scores_GOCK = _sum_over(links_GOCK, over_outputs, predictor)
    scores_GOCK += _sum_over(links_GOCK.transpose(1, 2), over_inputs, predictor).transpose(1, 2)
    return scores_GOCK.mul_(~mask_GOCK)


def _sum_over(links_GABK: Tensor, cases: Cases, predictor: str) -> Tensor:
    """``sum over a', q of m[a', b, q] · F[p, q][a, a']``, where F is the mean weight of node a' for node a."""
    G, A, B, K = links_GABK.shape
    nodes_KGAB = links_GABK.permute(3, 0, 1, 2).contiguous()
    degree_KX = nodes_KGAB.sum(3)[:, :, None, :].expand(K, G, A, A).reshape(K, G * A * A)
    mean_LX = mean_weights(_gram(nodes_KGAB).view(K * K, G * A * A), degree_KX, cases, predictor)
    mean_KKGAA = mean_LX.view(K, K, G, A, A)
    sums_KGAB = torch.zeros_like(nodes_KGAB)
    for q in range(K):
        weight_XAA = mean_KKGAA[:, q].flatten(0, 1)
        sums_KGAB.view(K * G, A, B).baddbmm_(weight_XAA, nodes_KGAB[q].expand(K, G, A, B).reshape(K * G, A, B))
    return sums_KGAB.permute(1, 2, 3, 0)


def _gram(nodes_KGAB: Tensor) -> Tensor:
    """Common neighbours of every two nodes at every two positions: [K, K, G, A, A]."""
    K, G, A, _ = nodes_KGAB.shape
    gram_KKGAA = nodes_KGAB.new_empty(K, K, G, A, A)
    for r in range(K):
        gram_KKGAA[r, r:] = nodes_KGAB[r] @ nodes_KGAB[r:].mT
        # Exchanging the two nodes and their positions changes nothing.
        gram_KKGAA[r + 1 :, r] = gram_KKGAA[r, r + 1 :].mT
    return gram_KKGAA
