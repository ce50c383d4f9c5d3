"""Mean scores by place: kernel position, channel and slice."""

from dataclasses import dataclass

import torch
from torch import Size, Tensor


@dataclass(frozen=True, eq=False)
class Means:
    """Means over the disabled positions of each place: float64 on the CPU, NaN where there is none.

    Attributes:
        position: of each kernel position, of the kernel's shape.
        input_channel: of each input channel, [C].
        output_channel: of each output channel, [O].
        slice: of each slice, [O, C / groups].
    """

    position: Tensor
    input_channel: Tensor
    output_channel: Tensor
    slice: Tensor


def means(scores_GOCK: Tensor, mask_GOCK: Tensor, kernel: Size) -> Means:
    """The means of a layer with a kernel of shape ``kernel``.

    >>> scores = torch.tensor([[[[1.0, 3.0], [5.0, 9.0]]]])
    >>> means(scores, torch.tensor([[[[False, False], [False, True]]]]), Size([2])).position
    tensor([3., 3.], dtype=torch.float64)
    """
    disabled_GOCK = ~mask_GOCK
    scores_GOCK = torch.where(disabled_GOCK, scores_GOCK, 0)

    def over(*axes: int) -> Tensor:
        # 0 / 0 is NaN, as it should be.
        return scores_GOCK.sum(axes, dtype=torch.float64) / disabled_GOCK.sum(axes)

    return Means(over(0, 1, 2).view(kernel), over(1, 3).flatten(), over(2, 3).flatten(), over(3).flatten(0, 1))
