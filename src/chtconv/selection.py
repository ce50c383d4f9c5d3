"""Choosing a given number of links in every kernel: the one step that removal, regrowth and initialisation share.

A choice is made by keys: the largest keys of a kernel are taken. Ties are broken by the generator and never by
index, because index order favours low channels, and drawing without replacement is a choice by random keys too.

Shapes: O kernels, I positions of a kernel (input channels x kernel positions).
"""

import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chtconv.errors import RuleError

_KEY_TYPES = (torch.int32, torch.int64, torch.float32)
_RANDOM_BITS = 31
_RANDOM_MAX = 2**_RANDOM_BITS - 1
# Positions at once: 4 MB in float32.
_CHUNK = 2**20
# Bytes that are counted together: 255 words of 8.
_BLOCK = 255 * 8
_HIGH = 1 if sys.byteorder == "little" else 0


class Count(NamedTuple):
    """How many links to choose in each kernel: ``most``, or one fewer where ``fewer_O`` (bool, [O, 1]) says so.

    The largest count is a plain number, so that nothing waits for the device.
    """

    most: int
    fewer_O: Tensor

    def of(self, kernels: slice) -> "Count":
        """The same for some of the kernels."""
        return Count(self.most, self.fewer_O[kernels])


def in_chunks(rows_OI: Tensor) -> list[slice]:
    """Slices of rows that are best chosen from one after the other.

    On the CPU few enough that all numbers of theirs stay in the caches, and that memory is used again and not asked
    for anew; elsewhere all of them at once.

    >>> in_chunks(torch.empty(400, 4608))
    [slice(0, 227, None), slice(227, 454, None)]
    """
    kernels, positions = rows_OI.shape
    at_once = max(1, _CHUNK // max(1, positions)) if rows_OI.is_cpu else max(1, kernels)
    return [slice(start, start + at_once) for start in range(0, kernels, at_once)]


def stochastic_round(value: float, kernels: int, generator: torch.Generator) -> Count:
    """``value`` rounded up or down at random in each kernel, right on average.

    Rounding down would never let a kernel evolve in which less than one link is to be removed.

    >>> most, fewer = stochastic_round(1.25, 10_000, torch.Generator().manual_seed(0))
    >>> most, abs(fewer.float().mean().item() - 0.75) < 0.02
    (2, True)
    """
    most = -int(-value // 1)
    draw_O1 = torch.rand(kernels, 1, generator=generator, device=generator.device, dtype=torch.float64)
    return Count(most, draw_O1 < most - value)


def take_largest(keys_OI: Tensor, allowed_OI: Tensor, count: Count) -> Tensor:
    """The largest keys of each row among those allowed, exactly as many as asked for.

    Args:
        keys_OI: int32, int64 or float32 keys above 0, also where they are not allowed; overwritten.
        allowed_OI: bool; every row must allow as many as are taken in it.
        count: how many to take in each row.

    Returns:
        bool of shape [O, I].

    Raises:
        RuleError: keys of another type or shape; on the CPU also keys that are not above 0 and would be taken.
            Elsewhere these come last, in no random order.
    """
    _check_form(keys_OI, allowed_OI)
    if count.most == 0:
        return torch.zeros_like(allowed_OI)
    # The bits of positive floats are in the order of the floats, and integers are compared twice as fast.
    ordered_OI = keys_OI.view(torch.int32) if keys_OI.is_floating_point() else keys_OI
    if not ordered_OI.is_cpu:
        # To look at them would wait for the device: whatever they are, what is not allowed is below.
        ordered_OI = ordered_OI.clamp_min_(1)
    best_OM, index_OM, taken_OM = _largest(ordered_OI.mul_(allowed_OI), count)
    # What is not a number is not above 0 either.
    if best_OM.is_cpu and not ((best_OM.view(keys_OI.dtype) > 0) | ~taken_OM).all():
        wrong = keys_OI[allowed_OI & ~(keys_OI > 0)][0].item()
        raise RuleError(
            f"gave the key {wrong} to a position; accepted are keys above 0 for all positions, also for those that are "
            "worth nothing."
        )
    return torch.zeros_like(allowed_OI).scatter_(1, index_OM, taken_OM)


def _check_form(keys_OI: Tensor, allowed_OI: Tensor) -> None:
    if not isinstance(keys_OI, Tensor) or keys_OI.dtype not in _KEY_TYPES or keys_OI.shape != allowed_OI.shape:
        shape = getattr(keys_OI, "shape", None)
        given = type(keys_OI).__name__ if shape is None else f"{keys_OI.dtype} of shape {list(shape)}"
        raise RuleError(
            f"gave keys of {given}; accepted are torch.int32, torch.int64 and torch.float32 of shape "
            f"{list(allowed_OI.shape)}."
        )


def take_smallest_links(
    values_OI: Tensor, mask_OI: Tensor, links: int, count: Count, generator: torch.Generator
) -> Tensor:
    """The active links of smallest magnitude in each row, where it is known how many links a row has.

    Their magnitudes are gathered before anything else is done with them: of a sparse mask that is the lesser part.

    Args:
        values_OI: float32; their sign is ignored.
        mask_OI: bool, the active links, ``links`` in each row.
        links: how many links a row has.
        count: how many to take in each row, at most ``links``.
        generator: breaks the ties.

    Returns:
        bool of shape [O, I].

    >>> values, mask = torch.tensor([[0.5, 0.0, -0.1, 3.0]]), torch.tensor([[True, False, True, True]])
    >>> one = Count(1, torch.tensor([[False]]))
    >>> take_smallest_links(values, mask, 3, one, torch.Generator().manual_seed(0))
    tensor([[False, False,  True, False]])
    """
    if count.most == 0 or not mask_OI.is_cpu:
        # Where the links are is not known elsewhere without waiting for the device.
        return take_largest(by_value(values_OI, generator, smallest=True), mask_OI, count)
    kernels, positions = mask_OI.shape
    # NumPy searches without branches: seven times as fast as torch.
    place_OL = torch.from_numpy(np.flatnonzero(mask_OI.numpy())).view(kernels, links)
    _, index_OM, taken_OM = _largest(by_value(values_OI.take(place_OL), generator, smallest=True), count)
    column_OM = place_OL.gather(1, index_OM) - torch.arange(kernels, device="cpu")[:, None] * positions
    return torch.zeros_like(mask_OI).scatter_(1, column_OM, taken_OM)


def _largest(keys_OI: Tensor, count: Count) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count.most`` largest keys of each row, where they are, and whether they count: all, or but the least."""
    best_OM, index_OM = keys_OI.topk(count.most, dim=1, sorted=False)
    taken_OM = torch.ones_like(index_OM, dtype=torch.bool)
    return best_OM, index_OM, taken_OM.scatter_(1, best_OM.argmin(dim=1, keepdim=True), ~count.fewer_O)


def count_true(mask: Tensor) -> Tensor:
    """The number of true entries of a bool tensor, int64: ten times as fast as ``count_nonzero`` on a CPU.

    Eight bytes are added at once, as one word: of up to 255 words, no byte runs over.

    >>> count_true(torch.arange(10_000) % 3 == 0)
    tensor(3334)
    """
    flat_N = (mask if mask.is_contiguous() else mask.permute(*_by_stride(mask))).reshape(-1).view(torch.uint8)
    if flat_N.storage_offset() % 8:
        flat_N = flat_N.clone()
    whole = len(flat_N) // _BLOCK * _BLOCK
    sums_W = flat_N[:whole].view(torch.int64).view(-1, _BLOCK // 8).sum(1)
    return sums_W.view(torch.uint8).sum() + flat_N[whole:].sum()


def _by_stride(values: Tensor) -> list[int]:
    """Axes from the slowest to the fastest: the order in which a dense tensor lies in memory."""
    return sorted(range(values.ndim), key=lambda axis: -values.stride()[axis])


def random_integers(like_OI: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform odd int32 in [1, 2^31) of a given shape: the cheapest draw there is, and never 0."""
    # One 64-bit draw makes two words, at two thirds of the time of two draws.
    pairs = torch.empty((like_OI.numel() + 1) // 2, dtype=torch.int64, device=like_OI.device)
    words = pairs.random_(-(2**63), None, generator=generator).view(torch.int32)[: like_OI.numel()]
    return words.bitwise_and_(_RANDOM_MAX).bitwise_or_(1).view(like_OI.shape)


def exponentials(like_OI: Tensor, generator: torch.Generator) -> Tensor:
    """Exponentially distributed float32 with mean 1, above 0, accurate where they are small."""
    # A float32 just below 2^-31, so that no integer becomes 1, nor a time infinite.
    uniform_OI = random_integers(like_OI, generator).to(torch.float32).mul_(-(1 - 2.0**-24) * 2.0**-_RANDOM_BITS)
    return uniform_OI.log1p_().neg_()


def by_value(values_OI: Tensor, generator: torch.Generator, *, smallest: bool = False, drop_bits: int = 0) -> Tensor:
    """Keys in the order of the magnitudes of float32 values, with equal ones in random order.

    Args:
        values_OI: float32; their sign is ignored.
        generator: breaks the ties.
        smallest: whether the smallest magnitude has the largest key.
        drop_bits: values that agree but for so many of their 23 mantissa bits count as equal, so that rounding
            errors decide nothing.

    Returns:
        int64 keys above 0.
    """
    order_OI = values_OI.abs().contiguous().view(torch.int32)
    if drop_bits:
        order_OI = order_OI.add_(1 << drop_bits - 1).bitwise_right_shift_(drop_bits)
    if smallest:
        order_OI = order_OI.neg_().add_(_RANDOM_MAX)
    # A key is two words side by side, the order above the breaker of ties: 64-bit arithmetic would take twice as long.
    keys_OI2 = torch.empty(*order_OI.shape, 2, dtype=torch.int32, device=order_OI.device)
    keys_OI2[..., _HIGH] = order_OI
    keys_OI2[..., 1 - _HIGH] = _tie_breakers(values_OI, generator)
    return keys_OI2.view(torch.int64)[..., 0]


def _tie_breakers(like_OI: Tensor, generator: torch.Generator) -> Tensor:
    """Odd int32 in another random order for each kernel, read as unsigned: multiplicative hashes of the positions.

    Ties need no independent numbers, and these cost one multiplication instead of a draw each.
    """
    kernels, positions = like_OI.shape
    words = random_integers(like_OI.new_empty(kernels + positions), generator)
    return words[:kernels, None] * words[None, kernels:]
