"""What stands on the page for a figure, and what the figures of a comparison are drawn from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chtconv.comparison.cell import shortened
from chtconv.report.figures.style import HEIGHT, WIDTH, Style, styles
from chtconv.report.figures.svg import drawn
from chtconv.report.run import Comparison, Group

MOST_LINES: Final = 7  # in one picture; more cannot be told apart
_MOST_TITLE: Final = 56


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        svg: an ``<svg>`` element.
        alternative: what it shows, for those who do not see it.
        caption: one sentence on how to read it.
    """

    svg: str
    alternative: str
    caption: str

    @property
    def element(self) -> str:
        """The figure with its role and its text alternative.

        >>> Picture("<svg>...</svg>", 'SET & "others"', "").element
        '<svg role="img" aria-label="SET &amp; &quot;others&quot;">...</svg>'
        """
        return self.svg.replace("<svg", f'<svg role="img" aria-label="{escape(self.alternative)}"', 1)


@dataclass(frozen=True)
class Panel:
    """The groups that share a picture: those of one sparsity, with the dense network.

    Attributes:
        title: the sparsity, and which part of its groups this is.
        groups: at most :data:`MOST_LINES` and the baselines.
        styles: by variant.
        layers: number of each sparse layer by its name.
        key: a word that no other panel of the page has.
    """

    title: str
    groups: Sequence[Group]
    styles: Mapping[str, Style]
    layers: Mapping[str, int]
    key: str


def panels(comparison: Comparison, key: str, *, split: bool = True) -> list[Panel]:
    """A panel for each sparsity, or several where there are many variants, each with the baselines.

    Args:
        comparison: what is drawn.
        key: a word that no other comparison and kind of figure of the page has.
        split: whether many variants take several panels.
    """
    look, layers = looks(comparison), comparison.layers
    groups = [group for group in comparison.groups if group.has_begun]
    dense = [group for group in groups if group.sparsity == 0]
    found: list[Panel] = []
    for sparsity in sorted({group.sparsity for group in groups} - {0.0}) or ([0.0] if dense else []):
        here = [group for group in groups if group.sparsity == sparsity]
        everything = here if not sparsity else [*dense, *here]
        parts = list(_parts(everything)) if split else [everything]
        for index, part in enumerate(parts):
            of = f" ({index + 1} of {len(parts)})" if len(parts) > 1 else ""
            found.append(Panel(percent(sparsity) + " sparsity" + of, part, look, layers, f"{key}p{len(found)}"))
    return found


def looks(comparison: Comparison) -> dict[str, Style]:
    """The styles of the variants that have something to show, the same in all pictures of the comparison."""
    begun = [group for group in comparison.groups if group.has_begun]
    there = {group.variant for group in begun}
    baselines = {group.variant for group in begun if group.is_baseline}
    return styles([name for name in comparison.variants if name in there], list(baselines))


def _parts(groups: Sequence[Group]) -> Iterator[list[Group]]:
    base = list(dict.fromkeys(group.variant for group in groups if group.is_baseline))
    for part in portions([group.variant for group in groups], base):
        yield [group for group in groups if group.variant in part]


def portions(variants: Sequence[str], baselines: Sequence[str]) -> list[list[str]]:
    """Variants in portions that one picture can show, each with all baselines.

    >>> portions(["SET", "a", "b", "c", "d", "e", "f", "g"], ["SET"])
    [['SET', 'a', 'b', 'c', 'd'], ['SET', 'e', 'f', 'g']]
    """
    others = [variant for variant in variants if variant not in baselines]
    if len(variants) <= MOST_LINES or not others:
        return [list(variants)]
    number = -(-len(others) // max(2, MOST_LINES - len(baselines)))
    size = -(-len(others) // number)
    return [[*baselines, *others[start : start + size]] for start in range(0, len(others), size)]


def percent(share: float) -> str:
    """A share in percent without superfluous digits.

    >>> percent(0.95), percent(0.985)
    ('95%', '98.5%')
    """
    return f"{100 * share:.4g}%"


def draw(
    key: str,
    paint: Callable[[Axes], Any],
    *,
    title: str,
    x: str,
    y: str,
    height: float = HEIGHT,
    legend: bool = True,
    grid: str = "both",
) -> str:
    """One pair of axes with labels, and the legend below them, as SVG.

    Args:
        key: a word that no other figure of the page has.
        paint: draws on the axes.
        title: above the axes.
        x: label of the horizontal axis with its unit.
        y: the same of the vertical axis.
        height: in inches, without the legend.
        legend: whether what is drawn with a label is listed.
        grid: the axis whose grid is drawn, or "both".
    """

    def paint_all(figure: Figure) -> None:
        axes = figure.add_subplot()
        if grid != "both":
            axes.grid(visible=False, axis="x" if grid == "y" else "y")
        axes.set(xlabel=x, ylabel=y)
        axes.set_title(short(title, _MOST_TITLE))
        paint(axes)
        if legend:
            figure.set_size_inches(WIDTH, height + _legend(figure, axes))

    return drawn(key, WIDTH, height, paint_all)


def _legend(figure: Figure, axes: Axes) -> float:
    """The legend below the axes; its height in inches."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return 0.0
    columns = 2 if max(map(len, labels)) <= 24 and len(labels) > 1 else 1
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, borderaxespad=0.2, labelspacing=0.3)
    return 0.19 * -(-len(labels) // columns)


def short(label: str, most: int = 46) -> str:
    r"""A name that fits into a legend, in one line, without characters that cannot be drawn.

    What tells names apart often stands at their end: the middle is left out.

    >>> short("CHTs, layer graph, temperature 4", most=20), short("layer\ngraph\0")
    ('CHTs, lay…perature 4', 'layer graph')
    """
    label = " ".join("".join(each if each.isprintable() else " " for each in label).split())
    # A label that begins with an underscore is in no legend.
    return shortened(f"\u200b{label}" if label.startswith("_") else label, most)


def listed(values: Mapping[str, float], unit: str = "", digits: int = 2) -> str:
    """Numbers by name in one sentence part; what is not known is left out.

    >>> listed({"SET": 72.381, "CHTs": float("nan"), "RigL": 72.9}, "%")
    'SET 72.38%, RigL 72.90%'
    """
    return ", ".join(f"{name} {value:.{digits}f}{unit}" for name, value in values.items() if np.isfinite(value))
