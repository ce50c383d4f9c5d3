"""What runs cost: seconds of training, evolution and evaluation, and images per second."""

from typing import Final

import numpy as np
from matplotlib.axes import Axes

from chtconv.report.figures.picture import Panel, Picture, draw, listed, panels
from chtconv.report.figures.rows import dots, label_rows, rows_height
from chtconv.report.figures.style import COLORS
from chtconv.report.run import Comparison, Run, number

# By colours of different lightness, which grey keeps apart.
_PARTS: Final = {"training": COLORS[2], "evolution": COLORS[0], "evaluation": COLORS[6]}


def seconds(run: Run) -> tuple[float, ...] | None:
    """Seconds of a run for training, evolution and evaluation; None where they were not recorded."""
    whole, evolution = number(run.summary, "seconds"), number(run.summary, "evolution_seconds")
    if whole is None:
        return None
    return whole - (evolution or 0), evolution or 0, number(run.summary, "evaluation_seconds") or 0


def times(comparison: Comparison, key: str) -> list[Picture]:
    """Seconds a run and images a second, each a picture a panel."""
    found = [
        picture
        for panel in panels(comparison, f"{key}time", split=False)
        for picture in (_seconds(panel), _images(panel))
        if picture
    ]
    return sorted(found, key=lambda picture: "per second" in picture.caption)


def _seconds(panel: Panel) -> Picture | None:
    means = {group.variant: [found for run in group.done if (found := seconds(run))] for group in panel.groups}
    values = {variant: np.mean(found, axis=0) for variant, found in means.items() if found}
    if not values:
        return None
    divisor, unit = (60, "minutes") if max(found.sum() for found in values.values()) > 300 else (1, "seconds")

    def paint(axes: Axes) -> None:
        left = np.zeros(len(values))
        for index, (part, color) in enumerate(_PARTS.items()):
            width = np.array([found[index] for found in values.values()]) / divisor
            axes.barh(range(len(values)), width, 0.62, left, color=color, label=part)
            left += width
        label_rows(axes, list(values))

    totals = {variant: float(found.sum()) / divisor for variant, found in values.items()}
    shares = {variant: 100 * float(found[1] / found.sum()) for variant, found in values.items() if found.sum()}
    return Picture(
        draw(
            f"{panel.key}seconds", paint, title=f"Time of a run, {panel.title}", x=f"{unit} a run", y="",
            height=rows_height(len(values)), grid="x",
        ),
        f"Stacked bars: {unit} a run at {panel.title}. In all: {listed(totals, '', 1)}. Share of evolution: "
        f"{listed(shares, '%', 1)}.",
        f"Time of a run at {panel.title}, mean over seeds, by what it went to: runs that shared a machine slowed each "
        "other down.",
    )  # fmt: skip


def _images(panel: Panel) -> Picture | None:
    found = {
        group.variant: np.array([speed for run in group.done if (speed := number(run.summary, "images_per_second"))])
        for group in panel.groups
    }
    values = {variant: speeds for variant, speeds in found.items() if len(speeds)}
    if not values:
        return None

    means = {variant: float(speeds.mean()) for variant, speeds in values.items()}
    return Picture(
        dots(
            panel, "images", values, title=f"Speed, {panel.title}", x="training images a second", from_zero=True
        ),
        f"Dot plot: training images a second at {panel.title}. Means: {listed(means, '', 0)}.",
        f"Training images per second of every run at {panel.title}, evolution included: a mark is a seed, the upright "
        "line the mean of its row.",
    )  # fmt: skip
