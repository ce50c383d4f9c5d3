"""What random placement of the same links would give: the yardstick for where links went.

Links are placed evenly: within each kernel where every kernel has the same number, else within the layer. A slice of K
positions then holds a hypergeometric number of them, of which the binomial with the layer's density is the limit for
many input channels.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from chtconv.report.masks import LayerLinks

Shares = NDArray[np.float64]


def random_slices(layer: LayerLinks) -> Shares:
    """Expected number of slices with 0, 1, ... K links.

    >>> from chtconv.report.masks import layer_links
    >>> mask = np.ones((2, 3, 3, 3), dtype=bool)
    >>> random_slices(layer_links("full", mask)).round(6).tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 6.0]
    """
    kernels, channels = layer.shape[:2]
    positions = layer.positions.size
    counts = np.arange(positions + 1)
    if not layer.per_kernel:
        whole = kernels * channels * positions
        return np.asarray(kernels * channels * stats.hypergeom(whole, positions, layer.links).pmf(counts))
    expected = np.zeros(positions + 1)
    for links, number in zip(*np.unique(layer.kernels, return_counts=True), strict=True):
        expected += number * channels * stats.hypergeom(channels * positions, positions, links).pmf(counts)
    return expected


def random_sources(layer: LayerLinks, at_most: Shares) -> Shares:
    """Expected share of input channels with at most so many links, each count a multiple of the layer's mean."""
    kernels, channels = layer.shape[:2]
    return _at_most(layer, kernels * layer.positions.size, at_most * layer.links / channels)


def random_kernels(layer: LayerLinks, at_most: Shares) -> Shares:
    """The same of kernels: all at the mean where each has the same number of links."""
    kernels, channels = layer.shape[:2]
    if layer.per_kernel:
        return (at_most >= 1).astype(np.float64)
    return _at_most(layer, channels * layer.positions.size, at_most * layer.links / kernels)


def random_variance(layer: LayerLinks) -> float:
    """Expected variance of the links of input channels, as a share of their squared mean."""
    kernels, channels = layer.shape[:2]
    links, parts = (layer.kernels, kernels) if layer.per_kernel else (np.array([layer.links]), 1)
    places = kernels * channels * layer.positions.size // parts
    # Of hypergeometric distributions; scipy's own would compute their skewness too, and divide by zero.
    variance = np.sum(links / channels * (1 - 1 / channels) * (places - links) / max(1, places - 1))
    return float(variance) / (layer.links / channels) ** 2 if layer.links else 0.0


def _at_most(layer: LayerLinks, part: int, counts: Shares) -> Shares:
    """Of the part of a layer's positions that one channel or kernel has."""
    kernels, channels = layer.shape[:2]
    whole = kernels * channels * layer.positions.size
    # A mean times a multiple may fall short of a whole number by rounding.
    return np.asarray(stats.hypergeom(whole, part, layer.links).cdf(np.floor(counts + 1e-9)))
