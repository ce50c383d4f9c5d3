"""Lines over time and over layers: means over seeds with bands of their standard errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from chtconv.report.figures.picture import Panel, Picture, draw, listed, short
from chtconv.report.run import Row, Run
from chtconv.report.series import Course, Mean, evolutions, mean_of, thinned

_MARKERS_A_LINE: Final = 6


@dataclass(frozen=True)
class Quantity:
    """A share that is drawn over epochs.

    Attributes:
        key: a word that no other kind of figure has.
        name: how it is called.
        label: of the axis, with its unit.
        value: the share, from the rows of all layers at an evolution.
        caption: how to read it; ``{panel}`` stands for the panel's title.
    """

    key: str
    name: str
    label: str
    value: Callable[[Sequence[Row]], float]
    caption: str


def over_time(panel: Panel, quantity: Quantity) -> Picture | None:
    """A quantity of the complete runs over epochs; None where no run of the panel has it."""
    means = group_means(panel, lambda run: evolutions(run, quantity.value))
    if not means:
        return None

    def paint(axes: Axes) -> None:
        for variant, mean in means.items():
            band(axes, panel, variant, mean, scale=100)
        whole_numbers(axes)

    last = {variant: 100 * last_known(mean) for variant, mean in means.items()}
    return Picture(
        draw(f"{panel.key}{quantity.key}", paint, title=f"{quantity.name}, {panel.title}", x="epoch", y=quantity.label),
        f"Line chart: {quantity.name} over epochs at {panel.title}. At the end: {listed(last, '%', 1)}.",
        quantity.caption.format(panel=panel.title),
    )


def group_means(panel: Panel, value: Callable[[Run], Course]) -> dict[str, Mean]:
    """The mean over the complete runs of each group that has one, by variant."""
    found = {group.variant: mean_of([value(run) for run in group.done]) for group in panel.groups}
    return {variant: mean for variant, mean in found.items() if mean}


def band(axes: Axes, panel: Panel, variant: str, mean: Mean, *, scale: float = 1.0) -> None:
    """A mean with the band of its standard error."""
    style, few = panel.styles[variant], thinned(mean)
    every = max(1, len(few.x) // _MARKERS_A_LINE)
    # Markers of lines that lie on each other stand beside each other.
    start = list(panel.styles).index(variant) % every
    axes.plot(few.x, scale * few.mean, **style.line, markevery=(start, every), label=short(variant))
    if np.isfinite(few.error).any():
        low, high = few.mean - few.error, few.mean + few.error
        axes.fill_between(few.x, scale * low, scale * high, color=style.color, alpha=0.18, linewidth=0)


def whole_numbers(axes: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers only, also where there are few."""
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))


def last_known(mean: Mean) -> float:
    """The last value that is one; NaN where none is."""
    known = mean.mean[np.isfinite(mean.mean)]
    return float(known[-1]) if len(known) else np.nan
