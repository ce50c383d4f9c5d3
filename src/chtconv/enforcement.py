"""Keeping what is off the mask at exactly zero, at the price of reading it once.

A mask is kept as integers of the width of the weights, all ones where a link is active and 0 elsewhere: a bitwise
"and" with the bits of a float costs as much as a multiplication, but removes NaN too and never leaves -0.0.
"""

import torch
from torch import Tensor

_INTEGER_OF_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as bits for tensors of the type, device and memory layout of ``like``.

    >>> bits_of(torch.tensor([True, False]), torch.zeros(2))
    tensor([-1,  0], dtype=torch.int32)
    """
    bits = torch.empty_like(like, dtype=_INTEGER_OF_WIDTH[like.element_size()])
    return bits.copy_(mask).neg_()


def matching(bits: Tensor, like: Tensor) -> Tensor:
    """``bits`` where it suits ``like``, else a copy of its width, device and strides.

    A mask in another memory layout than the tensor is five times slower, so the caller keeps the copy.
    """
    wanted = (_INTEGER_OF_WIDTH[like.element_size()], like.device, like.stride())
    return bits if (bits.dtype, bits.device, bits.stride()) == wanted else bits_of(bits != 0, like)


@torch.no_grad()
def apply_bits(tensor: Tensor, bits: Tensor) -> None:
    """Sets ``tensor`` to +0.0 in place where the bits are 0."""
    tensor.view(bits.dtype).bitwise_and_(bits)


@torch.no_grad()
def accumulate(dense: Tensor | None, gradient: Tensor, bits: Tensor) -> Tensor:
    """The dense gradient of a step, from a gradient that is masked after every time that something was added to it.

    On the mask ``gradient`` holds the sum so far; off the mask only what was added last.

    Args:
        dense: what this returned the last time in this step, None the first time; overwritten.
        gradient: before it is masked.
        bits: the mask.
    """
    if dense is None:
        return gradient.detach().clone()
    dense.view(bits.dtype).bitwise_and_(~bits)
    return dense.add_(gradient)


def is_zero_off_mask(tensor: Tensor, bits: Tensor) -> bool:
    """Whether nothing but zeros (of either sign) lies off the mask. Waits for the device."""
    return not bool((tensor.detach().ne(0) & bits.eq(0)).any())
