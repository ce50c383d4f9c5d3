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
    if (
        bits.dtype is _INTEGER_OF_WIDTH[like.element_size()]
        and bits.stride() == like.stride()
        and bits.device == like.device
    ):
        return bits
    return bits_of(bits != 0, like)


def apply_bits(tensor: Tensor, bits: Tensor) -> None:
    """Sets ``tensor`` to +0.0 in place where the bits are 0."""
    # Runs for every layer in every step: a context without gradients would take longer than this.
    tensor.detach().view(bits.dtype).bitwise_and_(bits)


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


@torch.no_grad()
def unless_zeroed(dense: Tensor, gradient: Tensor) -> Tensor:
    """What was kept of a dense gradient, or zeros where the gradient was set to zero since. Does not wait."""
    return torch.where(gradient.any(), dense, torch.zeros_like(dense))


@torch.no_grad()
def rescaled(dense: Tensor, gradient: Tensor, bits: Tensor) -> Tensor:
    """The dense gradient times what the masked one was multiplied by since: unscaled, clipped, averaged.

    Args:
        dense: what :func:`accumulate` returned.
        gradient: the gradient as the optimizer will see it; a multiple of ``dense`` on the mask.
        bits: the mask.

    Returns:
        ``dense`` times that factor, which is found by least squares on the mask; ``dense`` itself where all of that is
        zero, and zeros where it is not finite. Does not wait for the device.

    >>> bits = bits_of(torch.tensor([True, True, False]), torch.zeros(3))
    >>> rescaled(torch.tensor([8.0, 16.0, 24.0]), torch.tensor([1.0, 2.0, 0.0]), bits)
    tensor([1., 2., 3.])
    """
    seen = dense.clone()
    apply_bits(seen, bits)
    seen = seen.float()
    norm = (seen * seen).sum()
    factor = torch.where(norm == 0, 1.0, (seen * gradient).sum() / norm)
    return torch.where(factor.isfinite(), dense * factor.to(dense.dtype), torch.zeros_like(dense))


def is_zero_off_mask(tensor: Tensor, bits: Tensor) -> bool:
    """Whether nothing but zeros (of either sign) lies off the mask. Waits for the device."""
    return not bool((tensor.detach().ne(0) & bits.eq(0)).any())
