"""Where in the kernel links lie: the share of links at each kernel position, of all layers and of each."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from chtconv.report.figures.picture import Panel, Picture, short
from chtconv.report.figures.style import WIDTH
from chtconv.report.figures.svg import drawn
from chtconv.report.masks import LayerLinks
from chtconv.report.series import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS: Final = "cividis"  # even in lightness: readable in grey, and with any colour vision
_COLUMNS: Final = 5
_TAIL: Final = 0.05

Runs = Sequence[Sequence[LayerLinks]]


def pictures(panel: Panel, links: Mapping[str, Runs]) -> list[Picture]:
    """A picture a variant, all on one scale; none for layers of 1x1 kernels.

    Args:
        panel: whose groups are drawn.
        links: the layers of each complete run, by variant.
    """
    shares = {variant: _shares(runs, panel.layers) for variant, runs in links.items()}
    shares = {variant: found for variant, found in shares.items() if found}
    if not shares:
        return []
    scale = _scale([layer for found in shares.values() for layer in found.values()])
    return [_picture(panel, variant, found, scale, len(links[variant])) for variant, found in shares.items()]


def _shares(runs: Runs, layers: Mapping[str, int]) -> dict[int, tuple[Values, int]]:
    """By number of the layer: the share of links at each position, in percent, and their number over all runs."""
    found: dict[int, Values] = {}
    for layer in (layer for run in runs for layer in run):
        number = layers.get(layer.name)
        if number is not None and layer.positions.size > 1 and layer.links:
            found[number] = found.get(number, np.zeros(layer.positions.shape)) + layer.positions
    return {number: (100 * total / total.sum(), int(total.sum())) for number, total in sorted(found.items())}


def _scale(layers: Sequence[tuple[Values, int]]) -> tuple[float, float]:
    """Where 5% of the links lie below and above: layers of few links vary by chance, and must not set the scale."""
    values = np.concatenate([shares.ravel() for shares, _ in layers])
    weights = np.concatenate([np.full(shares.size, links / shares.size) for shares, links in layers])
    order = np.argsort(values)
    below = np.cumsum(weights[order]) / weights.sum()
    low, high = (float(values[order][np.searchsorted(below, tail)]) for tail in (_TAIL, 1 - _TAIL))
    return (low, high) if high - low > 0.5 else (low - 0.5, high + 0.5)


def _picture(
    panel: Panel, variant: str, found: dict[int, tuple[Values, int]], scale: tuple[float, float], runs: int
) -> Picture:
    key = f"{panel.key}v{list(panel.styles).index(variant)}"
    whole = _pooled(found)
    even = 100 / whole.size
    words = "; ".join(", ".join(f"{value:.1f}" for value in row) for row in np.atleast_2d(whole))
    maps = {number: values for number, (values, _) in found.items()}
    return Picture(
        _drawn(key, f"{short(variant, 36)}, {panel.title}", whole, maps, scale),
        f"Heat maps of the share of links at each kernel position for {variant} at {panel.title}. All layers, row by "
        f"row, in percent: {words}.",
        f"Share of the links of {variant} at each kernel position, all layers (large) and each layer by its number: "
        f"random placement gives {even:.1f}% everywhere ({'mean of ' if runs > 1 else ''}{runs} "
        f"{'seeds' if runs > 1 else 'seed'}).",
    )


def _pooled(found: dict[int, tuple[Values, int]]) -> Values:
    """The shares over all layers whose kernel has the shape that most links are in."""
    by_shape: dict[tuple[int, ...], list[tuple[Values, int]]] = {}
    for shares, links in found.values():
        by_shape.setdefault(shares.shape, []).append((shares, links))
    chosen = max(by_shape.values(), key=lambda layers: sum(links for _, links in layers))
    return np.asarray(sum(shares * links for shares, links in chosen) / sum(links for _, links in chosen))


def _drawn(key: str, title: str, whole: Values, layers: Mapping[int, Values], scale: tuple[float, float]) -> str:
    rows = max(2, -(-len(layers) // _COLUMNS))

    def paint(figure: "Figure") -> None:
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        grid = figure.add_gridspec(rows, _COLUMNS + 1, width_ratios=[2.6, *[1] * _COLUMNS])
        large = figure.add_subplot(grid[:, 0])
        image = _map(large, "all layers", whole, scale)
        _numbers(large, whole, scale)
        bar = figure.colorbar(image, ax=large, location="bottom", label="links, %", extend="both", fraction=0.07)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
        for index, (number, values) in enumerate(layers.items()):
            _map(figure.add_subplot(grid[index // _COLUMNS, index % _COLUMNS + 1]), str(number), values, scale)

    return drawn(key, WIDTH, 0.4 + 0.62 * rows, paint)


def _map(axes: "Axes", title: str, values: Values, scale: tuple[float, float]) -> Any:
    flat = values.reshape(-1, values.shape[-1])
    axes.grid(visible=False)
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=7.5, loc="center", pad=2)
    return axes.pcolormesh(flat, cmap=_COLORS, vmin=scale[0], vmax=scale[1], edgecolors="white", linewidth=0.4)


def _numbers(axes: "Axes", values: Values, scale: tuple[float, float]) -> None:
    flat = values.reshape(-1, values.shape[-1])
    if flat.size > 25:
        return
    for (row, column), value in np.ndenumerate(flat):
        color = "#ffffff" if value < sum(scale) / 2 else "#000000"
        axes.text(column + 0.5, row + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=7.5, color=color)
