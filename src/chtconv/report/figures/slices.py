"""How links share slices: the distribution of links a slice, and empty slices by layer, beside random placement."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import numpy as np
from matplotlib.axes import Axes

from chtconv.report.figures.layers import Runs, beside, by_name, grey_line, layer_lines, layouts
from chtconv.report.figures.picture import Panel, Picture, draw, listed, short
from chtconv.report.masks import LayerLinks
from chtconv.report.placement import random_slices
from chtconv.report.series import Values

_LEAST: Final = 1e-3  # percent, the lowest share that the logarithmic axis shows


def distribution(panel: Panel, links: Mapping[str, Runs]) -> Picture | None:
    """Slices with 0, 1, ... K links as a share of all, over the layers whose K is the most frequent."""
    positions = _kernel_size(links)
    if positions < 2:
        return None
    shares = {variant: _pooled(_of(runs, positions), lambda layer: layer.slices) for variant, runs in links.items()}
    chance = {label: _pooled(_of([layers], positions), random_slices) for label, layers in layouts(links).items()}
    counts = np.arange(positions + 1.0)

    def paint(axes: Axes) -> None:
        for index, (label, found) in enumerate(chance.items()):
            grey_line(axes, index, counts, _positive(found), label)
        for index, (variant, found) in enumerate(shares.items()):
            line = panel.styles[variant].line
            axes.plot(counts + beside(index, len(shares)), _positive(found), **line, label=short(variant))
        axes.set_yscale("log")
        lowest = min(float(np.nanmin(_positive(found))) for found in shares.values())
        axes.set_ylim(max(_LEAST, 0.5 * lowest), 150)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xticks(counts[:: max(1, len(counts) // 9)])

    empty = {variant: 100 * float(found[0]) for variant, found in (shares | chance).items()}
    return Picture(
        draw(
            f"{panel.key}slices",
            paint,
            title=f"Links a slice, {panel.title}",
            x=f"links in a slice (of {positions})",
            y="slices, %",
        ),
        f"Line chart on a logarithmic scale: share of slices by their number of links at {panel.title}. Empty: "
        f"{listed(empty, '%', 1)}.",
        f"Share of the slices (pairs of kernel and input channel) with so many links at {panel.title}, on a "
        "logarithmic scale: above the grey line there are more such slices than random placement gives.",
    )


def empty_by_layer(panel: Panel, links: Mapping[str, Runs]) -> Picture | None:
    """Slices without any link by layer."""
    if _kernel_size(links) < 2:
        return None
    values = {variant: by_name(runs, lambda layer: _empty(layer.slices)) for variant, runs in links.items()}
    chance = {
        label: by_name([layers], lambda layer: _empty(random_slices(layer))) for label, layers in layouts(links).items()
    }
    means = {label: 100 * float(np.mean(list(found.values()))) for label, found in (values | chance).items()}

    def paint(axes: Axes) -> None:
        layer_lines(axes, panel, values, chance)

    return Picture(
        draw(f"{panel.key}empty", paint, title=f"Empty slices, {panel.title}", x="layer", y="empty slices, %"),
        f"Line chart: share of empty slices by layer at {panel.title}. Means over layers: {listed(means, '%', 1)}.",
        f"Share of the slices without any link by layer, counted from the input, at {panel.title}: above the grey line "
        "links are concentrated in fewer slices than at random.",
    )


def _kernel_size(links: Mapping[str, Runs]) -> int:
    """The most frequent number of kernel positions among layers, kernels of one position aside; 0 without any."""
    sizes = Counter(layer.positions.size for runs in links.values() for layer in runs[0] if layer.positions.size > 1)
    return sizes.most_common(1)[0][0] if sizes else 0


def _of(runs: Runs, positions: int) -> list[LayerLinks]:
    return [layer for layers in runs for layer in layers if layer.positions.size == positions]


def _pooled(layers: Iterable[LayerLinks], slices: Callable[[LayerLinks], np.ndarray]) -> Values:
    total = np.sum([slices(layer) for layer in layers], axis=0)
    return np.asarray(total / total.sum())


def _empty(slices: np.ndarray) -> float:
    return float(slices[0] / slices.sum())


def _positive(shares: Values) -> Values:
    """In percent; what a logarithmic axis cannot show is NaN."""
    return np.where(100 * shares > _LEAST, 100 * shares, np.nan)
