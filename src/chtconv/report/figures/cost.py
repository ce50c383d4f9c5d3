"""What runs cost: seconds of training, evolution and evaluation, images per second, and arithmetic."""

from typing import TYPE_CHECKING, Final

import numpy as np

from chtconv.report.figures.accuracy import NAMES, last_accuracies
from chtconv.report.figures.picture import Panel, Picture, draw, listed, panels, percent, short
from chtconv.report.figures.style import COLORS, hatch, styles
from chtconv.report.run import Comparison, Group, Run, number, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS: Final = ("training", "evolution", "evaluation")


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
        for panel in panels(comparison, f"{key}time")
        for picture in (_seconds(panel), _images(panel))
        if picture
    ]
    return sorted(found, key=lambda picture: "per second" in picture.caption)


def _rows(panel: Panel, values: dict[str, np.ndarray]) -> float:
    return 0.95 + 0.26 * len(values)


def _seconds(panel: Panel) -> Picture | None:
    means = {group.variant: [found for run in group.done if (found := seconds(run))] for group in panel.groups}
    values = {variant: np.mean(found, axis=0) for variant, found in means.items() if found}
    if not values:
        return None
    divisor, unit = (60, "minutes") if max(found.sum() for found in values.values()) > 300 else (1, "seconds")

    def paint(axes: "Axes") -> None:
        left = np.zeros(len(values))
        for index, part in enumerate(_PARTS):
            width = np.array([found[index] for found in values.values()]) / divisor
            color = COLORS[(2, 5, 6)[index]]
            axes.barh(
                range(len(values)), width, 0.62, left, color=color, edgecolor="white", hatch=hatch(index), label=part
            )
            left += width
        _names(axes, list(values))

    totals = {variant: float(found.sum()) / divisor for variant, found in values.items()}
    shares = {variant: 100 * float(found[1] / found.sum()) for variant, found in values.items() if found.sum()}
    return Picture(
        draw(
            f"{panel.key}seconds", paint, title=f"Time of a run, {panel.title}", x=f"{unit} a run", y="", height=_rows(panel, values),
            grid="x",
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

    def paint(axes: "Axes") -> None:
        for index, (variant, speeds) in enumerate(values.items()):
            style = panel.styles[variant]
            axes.plot(speeds, np.full(len(speeds), index), style.marker, color=style.color, markerfacecolor="none")
            axes.plot([speeds.mean()] * 2, [index - 0.32, index + 0.32], color=style.color, linewidth=2)
        axes.set_xlim(left=0)
        _names(axes, list(values))

    means = {variant: float(speeds.mean()) for variant, speeds in values.items()}
    return Picture(
        draw(
            f"{panel.key}images", paint, title=f"Speed, {panel.title}", x="training images a second", y="",
            height=_rows(panel, values), legend=False,
        ),
        f"Dot plot: training images a second at {panel.title}. Means: {listed(means, '', 0)}.",
        f"Training images per second of every run at {panel.title}, evolution included: a mark is a seed, the upright "
        "line the mean of its row.",
    )  # fmt: skip


def _names(axes: "Axes", names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [short(name, 28) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def flops(comparison: Comparison, key: str) -> list[Picture]:
    """Accuracy against the arithmetic of training, as a share of the dense network's."""
    measure, look = comparison.measure, styles(comparison.variants)
    points = [(group, _share(group), last_accuracies(group, measure)) for group in comparison.groups]
    known = [(group, share, found) for group, share, found in points if share is not None and len(found)]
    if len(known) < 2:
        return []
    name = NAMES[measure]

    def paint(axes: "Axes") -> None:
        labelled = set()
        for group, share, found in known:
            style = look[group.variant]
            label = None if group.variant in labelled else short(group.variant)
            labelled.add(group.variant)
            error = found.std(ddof=1) / len(found) ** 0.5 if len(found) > 1 else 0
            axes.errorbar(
                100 * share, found.mean(), error, color=style.color, marker=style.marker, linestyle="none", label=label,
                capsize=2.5, linewidth=1,
            )  # fmt: skip
        axes.set_xlim(left=0)

    means = {
        f"{group.variant} at {percent(group.sparsity)} sparsity and {100 * share:.1f}% of the arithmetic": found.mean()
        for group, share, found in known
    }
    return [
        Picture(
            draw(
                f"{key}flops",
                paint,
                title="Accuracy against arithmetic",
                x="FLOPs of training, % of dense training",
                y=f"{name}, %",
            ),
            f"Points with error bars: {name} against FLOPs of training. {listed(means, '%')}.",
            f"Mean {name} against the floating point operations of the whole training that sparse kernels would do: "
            "upper left is better, bars are one standard error.",
        )
    ]


def _share(group: Group) -> float | None:
    """FLOPs of training by those of the dense network, mean over runs."""
    found = []
    for run in group.done:
        row = table(run.summary, "flops")
        sparse, dense = number(row, "training"), number(row, "dense_training")
        if sparse is not None and dense:
            found.append(sparse / dense)
    return float(np.mean(found)) if found else None
