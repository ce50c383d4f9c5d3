"""Conversion between [N, C, H, W] and blocks [ceil(N / 16), C, H, W, 16], outside of autograd."""

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError
from chtconv.sparse_compute.library import Library, library
from chtconv.sparse_compute.memory import empty

LANES = 16
# The least batch that travels in blocks: smaller ones would leave most lanes empty.
BLOCKED_FROM = LANES // 2


def kernels() -> Library:
    """The compiled kernels.

    Raises:
        ConfigurationError: there are none.
    """
    found = library()
    if found is None:
        raise ConfigurationError(
            "the blocked layout needs the compiled kernels, and there are none: accepted are ordinary tensors."
        )
    return found


def to_blocks(x: Tensor) -> Tensor:
    """[N, C, H, W] of any strides, float32 or float64, to blocks; lanes beyond N are 0."""
    n, c, h, w = x.shape
    # Some views of complex numbers are negated when they are read.
    x = x.resolve_neg()
    blocks = empty((-(-n // LANES), c, h, w, LANES), x.dtype)
    kernels().call("to_blocks", x.dtype, n, c, h, w, *x.stride(), x, blocks)
    return blocks


def to_strided(blocks: Tensor, batch: int, out: Tensor | None = None) -> Tensor:
    """Blocks to [N, C, H, W], contiguous; always a copy.

    Args:
        blocks: [B, C, H, W, 16], contiguous.
        batch: N.
        out: where to write it, of any strides and the same type, instead of to a new tensor.
    """
    _, c, h, w, _ = blocks.shape
    if out is None:
        out = empty((batch, c, h, w), blocks.dtype)
    kernels().call("from_blocks", blocks.dtype, batch, c, h, w, *out.stride(), blocks, out)
    return out


def lanes_first(blocks: Tensor, batch: int) -> Tensor:
    """Blocks [B, C, 1, 1, 16] to [N, C], contiguous."""
    b, c = blocks.shape[:2]
    return blocks.view(b, c, LANES).transpose(1, 2).reshape(b * LANES, c)[:batch].contiguous()


def like(blocks: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised blocks of the same shape."""
    return empty(blocks.shape, dtype or blocks.dtype)
