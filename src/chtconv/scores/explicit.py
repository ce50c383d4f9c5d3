"""The graph of a kernel as it stands in the paper: slow, readable, the reference for everything else.

Three steps, one function each: the mask is expanded into the biadjacency matrix of windows and activations
(section 3.1), the link predictor runs on that graph, and the scores of a kernel position are averaged over all
sliding windows (section 3.2.2). Any number of spatial axes, any predictor. Memory grows with the square of the
feature map: use it on small inputs.
"""

from itertools import product

import torch
from torch import Tensor

from chtconv.geometry import Geometry
from chtconv.predictors import Predictor, community_weight, find_predictor


def explicit_scores(mask_OCK: Tensor, geometry: Geometry, predictor: str) -> Tensor:
    """Average link scores of every disabled position, from the explicit graph of each kernel.

    Args:
        mask_OCK: bool, the active positions of each slice.
        geometry: the geometry of the layer, with the size of its input.
        predictor: a name in :data:`chtconv.predictors.PREDICTORS`.

    Returns:
        float64 scores of shape [O, C, K]; 0 at active positions.
    """
    scores = [kernel_scores(mask_CK, geometry, find_predictor(predictor)) for mask_CK in mask_OCK]
    return torch.stack(scores).masked_fill(mask_OCK, 0)


def kernel_scores(mask_CK: Tensor, geometry: Geometry, predictor: Predictor) -> Tensor:
    """The three steps for one kernel: expand, predict, average. Returns float64 [C, K]."""
    scores_WA = l3n(biadjacency(mask_CK, geometry), predictor)
    return average_over_windows(scores_WA, len(mask_CK), geometry)


def biadjacency(mask_CK: Tensor, geometry: Geometry) -> Tensor:
    """The bipartite graph of one kernel (section 3.1): windows x activations.

    Activations are numbered by channel, then row by row; padding is not an activation.

    Returns:
        float64 of shape [windows, channels · input size], 1 where a window is linked to an activation.

    >>> mask = torch.tensor([[True, False, True]])
    >>> biadjacency(mask, Geometry.of(kernel=(3,), input_size=4))
    tensor([[1., 0., 1., 0.],
            [0., 1., 0., 1.]], dtype=torch.float64)
    """
    windows, activations = _sizes(geometry)
    linked = torch.zeros(windows, len(mask_CK), activations, dtype=torch.float64)
    for window, position, activation in receptive_fields(geometry):
        linked[window, :, activation] = mask_CK[:, position].double()
    return linked.flatten(1)


def l3n(linked_WA: Tensor, predictor: Predictor) -> Tensor:
    """Node-based L3n score of every pair of a bipartite graph: the sum of weights over its local community.

    The community of ``(u, v)`` is every ``z`` in N(v) that shares a neighbour with ``u`` and every ``y`` in N(u)
    that shares one with ``v``. Scores of pairs that are linked already mean nothing.

    Args:
        linked_WA: biadjacency matrix, floating point, 0 or 1.
        predictor: weight of a node from its internal and external degree.
    """
    common_WW = linked_WA @ linked_WA.T
    common_AA = linked_WA.T @ linked_WA
    windows_WW = community_weight(predictor, common_WW, linked_WA.sum(1).expand_as(common_WW))
    activations_AA = community_weight(predictor, common_AA, linked_WA.sum(0).expand_as(common_AA))
    return windows_WW @ linked_WA + linked_WA @ activations_AA.T


def average_over_windows(scores_WA: Tensor, channels: int, geometry: Geometry) -> Tensor:
    """Mean score of each kernel position over the windows in which it is in bounds (section 3.2.2).

    Returns:
        Shape [channels, K]; 0 for a position that is in bounds at no window.
    """
    windows, activations = _sizes(geometry)
    scores_WCA = scores_WA.view(windows, channels, activations)
    total_CK = torch.zeros(channels, geometry.positions, dtype=scores_WA.dtype)
    count_K = torch.zeros(geometry.positions)
    for window, position, activation in receptive_fields(geometry):
        total_CK[:, position] += scores_WCA[window, :, activation]
        count_K[position] += 1
    return total_CK / count_K.clamp_min(1)


def receptive_fields(geometry: Geometry) -> list[tuple[int, int, int]]:
    """Every (window, position, activation of a channel) that is in bounds, each numbered row by row."""
    fields = [(0, 0, 0)]
    for axis in geometry.axes:
        here = [(w, p, x) for w in range(axis.windows) for p, x in axis.sees(w).items()]
        fields = [
            (window * axis.windows + w, position * axis.kernel + p, activation * axis.size + x)
            for (window, position, activation), (w, p, x) in product(fields, here)
        ]
    return fields


def _sizes(geometry: Geometry) -> tuple[int, int]:
    """Number of windows, and of activations of one channel."""
    windows = torch.Size(geometry.output_size).numel()
    return windows, torch.Size(geometry.input_size).numel()
