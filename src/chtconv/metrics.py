"""Numbers that describe a sparse topology."""

from typing import Any

from torch import Tensor

from chtconv.layers import SparseLayer


def layer_stats(layer: SparseLayer) -> dict[str, Any]:
    """Links, size, density, sparsity, ITOP rate and empty slices of a layer.

    ``itop`` is the share of all links that were ever active (in-time over-parametrisation); ``empty_slices`` the
    share of (kernel, input channel) pairs without any link.
    """
    mask = layer.mask
    links, size, explored = int(mask.sum()), mask.numel(), int(layer.explored.sum())
    return {
        "shape": list(mask.shape),
        "links": links,
        "size": size,
        "density": links / size,
        "sparsity": 1 - links / size,
        "itop": explored / size,
        "explored": explored,
        "empty_slices": float(empty_slices(mask)),
    }


def overall_stats(by_layer: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The same over all layers, each weighted by its size."""
    links, size, explored = (sum(stats[key] for stats in by_layer.values()) for key in ("links", "size", "explored"))
    return {
        "links": links,
        "size": size,
        "density": links / size,
        "sparsity": 1 - links / size,
        "itop": explored / size,
    }


def empty_slices(mask: Tensor) -> Tensor:
    """Share of the slices (kernel, input channel) of a mask [O, C, *kernel] without any link."""
    return (~mask.flatten(2).any(dim=2)).float().mean()
