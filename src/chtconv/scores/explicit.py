"""The graphs as they stand in the paper: slow, readable, the reference for everything else.

Three steps, one function each: the mask is expanded into the biadjacency matrix of outputs and inputs
(section 3.1), the link predictor runs on that graph, and the scores of a kernel position are averaged over all
sliding windows (section 3.2.2). Any number of spatial axes, any predictor. Memory grows with the square of the
feature map: use it on small inputs.
"""

from itertools import product

import torch
from torch import Tensor

from chtconv.layers.geometry import Geometry
from chtconv.scores.paths import PATH_PREDICTORS, l3p
from chtconv.scores.predictors import PREDICTORS, Predictor, community_weight


def explicit_scores(mask_OCK: Tensor, geometry: Geometry, predictor: str, graph: str = "kernel") -> Tensor:
    """Average link scores of every disabled position, from the explicit graph of each kernel or of them all.

    Args:
        mask_OCK: bool, the active positions of each slice; one group.
        geometry: the geometry of the layer, with the size of its input.
        predictor: a name in :data:`chtconv.scores.predictors.PREDICTORS` or in
            :data:`chtconv.scores.paths.PATH_PREDICTORS`.
        graph: ``"kernel"`` for a graph of each kernel, ``"layer"`` for one of all kernels.

    Returns:
        float64 scores of shape [O, C, K]; 0 at active positions.
    """
    graphs = [mask_OCK] if graph == "layer" else mask_OCK.split(1)
    scores = [graph_scores(kernels_OCK, geometry, predictor) for kernels_OCK in graphs]
    return torch.cat(scores).masked_fill(mask_OCK, 0)


def graph_scores(mask_OCK: Tensor, geometry: Geometry, predictor: str) -> Tensor:
    """The three steps for kernels that share a graph: expand, predict, average. Returns float64 [O, C, K]."""
    linked = torch.cat([biadjacency(mask_CK, geometry) for mask_CK in mask_OCK])
    scores = l3p(linked, predictor) if predictor in PATH_PREDICTORS else l3n(linked, PREDICTORS[predictor])
    channels = mask_OCK.shape[1]
    return torch.stack([average_over_windows(own, channels, geometry) for own in scores.chunk(len(mask_OCK))])


def biadjacency(mask_CK: Tensor, geometry: Geometry) -> Tensor:
    """The bipartite graph of one kernel (section 3.1): outputs x inputs.

    Inputs are numbered by channel, then row by row; padding is no input.

    Returns:
        float64 of shape [output size, channels · input size], 1 where an output is linked to an input.

    >>> mask = torch.tensor([[True, False, True]])
    >>> biadjacency(mask, Geometry.of(kernel=(3,), input_size=4))
    tensor([[1., 0., 1., 0.],
            [0., 1., 0., 1.]], dtype=torch.float64)
    """
    outputs, inputs = _sizes(geometry)
    linked = torch.zeros(outputs, len(mask_CK), inputs, dtype=torch.float64, device="cpu")
    for output, position, source in receptive_fields(geometry):
        linked[output, :, source] = mask_CK[:, position].double()
    return linked.flatten(1)


def l3n(linked_AB: Tensor, predictor: Predictor) -> Tensor:
    """Node-based L3n score of every pair of a bipartite graph: the sum of weights over its local community.

    The community of ``(u, v)`` is every ``z`` in N(v) that shares a neighbour with ``u`` and every ``y`` in N(u)
    that shares one with ``v``. Scores of pairs that are linked already mean nothing.

    Args:
        linked_AB: biadjacency matrix, floating point, 0 or 1.
        predictor: weight of a node from its internal and external degree.
    """
    common_AA = linked_AB @ linked_AB.T
    common_BB = linked_AB.T @ linked_AB
    weight_AA = community_weight(predictor, common_AA, linked_AB.sum(1).expand_as(common_AA))
    weight_BB = community_weight(predictor, common_BB, linked_AB.sum(0).expand_as(common_BB))
    return weight_AA @ linked_AB + linked_AB @ weight_BB.T


def average_over_windows(scores: Tensor, channels: int, geometry: Geometry) -> Tensor:
    """Mean score of each kernel position over the windows in which it is in bounds (section 3.2.2).

    Args:
        scores: of each pair of a kernel's outputs and all inputs, [output size, channels · input size].
        channels: input channels.
        geometry: the geometry of the layer.

    Returns:
        Shape [channels, K]; 0 for a position that is in bounds at no window.
    """
    outputs, inputs = _sizes(geometry)
    by_channel = scores.reshape(outputs, channels, inputs)
    total_CK = torch.zeros(channels, geometry.positions, dtype=scores.dtype, device="cpu")
    count_K = torch.zeros(geometry.positions, device="cpu")
    for output, position, source in receptive_fields(geometry):
        total_CK[:, position] += by_channel[output, :, source]
        count_K[position] += 1
    return total_CK / count_K.clamp_min(1)


def receptive_fields(geometry: Geometry) -> list[tuple[int, int, int]]:
    """Every (output, kernel position, input of a channel) that is in bounds, each numbered row by row."""
    fields = [(0, 0, 0)]
    for axis in geometry.axes:
        here = [(w, p, x) for w in range(axis.windows) for p, x in axis.sees(w).items()]
        fields = [
            (window * axis.windows + w, position * axis.kernel + p, activation * axis.size + x)
            for (window, position, activation), (w, p, x) in product(fields, here)
        ]
    return [(x, p, w) for w, p, x in fields] if geometry.transposed else fields


def _sizes(geometry: Geometry) -> tuple[int, int]:
    """Number of outputs of a kernel, and of inputs of a channel."""
    return torch.Size(geometry.output_size).numel(), torch.Size(geometry.input_size).numel()
