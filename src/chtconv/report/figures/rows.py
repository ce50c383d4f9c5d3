"""Charts with a row for each variant: marks of every run, and what their labels need."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Final

import numpy as np
from matplotlib.axes import Axes

from chtconv.report.figures.picture import Panel, draw, short
from chtconv.report.series import Values

ROW: Final = 24  # characters of a line of a label


def dots(panel: Panel, key: str, values: Mapping[str, Values], *, title: str, x: str, from_zero: bool = False) -> str:
    """A mark a run and an upright line at the mean of its row, as SVG.

    Args:
        panel: whose styles are taken.
        key: a word that no other figure of the panel has.
        values: of the runs of each variant.
        title: above the axes.
        x: label of the axis with its unit.
        from_zero: whether the axis begins at 0.
    """

    def paint(axes: Axes) -> None:
        for index, (variant, found) in enumerate(values.items()):
            style = panel.styles[variant]
            axes.plot(found, np.full(len(found), index), style.marker, color=style.color, markerfacecolor="none")
            axes.plot([found.mean()] * 2, [index - 0.32, index + 0.32], color=style.color, linewidth=2)
        if from_zero:
            axes.set_xlim(0, 1.08 * max(float(found.max()) for found in values.values()))
        label_rows(axes, list(values))

    height = rows_height(len(values))
    return draw(f"{panel.key}{key}", paint, title=title, x=x, y="", height=height, legend=False)


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of the rows, the first one on top; long ones in two lines."""
    axes.set_yticks(range(len(names)), ["\n".join(two_lines(name)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def two_lines(name: str) -> list[str]:
    """As much of a name as two lines hold; more would reach into the next row.

    >>> two_lines("SET, ERK"), two_lines("CHTs, allocation layer, all windows, smoothing 0.5")
    (['SET, ERK'], ['CHTs, allocation layer,…', 'windows, smoothing 0.5'])
    """
    cut = (wrap(short(name, most), ROW) for most in range(2 * ROW, 0, -1))
    return next(lines for lines in cut if len(lines) <= 2)


def rows_height(number: int, lines: int = 2) -> float:
    """Inches of a chart with so many rows, whose labels have so many lines at most."""
    return 0.95 + 0.14 * lines * number
