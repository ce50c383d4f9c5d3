"""Where the weights of a sparse layer are, in few bits: gaps between positions, in the code of Rice.

A gap is cut into its ``low_bits`` lowest bits and the rest. The rests are written in unary, as so many zeros and a one;
the low bits lie beside them. With ``low_bits=0`` this is a bit mask; with the best number, it takes within a few per
cent of what random positions must take.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chtconv.errors import ConfigurationError

# More would be one link in half a million positions.
MOST_LOW_BITS = 20


def encode(positions: Tensor) -> tuple[Tensor, Tensor, int]:
    """Ascending positions as bytes.

    Args:
        positions: int64 [links], from 0, strictly ascending.

    Returns:
        The unary part and the low bits, uint8 each, and the number of low bits of a gap.

    >>> high, low, low_bits = encode(torch.tensor([0, 1, 9, 20]))
    >>> decode(high, low, low_bits, 4, 24)
    tensor([ 0,  1,  9, 20])
    """
    gaps = np.diff(positions.numpy(), prepend=-1) - 1
    sizes = [len(gaps) * (1 + bits) + int((gaps >> bits).sum()) for bits in range(MOST_LOW_BITS + 1)]
    low_bits = int(np.argmin(sizes))
    rests = gaps >> low_bits
    unary = np.zeros(len(gaps) + int(rests.sum()), np.uint8)
    unary[np.cumsum(rests + 1) - 1] = 1
    shifts = np.arange(low_bits)
    low = (gaps[:, None] >> shifts & 1).astype(np.uint8)
    return torch.from_numpy(np.packbits(unary)), torch.from_numpy(np.packbits(low.reshape(-1))), low_bits


def decode(high: Tensor, low: Tensor, low_bits: int, links: int, size: int) -> Tensor:
    """The positions that :func:`encode` wrote, int64 [links], strictly ascending and below ``size``.

    Raises:
        ConfigurationError: anything else, with what is wrong.
    """
    if not 0 <= low_bits <= MOST_LOW_BITS:
        raise ConfigurationError(f"low_bits={low_bits}; accepted are 0 to {MOST_LOW_BITS}.")
    ends = np.flatnonzero(np.unpackbits(high.numpy()))
    bits = np.unpackbits(low.numpy())
    if len(ends) != links or not links * low_bits <= len(bits) < links * low_bits + 8:
        raise ConfigurationError(
            f"index lists of {len(ends)} links, with {len(bits)} low bits; accepted are {links} links, with {low_bits} "
            "low bits each."
        )
    rests: npt.NDArray[np.int64] = np.diff(ends, prepend=-1) - 1
    lows = bits[: links * low_bits].reshape(links, low_bits) @ (np.int64(1) << np.arange(low_bits))
    positions = np.cumsum((rests << low_bits) + lows + 1) - 1
    if links and not positions[-1] < size:
        raise ConfigurationError(f"index lists up to position {positions[-1]}; accepted are positions below {size}.")
    return torch.from_numpy(positions.astype(np.int64))
