"""The public entry to link scores: checks what it is given, and knows which graph is scored where."""

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError, unknown
from chtconv.geometry import Geometry, PerAxis
from chtconv.predictors import find_predictor
from chtconv.scores.kernel_graph import kernel_graph_scores

GRAPHS = ("kernel",)


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
) -> Tensor:
    """Exact link-prediction scores of every kernel position of a layer, averaged over all sliding windows.

    The score is that of the bipartite graph between activations and windows (paper, section 3.2.2), computed
    from the mask alone, at a cost that does not depend on ``input_size``.

    Args:
        mask: active links, bool of shape [out channels, in channels / groups, *kernel], up to 9 kernel positions.
        input_size: spatial size of the layer's input, one number for all axes or one each.
        predictor: ``"ch3_l3n"`` or ``"ch2_l3n"``.
        graph: ``"kernel"``, the graph of the paper, one for each kernel.
        stride: as in ``torch.nn.Conv2d``.
        padding: as in ``torch.nn.Conv2d``; padding is no activation and so no node of the graph.
        dilation: as in ``torch.nn.Conv2d``.
        groups: as in ``torch.nn.Conv2d``. A kernel sees the channels of its group only, so its graph needs no more.
        padding_mode: ``"zeros"``.
        transposed: False.

    Returns:
        float32 of the mask's shape and device. Disabled positions carry their average score, active ones the
        highest score among the disabled of their kernel, 0 where there is none.

    Raises:
        ConfigurationError: a mask that is not bool or has no channel axes, an unknown predictor or graph, a
            geometry that leaves no output, more than 9 kernel positions, or a kind of layer not supported yet.

    Example:
        >>> mask = torch.tensor([[[[True, True], [False, False]], [[True, False], [True, False]]]])
        >>> link_scores(mask, 8, padding=1)[0, 0]
        tensor([[1.3802, 1.3802],
                [1.3802, 1.1849]])
    """
    _check(mask, graph, groups, padding_mode, transposed)
    find_predictor(predictor)
    geometry = Geometry.of(mask.shape[2:], input_size, stride=stride, padding=padding, dilation=dilation)
    mask_OCK = mask.reshape(*mask.shape[:2], geometry.positions)
    scores_OCK = kernel_graph_scores(mask_OCK, geometry, predictor, torch.float32)
    best_O = scores_OCK.amax(dim=(1, 2)) if mask_OCK.numel() else scores_OCK.sum(dim=(1, 2))
    return torch.where(mask_OCK, best_O[:, None, None], scores_OCK).view(mask.shape)


def _check(mask: Tensor, graph: str, groups: int, padding_mode: str, transposed: bool) -> None:
    if mask.dtype != torch.bool or not 2 <= mask.ndim <= 5:
        raise ConfigurationError(
            f"mask has dtype {mask.dtype} and shape {list(mask.shape)}; "
            "accepted is torch.bool of shape [out, in/groups, *kernel] with up to 3 spatial axes."
        )
    if graph not in GRAPHS:
        raise unknown("graph", graph, GRAPHS)
    if groups < 1 or mask.shape[0] % groups:
        raise ConfigurationError(f"groups={groups} does not divide the {mask.shape[0]} output channels of the mask.")
    if padding_mode != "zeros":
        raise ConfigurationError(f"padding_mode={padding_mode!r}: accepted is 'zeros'.")
    if transposed:
        raise ConfigurationError("transposed=True: transposed convolutions are not supported yet; accepted is False.")
