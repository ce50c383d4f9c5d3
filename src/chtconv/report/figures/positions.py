"""Where in the kernel links lie: the share of links at each kernel position, of all layers and of each."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from chtconv.report.figures.picture import Panel, Picture, short
from chtconv.report.figures.style import WIDTH
from chtconv.report.figures.svg import drawn
from chtconv.report.masks import LayerLinks
from chtconv.report.series import Values

_COLORS: Final = "cividis"  # even in lightness: readable in grey, and with any colour vision
_COLUMNS: Final = 5
_SMALL, _LARGE, _GAP = 3.0, 8.6, 1.6
_MOST_NUMBERS: Final = 25
_TAIL: Final = 0.05
_TURN: Final = 0.47  # share of the scale at which white and black letters are as easy to read, at 4.5 to 1

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
    """All maps in one pair of axes, in units of a cell of a small map: many axes would take seconds."""
    across = _LARGE + _GAP + _COLUMNS * (_SMALL + 1)
    down = max(-(-len(layers) // _COLUMNS) * (_SMALL + _GAP), _LARGE + 3 * _GAP)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(xlim=(0, across), ylim=(down, 0), aspect="equal", anchor="NW")
        axes.set_axis_off()
        axes.set_title(title)
        cells = [*_cells(whole, 0, _GAP, _LARGE)]
        axes.text(_LARGE / 2, 0.8 * _GAP, "all layers", ha="center", fontsize=7.5)
        for index, (number, values) in enumerate(layers.items()):
            x = _LARGE + _GAP + index % _COLUMNS * (_SMALL + 1)
            y = index // _COLUMNS * (_SMALL + _GAP)
            axes.text(x + _SMALL / 2, y + 0.8 * _GAP, str(number), ha="center", fontsize=7.5)
            cells += _cells(values, x, y + _GAP, _SMALL)
        maps = PolyCollection(
            [corners for corners, _ in cells], cmap=_COLORS, norm=Normalize(*scale), edgecolors="white", linewidths=0.4
        )
        maps.set_array(np.array([value for _, value in cells]))
        axes.add_collection(maps)
        _numbers(axes, whole, scale)
        bar = axes.inset_axes((0, _LARGE + 1.6 * _GAP, _LARGE, 0.8), transform=axes.transData)
        figure.colorbar(maps, cax=bar, orientation="horizontal", label="links, %", extend="both")
        bar.tick_params(labelsize=7)

    return drawn(key, WIDTH, 0.35 + down * WIDTH / across, paint)


def _cells(values: Values, left: float, top: float, size: float) -> Iterator[tuple[list[tuple[float, float]], float]]:
    """The corners of each cell of a map and its value; the longer side of the map has this size."""
    flat = values.reshape(-1, values.shape[-1])
    step = size / max(flat.shape)
    for (row, column), value in np.ndenumerate(flat):
        x, y = left + column * step, top + row * step
        yield [(x, y), (x + step, y), (x + step, y + step), (x, y + step)], float(value)


def _numbers(axes: Axes, values: Values, scale: tuple[float, float]) -> None:
    """The values in the large map, where there is room."""
    if values.size > _MOST_NUMBERS:
        return
    turn = scale[0] + _TURN * (scale[1] - scale[0])
    for corners, value in _cells(values, 0, _GAP, _LARGE):
        color = "#ffffff" if value < turn else "#000000"
        x, y = np.mean(corners, axis=0)
        axes.text(x, y, f"{value:.1f}", ha="center", va="center_baseline", fontsize=7.5, color=color)
