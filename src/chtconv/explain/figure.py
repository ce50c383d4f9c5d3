"""The statistics of layers as a picture: a row a layer. matplotlib is imported only to draw."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from chtconv.errors import ConfigurationError
from chtconv.explain.statistics import ScoreStatistics
from chtconv.extras import need
from chtconv.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
_COLORS = "viridis"  # readable without colour vision, and in grey
_BRIGHTEST = 0.995
_NONE = "0.85"  # places without any disabled position
_BARS = {"slice": "occupancy", "input\nchannel": "input_degree", "both": "both"}


def check_drawable(out: Path) -> None:
    """Refuses, before anything is computed, a picture that could not be drawn.

    Raises:
        ConfigurationError: another format, or no matplotlib.
    """
    if out.suffix.lower() not in FORMATS:
        raise ConfigurationError(f"--out {str(out)!r}: accepted is a file that ends in {', '.join(FORMATS)}.")
    need("--out", "matplotlib", extra="plot")


def save(found: Mapping[str, ScoreStatistics], out: Path) -> None:
    """Draws the statistics of layers by name into a file, whose format is that of its suffix.

    Raises:
        ConfigurationError: as :func:`check_drawable`.
        StorageError: the file cannot be written.
    """
    check_drawable(out)
    buffer = io.BytesIO()
    draw(found).savefig(buffer, format=out.suffix.lower()[1:], dpi=110)
    write_atomically(out, buffer.getvalue())


def draw(found: Mapping[str, ScoreStatistics]) -> "Figure":
    """The figure: for each layer scores by kernel position, by slice, their histogram, and what explains them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.6 * len(found)), layout="constrained")
    some = next(iter(found.values()))
    figure.suptitle(f"Link scores of disabled positions: {some.predictor} on the {some.graph} graph")
    rows = figure.subplots(len(found), 4, squeeze=False, width_ratios=[1, 1.2, 1.2, 0.9])
    for row, (name, statistics) in zip(rows, found.items(), strict=True):
        title = f"{name.removesuffix('.weight')}  ({statistics.links:,} links)"
        _positions(row[0], statistics, title)
        _slices(row[1], statistics)
        _histogram(row[2], statistics)
        _explained(row[3], statistics)
    return figure


def _heat_map(axes: "Axes", values: np.ndarray, *, aspect: Literal["equal", "auto"]) -> None:
    from matplotlib import colormaps

    # The scale starts at 0, the lowest score there is: a map that is nearly even must look so.
    # It ends where 1 place in 200 lies above, so that a few do not leave all others dark.
    known = values[np.isfinite(values)]
    highest = float(known.max(initial=0))
    high = float(np.quantile(known, _BRIGHTEST, method="higher")) or highest if known.size else 0.0
    extend: Literal["max", "neither"] = "max" if highest > high else "neither"
    colors = colormaps[_COLORS].with_extremes(bad=_NONE)
    image = axes.imshow(values, aspect=aspect, cmap=colors, vmin=0, vmax=high or 1.0)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label="mean score", extend=extend)


def _positions(axes: "Axes", found: ScoreStatistics, title: str) -> None:
    kernel = found.means.position.numpy()
    values = kernel.reshape(-1, kernel.shape[-1] if kernel.ndim else 1)
    _heat_map(axes, values, aspect="equal")
    axes.set_title(title, loc="left")
    axes.set_xlabel("kernel column")
    axes.set_ylabel("kernel row" if kernel.ndim < 3 else "kernel depth and row")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    if values.size > 25:
        return
    middle = np.nanmax(values, initial=0) / 2
    for (row, column), value in np.ndenumerate(values):
        color = "black" if not value < middle else "white"
        axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=color)


def _slices(axes: "Axes", found: ScoreStatistics) -> None:
    _heat_map(axes, found.means.slice.numpy(), aspect="auto")
    grouped = found.means.slice.shape[1] != len(found.means.input_channel)
    axes.set_title("mean over kernel positions")
    axes.set_xlabel("input channel of the group" if grouped else "input channel")
    axes.set_ylabel("output channel")
    _count(axes, "x")
    _count(axes, "y")


def _histogram(axes: "Axes", found: ScoreStatistics) -> None:
    axes.set_title(f"{found.zero_scores:.1%} of {found.candidates:,} scores are 0 (not drawn)")
    axes.set_xlabel("positive score")
    axes.set_ylabel("disabled positions")
    if found.spread is None:
        axes.text(0.5, 0.5, "no positive score", ha="center", va="center", transform=axes.transAxes)
        return
    axes.stairs(found.spread.counts.numpy(), found.spread.edges.numpy(), fill=True, color="#31688e")
    axes.axvline(found.spread.quartiles[2], color="black", linestyle="--", label="median")
    axes.set_ylim(bottom=0)
    _count(axes, "y")
    axes.legend(frameon=False)


def _count(axes: "Axes", which: Literal["x", "y"]) -> None:
    """Ticks at whole numbers only, also where there are few."""
    from matplotlib.ticker import MaxNLocator

    (axes.xaxis if which == "x" else axes.yaxis).set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


def _explained(axes: "Axes", found: ScoreStatistics) -> None:
    values = [getattr(found.explained, name) for name in _BARS.values()]
    bars = axes.bar(list(_BARS), [value or 0 for value in values], color="#31688e")
    axes.bar_label(bars, ["none" if value is None else f"{value:.2f}" for value in values], padding=2)
    axes.set_ylim(0, 1.1)
    axes.set_title(f"effective candidates {found.effective_candidates:.1%}")
    axes.set_xlabel("number of links of")
    axes.set_ylabel("R² of scores within kernels")
