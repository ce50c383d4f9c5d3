"""Tensors in the blocked layout, and when they are what ordinary tensors would be."""

import torch
from torch.nn import functional as F  # noqa: N812

from chtconv.sparse_compute.blocked import Blocked, to_blocked, to_dense

TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}


def spoil(x):
    """Lanes that hold no image become NaN."""
    if isinstance(x, Blocked) and x.shape[0] % 16:
        x.blocks[-1, ..., x.shape[0] % 16 :] = float("nan")
    return x


def blocked(x):
    return spoil(to_blocked(x))


def close(actual, expected):
    actual = actual.detach()
    torch.testing.assert_close(to_dense(actual), expected.detach(), **TOLERANCE[expected.dtype])


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm(x):
    return F.batch_norm(x, None, None, training=True)
