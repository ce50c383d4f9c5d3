"""Degrees of channels: how many links leave an input channel and enter a kernel, beside random placement."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import numpy as np
from matplotlib.axes import Axes

from chtconv.report.figures.layers import Layers, Runs, by_name, grey_line, layer_lines, layouts
from chtconv.report.figures.picture import Panel, Picture, draw, listed, short
from chtconv.report.masks import LayerLinks
from chtconv.report.placement import random_kernels, random_sources, random_variance
from chtconv.report.series import Values

_GRID: Final = np.linspace(0, 3, 121)  # multiples of the mean degree; a step that includes 1 exactly


def sources(panel: Panel, links: Mapping[str, Runs]) -> Picture:
    """The distribution of the links that leave an input channel."""
    return _cumulative(panel, links, "sources", "an input channel", lambda layer: layer.sources, random_sources)


def kernels(panel: Panel, links: Mapping[str, Runs]) -> Picture | None:
    """The distribution of the links of a kernel; None where every kernel of a layer has the same number."""
    if all(layer.per_kernel for runs in links.values() for layers in runs for layer in layers):
        return None
    return _cumulative(panel, links, "kernels", "a kernel", lambda layer: layer.kernels, random_kernels)


def _cumulative(
    panel: Panel,
    links: Mapping[str, Runs],
    key: str,
    what: str,
    degrees: Callable[[LayerLinks], np.ndarray],
    expected: Callable[[LayerLinks, Values], Values],
) -> Picture:
    """The share of channels with at most so many times the mean of their layer, over all layers and runs."""
    found = {
        variant: _shares([degrees(layer) for layers in runs for layer in layers]) for variant, runs in links.items()
    }
    chance = {label: _expected(layers, degrees, expected) for label, layers in layouts(links).items()}

    def paint(axes: Axes) -> None:
        for index, (label, shares) in enumerate(chance.items()):
            grey_line(axes, index, _GRID, 100 * shares, label)
        for index, (variant, shares) in enumerate(found.items()):
            line = panel.styles[variant].line | {"markevery": (4 * index % 20, 20)}
            axes.plot(_GRID, 100 * shares, **line, label=short(variant))
        axes.set(xlim=(0, _GRID[-1]), ylim=(0, 101))

    none = {variant: 100 * float(shares[0]) for variant, shares in found.items()}
    return Picture(
        draw(
            f"{panel.key}{key}", paint, title=f"Links of {what}, {panel.title}", y="channels with at most as many, %",
            x=f"links of {what}, as a multiple of its layer's mean",
        ),
        f"Cumulative distribution of the links of {what} at {panel.title}. Without any link: {listed(none, '%', 1)}.",
        f"Share of the channels with at most so many links of {what} at {panel.title}: a flatter curve than the grey "
        "one of random placement means that some channels have gathered links and others have lost theirs.",
    )  # fmt: skip


def _shares(degrees: Iterable[np.ndarray]) -> Values:
    relative = np.concatenate([counts / counts.mean() for counts in degrees if counts.any()] or [np.ones(1)])
    return np.searchsorted(np.sort(relative), _GRID + 1e-9, side="right") / len(relative)


def _expected(
    layers: Layers, degrees: Callable[[LayerLinks], np.ndarray], expected: Callable[[LayerLinks, Values], Values]
) -> Values:
    known = [layer for layer in layers if layer.links]
    channels = [len(degrees(layer)) for layer in known]
    return np.average([expected(layer, _GRID) for layer in known], axis=0, weights=channels)


def spread_by_layer(panel: Panel, links: Mapping[str, Runs]) -> Picture:
    """How much the links of input channels differ, by layer."""
    values = {variant: _roots(by_name(runs, _variance)) for variant, runs in links.items()}
    chance = {label: _roots(by_name([layers], random_variance)) for label, layers in layouts(links).items()}
    means = {label: 100 * float(np.mean(list(found.values()))) for label, found in (values | chance).items()}

    def paint(axes: Axes) -> None:
        layer_lines(axes, panel, values, chance)
        axes.set_ylim(bottom=0)

    return Picture(
        draw(
            f"{panel.key}spread",
            paint,
            title=f"Unequal input channels, {panel.title}",
            x="layer",
            y="deviation / mean degree, %",
        ),
        "Line chart: standard deviation of the links of input channels, as a share of their mean, by layer at "
        f"{panel.title}. Means over layers: {listed(means, '%', 1)}.",
        f"How unequal the input channels of a layer are in links at {panel.title}, as standard deviation by mean: the "
        "grey line is random placement, and far above it few channels feed most kernels.",
    )


def _variance(layer: LayerLinks) -> float:
    return float(layer.sources.var() / layer.sources.mean() ** 2) if layer.links else 0.0


def _roots(variances: Mapping[str, float]) -> dict[str, float]:
    """Of means over runs: the mean of the roots would be smaller than what is expected of a random placement."""
    return {name: math.sqrt(variance) for name, variance in variances.items()}
