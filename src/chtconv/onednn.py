"""What torch's library for convolutions on CPUs cannot be given.

oneDNN writes past its memory in the gradient of the weight of a 1x1 convolution with strides, where the input is
``channels_last`` and has fewer channels than a vector has numbers: 8 with AVX2, 16 with AVX-512
(https://github.com/uxlfoundation/oneDNN/issues/6035, open; seen with torch 2.13). The process dies, or goes on with
wrong numbers. Such are the shortcuts of narrow residual networks. Torch chooses the layout from the strides of the
input and from those of the weight, which :meth:`torch.nn.Module.to` makes ``channels_last`` even where 1x1 windows
leave nothing to order.
"""

from collections.abc import Sequence

from torch import Tensor, nn

_WIDEST = 16


def overruns(channels: int, window: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the weight of a convolution must not get its gradient in ``channels_last``, on some CPU.

    Args:
        channels: of the input, those of one group.
        window: height and width of the kernel.
        stride: of the convolution.

    >>> overruns(8, (1, 1), (2, 2)), overruns(16, (1, 1), (2, 2)), overruns(8, (1, 1), (1, 1))
    (True, False, False)
    """
    return channels < _WIDEST and set(window) == {1} and set(stride) != {1}


def any_overruns(model: nn.Module) -> bool:
    """Whether a model has such a convolution.

    >>> any_overruns(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, stride=2)))
    True
    """
    return any(
        overruns(module.in_channels // module.groups, module.kernel_size, module.stride)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )


def plain(x: Tensor) -> Tensor:
    """The same numbers with the strides of ``torch.contiguous_format``, also where others would mean the same.

    >>> import torch
    >>> weight = nn.Conv2d(4, 8, 1).to(memory_format=torch.channels_last).weight
    >>> weight.stride(), plain(weight).stride()
    ((4, 1, 4, 4), (4, 1, 1, 1))
    """
    return x.reshape(-1).view(x.shape)
