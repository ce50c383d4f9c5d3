"""Figures by layer, and the grey lines behind them: what random placement of the same links gives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes

from chtconv.report.figures.lines import whole_numbers
from chtconv.report.figures.picture import Panel, short
from chtconv.report.figures.style import GREY
from chtconv.report.masks import LayerLinks
from chtconv.report.series import Values

Layers = Sequence[LayerLinks]
Runs = Sequence[Layers]
MOST_LAYOUTS: Final = 3
_TOLERANCE: Final = 0.1
_SIDEWAYS: Final = 0.3
_DASHES: Final = ("-", (0, (3, 1)), (0, (1, 0.6)))


def layouts(links: Mapping[str, Runs]) -> dict[str, Layers]:
    """The layers of one run for each distribution of links over layers, by the label of its grey line.

    Variants whose layers differ by less than a tenth in their links share one. Of more than
    :data:`MOST_LAYOUTS` the others get no line.
    """
    found: list[tuple[str, Layers]] = []
    for variant, runs in links.items():
        if not any(_alike(runs[0], layers) for _, layers in found):
            found.append((variant, runs[0]))
    if len(found) == 1:
        return {"random placement": found[0][1]}
    return {f"random, as many links as {short(variant, 24)}": layers for variant, layers in found[:MOST_LAYOUTS]}


def by_name(runs: Runs, value: Callable[[LayerLinks], float]) -> dict[str, float]:
    """A value of each layer by its name, mean over the runs."""
    found: dict[str, list[float]] = {}
    for layer in (layer for layers in runs for layer in layers):
        found.setdefault(layer.name, []).append(value(layer))
    return {name: float(np.mean(values)) for name, values in found.items()}


def layer_lines(
    axes: Axes, panel: Panel, values: Mapping[str, Mapping[str, float]], chance: Mapping[str, Mapping[str, float]]
) -> None:
    """Shares by layer in percent, by variant: markers that thin lines hold together, and grey lines of chance."""
    for index, (label, layers) in enumerate(chance.items()):
        x, y = _numbered(panel, layers)
        grey_line(axes, index, x, 100 * y, label)
    for index, (variant, layers) in enumerate(values.items()):
        x, y = _numbered(panel, layers)
        line = panel.styles[variant].line
        axes.plot(x + beside(index, len(values)), 100 * y, **line, linewidth=0.9, label=short(variant))
    whole_numbers(axes)


def beside(index: int, number: int) -> float:
    """How far to the side the marks of a variant stand, so that equal ones do not hide each other.

    >>> [beside(index, 3) for index in range(3)]
    [-0.15, 0.0, 0.15]
    """
    return round(_SIDEWAYS * (index - (number - 1) / 2) / max(1, number - 1), 6)


def grey_line(axes: Axes, index: int, x: Values, y: Values, label: str) -> None:
    """A broad grey line behind the others."""
    dashes = _DASHES[index % len(_DASHES)]
    axes.plot(x, y, color=GREY, linewidth=4, alpha=0.45, zorder=1, label=label, linestyle=dashes)


def _numbered(panel: Panel, layers: Mapping[str, float]) -> tuple[Values, Values]:
    known = sorted((panel.layers[name], value) for name, value in layers.items() if name in panel.layers)
    return np.array([float(number) for number, _ in known]), np.array([value for _, value in known])


def _alike(a: Layers, b: Layers) -> bool:
    if [layer.shape for layer in a] != [layer.shape for layer in b]:
        return False
    pairs = [(one.links, other.links) for one, other in zip(a, b, strict=True)]
    return all(abs(one - other) <= _TOLERANCE * max(one, other) for one, other in pairs)
