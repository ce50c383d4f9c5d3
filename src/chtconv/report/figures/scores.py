"""Link scores: how many are 0 and how many tie, over time and by layer."""

from collections.abc import Mapping
from typing import Final

import numpy as np
from matplotlib.axes import Axes

from chtconv.report.figures.evolution import quantities
from chtconv.report.figures.layers import layer_lines
from chtconv.report.figures.lines import Quantity
from chtconv.report.figures.picture import Panel, Picture, draw, listed, panels
from chtconv.report.run import Comparison, Group, Row, Run, number
from chtconv.report.series import weighted


def _candidates(row: Row) -> float | None:
    """Positions without a link once links were removed: those that are left, and those that were filled again."""
    known = [number(row, name) for name in ("size", "links", "new", "rechosen")]
    size, links, new, rechosen = (value or 0.0 for value in known)
    return None if known[0] is None else size - links + new + rechosen


_QUANTITIES: Final = (
    Quantity(
        "zero",
        "Scores of 0",
        "candidates of score 0, %",
        weighted("zero_scores", _candidates),
        "Share of the candidates for regrowth whose score is 0, at {panel}: these are chosen only where no positive "
        "score is left, or at random.",
    ),
    Quantity(
        "tied",
        "Tied scores",
        "tied candidates, %",
        weighted("tied_scores", _candidates),
        "Share of the candidates whose positive score another candidate of their kernel has too, at {panel}: the more "
        "ties, the more is decided by lot.",
    ),
)
_NAMES: Final = {"zero_scores": "score 0", "tied_scores": "a tied score"}


def pictures(comparison: Comparison, key: str) -> list[Picture]:
    """Zero and tied scores over epochs, and by layer."""
    found = [_by_layer(panel, name) for name in _NAMES for panel in panels(comparison, f"{key}layer")]
    return quantities(comparison, key, _QUANTITIES) + [picture for picture in found if picture]


def _by_layer(panel: Panel, name: str) -> Picture | None:
    values = {group.variant: _layers(group, name) for group in panel.groups}
    values = {variant: found for variant, found in values.items() if found}
    if not values:
        return None

    def paint(axes: Axes) -> None:
        layer_lines(axes, panel, values, {})

    means = {variant: 100 * float(np.mean(list(found.values()))) for variant, found in values.items()}
    words = _NAMES[name]
    return Picture(
        draw(
            f"{panel.key}{name}",
            paint,
            title=f"Candidates with {words}, {panel.title}",
            x="layer",
            y=f"candidates with {words}, %",
        ),
        f"Line chart: share of candidates with {words} by layer at {panel.title}. Means over layers: "
        f"{listed(means, '%', 1)}.",
        f"Share of the candidates with {words} by layer, counted from the input, at {panel.title}: means over all "
        "evolutions and seeds.",
    )


def _layers(group: Group, name: str) -> dict[str, float]:
    """The mean over evolutions and seeds, by layer; empty without link prediction."""
    runs = [_means(run, name) for run in group.done]
    layers = dict.fromkeys(layer for found in runs for layer in found)
    return {layer: float(np.mean([found[layer] for found in runs if layer in found])) for layer in layers}


def _means(run: Run, name: str) -> Mapping[str, float]:
    """The mean over the evolutions of a run, by layer."""
    found: dict[str, list[float]] = {}
    for row in run.records:
        value = number(row, name)
        if value is not None:
            found.setdefault(str(row.get("layer")).removesuffix(".weight"), []).append(value)
    return {layer: float(np.mean(values)) for layer, values in found.items()}
