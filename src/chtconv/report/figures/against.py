"""Accuracy against what it is paid for: sparsity, and the arithmetic of training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from chtconv.report.figures.accuracy import NAMES, last_accuracies
from chtconv.report.figures.picture import Picture, draw, listed, looks, percent, portions, short
from chtconv.report.figures.style import GREY, HEIGHT
from chtconv.report.run import Comparison, Group, number, table


@dataclass(frozen=True)
class _Point:
    """The accuracy of a group in percent, its standard error (NaN for one run), and its share of dense FLOPs."""

    variant: str
    sparsity: float
    mean: float
    error: float
    flops: float | None


def against_sparsity(comparison: Comparison, key: str) -> list[Picture]:
    """Mean accuracy at each sparsity, with error bars; nothing where there is one sparsity only."""
    name, points = NAMES[comparison.measure], _points(comparison)
    sparsities = sorted({point.sparsity for point in points if point.sparsity})
    if len(sparsities) < 2:
        return []
    look, dense = looks(comparison), [point.mean for point in points if not point.sparsity]

    def paint(axes: Axes, shown: Sequence[_Point], variants: Sequence[str]) -> None:
        if dense:
            axes.axhline(dense[0], color=GREY, linewidth=3, alpha=0.45, zorder=1, label="dense network")
        for index, variant in enumerate(variants):
            here = [point for point in shown if point.variant == variant and point.sparsity]
            # Beside each other, so that bars of equal accuracy do not hide each other.
            shift = 0.36 * ((index + 0.5) / len(variants) - 0.5)
            x = [sparsities.index(point.sparsity) + shift for point in here]
            _bars(axes, x, here, label=short(variant), **look[variant].line)
        axes.set_xticks(range(len(sparsities)), [percent(sparsity) for sparsity in sparsities])
        axes.set_xlim(-0.5, len(sparsities) - 0.5)

    return _pictures(
        comparison, f"{key}sparsity", [point for point in points if point.sparsity], paint,
        title=f"{name.capitalize()} against sparsity",
        x="sparsity",
        words=lambda point: f"{point.variant} at {percent(point.sparsity)}",
        caption=f"Mean {name} after the last epoch against sparsity{_spread(points)}; points of one sparsity stand "
        "side by side.",
    )  # fmt: skip


def against_flops(comparison: Comparison, key: str) -> list[Picture]:
    """Mean accuracy against the FLOPs of training, as a share of the dense network's; nothing without them."""
    name, look = NAMES[comparison.measure], looks(comparison)
    points = [point for point in _points(comparison) if point.flops is not None]
    if len(points) < 2:
        return []

    def paint(axes: Axes, shown: Sequence[_Point], variants: Sequence[str]) -> None:
        for variant in variants:
            here = [point for point in shown if point.variant == variant]
            x = [100 * point.flops for point in here if point.flops is not None]
            style = look[variant]
            _bars(axes, x, here, label=short(variant), color=style.color, marker=style.marker, linestyle="none")
        axes.set_xlim(0, 110 * max(point.flops or 0 for point in shown))

    return _pictures(
        comparison, f"{key}flops", points, paint,
        title=f"{name.capitalize()} against arithmetic",
        x="FLOPs of training, % of dense training",
        words=lambda point: f"{point.variant} at {percent(point.sparsity)} sparsity, "
        f"{100 * (point.flops or 0):.1f}% of the FLOPs",
        caption=f"Mean {name} against the floating point operations of training, as sparse kernels would do them: "
        f"upper left is better{_spread(points)}.",
    )  # fmt: skip


def _spread(points: Sequence[_Point]) -> str:
    """What bars are, where there are any: a point of one seed has none."""
    return ", bars are one standard error over seeds" if any(np.isfinite(point.error) for point in points) else ""


def _pictures(
    comparison: Comparison,
    key: str,
    points: Sequence[_Point],
    paint: Callable[[Axes, Sequence[_Point], Sequence[str]], Any],
    *,
    title: str,
    x: str,
    words: Callable[[_Point], str],
    caption: str,
) -> list[Picture]:
    """A picture a portion of the variants."""
    name, there = NAMES[comparison.measure], {point.variant for point in points}
    variants = [variant for variant in comparison.variants if variant in there]
    base = {group.variant for group in comparison.groups if group.is_baseline}
    parts = portions(variants, [variant for variant in variants if variant in base])
    found = []
    for index, part in enumerate(parts):
        shown = [point for point in points if point.variant in part]
        of = f" ({index + 1} of {len(parts)})" if len(parts) > 1 else ""
        means = {words(point): point.mean for point in shown}

        def paint_part(axes: Axes, shown: Sequence[_Point] = shown, part: Sequence[str] = part) -> None:
            paint(axes, shown, part)

        svg = draw(f"{key}{index}", paint_part, title=title + of, x=x, y=f"{name}, %", height=HEIGHT + 0.2)
        found.append(Picture(svg, f"Points with error bars: {title}. {listed(means, '%')}.", caption))
    return found


def _bars(axes: Axes, x: Sequence[float], points: Sequence[_Point], **look: Any) -> None:
    means, errors = [point.mean for point in points], [point.error for point in points]
    axes.errorbar(x, means, errors, capsize=2.5, linewidth=1, **look)


def _points(comparison: Comparison) -> list[_Point]:
    found = []
    for group in comparison.groups:
        values = last_accuracies(group, comparison.measure)
        if len(values):
            error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else np.nan
            found.append(_Point(group.variant, group.sparsity, float(values.mean()), error, _flops(group)))
    return found


def _flops(group: Group) -> float | None:
    """FLOPs of training by those of the dense network, mean over runs."""
    found = []
    for run in group.done:
        row = table(run.summary, "flops")
        sparse, dense = number(row, "training"), number(row, "dense_training")
        if sparse is not None and dense:
            found.append(sparse / dense)
    return float(np.mean(found)) if found else None
