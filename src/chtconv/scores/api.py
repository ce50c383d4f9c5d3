"""The public entry to link scores: checks what it is given, and knows which graph is scored where."""

import operator
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError, check_name
from chtconv.layers.geometry import Geometry, PerAxis
from chtconv.precision import full_precision
from chtconv.scores.controls import CONTROLS
from chtconv.scores.kernel_graph import kernel_graph_scores
from chtconv.scores.layer_graph import layer_graph_scores
from chtconv.scores.paths import PATH_PREDICTORS, l3p
from chtconv.scores.predictors import PREDICTORS
from chtconv.scores.rule import Rule

GRAPHS = ("kernel", "layer")
WINDOWS = ("in_bounds", "all")
# By name, as the tables are now: rules of one's own may be added to them.
SCORES: Mapping[str, Any] = ChainMap[str, Any](CONTROLS, PATH_PREDICTORS, PREDICTORS)


def link_scores(
    mask: Tensor,
    input_size: PerAxis,
    *,
    predictor: str = "ch3_l3n",
    graph: str = "kernel",
    stride: PerAxis = 1,
    padding: PerAxis | str = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: PerAxis = 0,
    windows: str = "in_bounds",
    exact: bool = False,
) -> Tensor:
    """Exact link-prediction scores of every kernel position of a layer, averaged over all sliding windows.

    The score is that of the bipartite graph between inputs and outputs (paper, section 3.2.2), computed from the mask
    alone, at a cost that does not depend on ``input_size``.

    Args:
        mask: active links, bool: the shape of the layer's weight, [out channels, in channels / groups, *kernel] with
            up to 3 spatial axes; none for a linear layer; [in channels, out channels / groups, *kernel] if transposed.
        input_size: spatial size of the layer's input, one number for all axes or one each; ``()`` for a linear layer.
        predictor: ``"ch3_l3n"``, ``"ch2_l3n"``, ``"ra_l3n"`` or ``"cn_l3n"``; on the layer graph of layers with one
            kernel position also the path-based ``"ch3_l3p"`` and ``"ch2_l3p"``; the controls ``"occupancy"`` (links of
            the slice), ``"input_degree"`` (links of the input channel) and ``"in_bounds"`` (share of windows), which
            look at no graph.
        graph: ``"kernel"``, the graph of the paper, one for each output channel; or ``"layer"``, in which all output
            channels of a group share one, as in CHT on linear layers.
        stride: as in ``torch.nn.Conv2d``.
        padding: as in ``torch.nn.Conv2d``; padding is no activation and so no node of the graph.
        dilation: as in ``torch.nn.Conv2d``.
        groups: as in ``torch.nn.Conv2d``; groups share no node.
        padding_mode: as in ``torch.nn.Conv2d``. Circular padding is real activations; reflected and replicated ones are
            copies and no nodes of their own, so these modes are read like ``"zeros"``.
        transposed: whether the layer is a transposed convolution.
        output_padding: as in ``torch.nn.ConvTranspose2d``, below the stride or the dilation.
        windows: which ones the average is over: ``"in_bounds"``, those in which the position is no padding, or
            ``"all"``, where it counts as 0 in the others. The second is the first times the share of windows in which
            the position is in bounds; on small maps that is far from 1 at the border of a kernel.
        exact: compute in float64 with weights on a grid of 2^-30, so that the scores are the same, bit for bit,
            whatever the number of threads; slower. Path-based predictors are computed as always.

    Returns:
        float32 of the mask's shape and device. Disabled positions carry their average score, active ones the
        highest score among the disabled of their kernel (output channel), 0 where there is none.

    Raises:
        ConfigurationError: a mask that is not bool or has no channel axes, an unknown predictor or graph, a
            geometry that leaves no output, groups that do not divide the channels, or a path-based predictor where
            it is not defined.

    Example:
        >>> mask = torch.tensor([[[[True, True], [False, False]], [[True, False], [True, False]]]])
        >>> link_scores(mask, 8, padding=1)[0, 0]
        tensor([[1.3802, 1.3802],
                [1.3802, 1.1849]])
    """
    _check_mask(mask, groups)
    check_names(predictor, graph, windows)
    geometry = Geometry.of(
        mask.shape[2:],
        input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    check_paths("mask", geometry.positions, predictor, graph)
    mask_GOCK = by_group(mask, groups, geometry)
    scores_GOCK = disabled_scores(mask_GOCK, geometry, predictor, graph, windows=windows, exact=exact)
    best_GO = scores_GOCK.amax(dim=(2, 3), keepdim=True) if mask.numel() else scores_GOCK
    return weight_shaped(torch.where(mask_GOCK, best_GO, scores_GOCK), mask.shape, geometry)


def disabled_scores(
    mask_GOCK: Tensor,
    geometry: Geometry,
    predictor: str,
    graph: str,
    *,
    windows: str = "in_bounds",
    dtype: torch.dtype = torch.float32,
    exact: bool = False,
) -> Tensor:
    """Scores of the disabled positions by group, output channel, input channel and position; 0 at active ones.

    The same whether autocast or TF32 is on: nearly equal scores must not change their order.
    """
    with full_precision(mask_GOCK.device):
        scores_GOCK = _in_bounds_scores(mask_GOCK, geometry, predictor, graph, dtype, exact)
    if windows == "all" and predictor != "in_bounds":
        scores_GOCK *= torch.tensor(geometry.in_bounds, dtype=dtype, device=mask_GOCK.device)
    return scores_GOCK


def _in_bounds_scores(
    mask_GOCK: Tensor, geometry: Geometry, predictor: str, graph: str, dtype: torch.dtype, exact: bool
) -> Tensor:
    """Averages over the windows in which a position is in bounds."""
    if predictor in CONTROLS:
        return CONTROLS[predictor](mask_GOCK.to(dtype), geometry) * ~mask_GOCK
    if predictor in PATH_PREDICTORS:
        scores = [l3p(linked_OCK[:, :, 0], predictor) for linked_OCK in mask_GOCK.to(dtype)]
        return torch.stack(scores)[..., None].mul_(~mask_GOCK)
    rule = Rule(geometry, predictor, torch.float64 if exact else dtype, exact)
    if graph == "layer":
        return layer_graph_scores(mask_GOCK, rule).to(dtype)
    return kernel_graph_scores(mask_GOCK.flatten(0, 1), rule).view(mask_GOCK.shape).to(dtype)


def by_group(mask: Tensor, groups: int, geometry: Geometry) -> Tensor:
    """A mask (or anything of a weight's shape) as [G, O, C, K]: outputs before inputs, also where transposed."""
    split = mask.reshape(groups, mask.shape[0] // groups, mask.shape[1], geometry.positions)
    return split.transpose(1, 2).contiguous() if geometry.transposed else split


def weight_shaped(scores_GOCK: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """The inverse of :func:`by_group`."""
    split = scores_GOCK.transpose(1, 2) if geometry.transposed else scores_GOCK
    return split.reshape(shape)


def check_names(predictor: str, graph: str, windows: str = "in_bounds") -> None:
    """Refuses unknown names, with the nearest match.

    Raises:
        ConfigurationError: no such predictor, graph or choice of windows.
    """
    check_name("predictor", predictor, SCORES)
    check_name("graph", graph, GRAPHS)
    check_name("choice of windows", windows, WINDOWS)


def check_paths(layer: str, positions: int, predictor: str, graph: str) -> None:
    """Refuses a path-based predictor where it is not defined.

    Raises:
        ConfigurationError: naming the layer, the predictor and what is accepted.
    """
    if predictor in PATH_PREDICTORS and (graph != "layer" or positions != 1):
        raise ConfigurationError(
            f"{layer}: predictor {predictor!r} on the {graph} graph of a kernel with {positions} positions; path-based "
            "predictors accept graph='layer' and one position (linear layers and 1x1 convolutions)."
        )


def _check_mask(mask: Tensor, groups: int) -> None:
    try:
        operator.index(groups)
    except TypeError:
        raise ConfigurationError(f"groups={groups!r}: accepted is a whole number of at least 1.") from None
    if mask.dtype != torch.bool or not 2 <= mask.ndim <= 5:
        raise ConfigurationError(
            f"mask has dtype {mask.dtype} and shape {list(mask.shape)}; "
            "accepted is torch.bool of shape [out, in/groups, *kernel] with up to 3 spatial axes."
        )
    if groups < 1 or mask.shape[0] % groups:
        raise ConfigurationError(f"groups={groups} does not divide the {mask.shape[0]} channels of the mask.")
