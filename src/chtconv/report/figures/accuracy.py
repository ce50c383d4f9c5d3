"""Accuracy: over epochs, and of every run."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes

from chtconv.report.figures.lines import band, group_means, whole_numbers
from chtconv.report.figures.picture import Panel, Picture, draw, listed, panels, short
from chtconv.report.figures.rows import dots
from chtconv.report.run import Comparison, Group, Run, number
from chtconv.report.series import Values, curve

NAMES: Final = {"test_accuracy": "test accuracy", "validation_accuracy": "accuracy on held-out images"}
# Share of the accuracy curves that may lie below the axis: the first epochs are near chance, and say nothing.
_HIDDEN: Final = 0.12


def curves(comparison: Comparison, key: str) -> list[Picture]:
    """Accuracy over epochs, a picture a panel."""
    found = [_curve(panel, comparison.measure) for panel in panels(comparison, f"{key}curve")]
    return [picture for picture in found if picture]


def _curve(panel: Panel, measure: str) -> Picture | None:
    name = NAMES[measure]
    means = group_means(panel, lambda run: curve(run, measure))
    unfinished = [(group, run) for group in panel.groups for run in group.runs if run.state != "done" and run.metrics]
    if not means and not unfinished:
        return None
    drawn = [*(mean.mean for mean in means.values()), *(curve(run, measure)[1] for _, run in unfinished)]
    lowest = _lowest([100 * values for values in drawn])

    def paint(axes: Axes) -> None:
        for variant, mean in means.items():
            band(axes, panel, variant, mean, scale=100)
        labelled = set(means)
        for group, run in unfinished:
            x, y = curve(run, measure)
            style = panel.styles[group.variant]
            label = None if group.variant in labelled else short(f"{group.variant}, not complete")
            labelled.add(group.variant)
            axes.plot(x, 100 * y, color=style.color, linestyle=style.dashes, linewidth=0.6, label=label)
        whole_numbers(axes)
        axes.set_ylim(bottom=lowest)

    last = {variant: 100 * mean.mean[-1] for variant, mean in means.items()}
    several = any(np.isfinite(mean.error).any() for mean in means.values())
    spread = ", lines are means over seeds, bands one standard error to either side" if several else ""
    below = "" if lowest is None else ", the first epochs lie below the axis"
    thin = "; thin lines are runs that are not complete, which the means leave out" if unfinished else ""
    return Picture(
        draw(panel.key, paint, title=f"{name.capitalize()}, {panel.title}", x="epoch", y=f"{name}, %"),
        f"Line chart: {name} over epochs at {panel.title}. "
        + (f"After the last epoch: {listed(last, '%')}." if last else "No run is complete."),
        f"{name.capitalize()} after each epoch at {panel.title}: higher is better{spread}{below}{thin}.",
    )


def _lowest(curves: Sequence[Values]) -> float | None:
    """Where the axis begins, if it leaves out early epochs: the later half of every curve is in sight, bad or good."""
    values = np.concatenate(curves) if curves else np.array([])
    values = values[np.isfinite(values)]
    if len(values) <= 20:
        return None
    later = np.concatenate([curve[len(curve) // 2 :] for curve in curves])
    low = float(min([np.quantile(values, _HIDDEN), *later[np.isfinite(later)]]))
    low -= 0.1 * (float(values.max()) - low)
    return low if values.min() < low else None


def seeds(comparison: Comparison, key: str) -> list[Picture]:
    """The last accuracy of every run beside the mean of its group, a picture a panel."""
    found = [_seeds(panel, comparison.measure) for panel in panels(comparison, f"{key}seed", split=False)]
    return [picture for picture in found if picture]


def _seeds(panel: Panel, measure: str) -> Picture | None:
    values = {group.variant: last_accuracies(group, measure) for group in panel.groups}
    values = {variant: found for variant, found in values.items() if len(found)}
    if not values:
        return None
    name = NAMES[measure]
    means = {variant: float(found.mean()) for variant, found in values.items()}
    return Picture(
        dots(panel, "", values, title=f"Every run, {panel.title}", x=f"{name}, %"),
        f"Dot plot: {name} of every run at {panel.title}. Means: {listed(means, '%')}.",
        f"{name.capitalize()} of every complete run after its last epoch at {panel.title}: a mark is a seed, the "
        "upright line the mean of its row.",
    )


def last_accuracies(group: Group, measure: str) -> Values:
    """The accuracy of each complete run after its last epoch, in percent."""
    found = [last_accuracy(run, measure) for run in group.done]
    return np.array([100 * value for value in found if value is not None])


def last_accuracy(run: Run, measure: str) -> float | None:
    """The accuracy after the last epoch; None where it was not written down."""
    return number(run.metrics[-1] if run.metrics else run.summary, measure)
