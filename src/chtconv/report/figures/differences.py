"""What a variant is better by than what it has to beat: paired differences with their intervals."""

from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes

from chtconv.comparison.statistics import Interval
from chtconv.comparison.table import Comparison as Difference
from chtconv.report.figures.accuracy import NAMES
from chtconv.report.figures.picture import Picture, draw, looks, percent, short
from chtconv.report.figures.rows import ROW, rows_height, two_lines
from chtconv.report.figures.style import GREY
from chtconv.report.run import Comparison

MOST_ROWS: Final = 12  # in one picture


def pictures(comparison: Comparison, differences: Sequence[Difference], key: str) -> list[Picture]:
    """Mean differences with 95 % intervals, a row each, pictures of at most :data:`MOST_ROWS` for each sparsity.

    Args:
        comparison: whose names and styles are taken.
        differences: between its variants, as :func:`chtconv.report.results.beside_baselines` finds them; those
            without an interval are left out.
        key: a word that no other comparison of the page has.
    """
    order = {variant: index for index, variant in enumerate(comparison.variants)}
    known = [each for each in differences if each.paired.interval is not None]
    known.sort(key=lambda each: (each.sparsity, order[each.baseline]))
    found: list[Picture] = []
    for sparsity in dict.fromkeys(each.sparsity for each in known):
        here = [each for each in known if each.sparsity == sparsity]
        parts = [here[start : start + MOST_ROWS] for start in range(0, len(here), MOST_ROWS)]
        for index, part in enumerate(parts):
            of = f" ({index + 1} of {len(parts)})" if len(parts) > 1 else ""
            found.append(
                _picture(comparison, part, f"{percent(sparsity)} sparsity{of}", f"{key}difference{len(found)}")
            )
    return found


def _picture(comparison: Comparison, shown: Sequence[Difference], title: str, key: str) -> Picture:
    name, look = NAMES[comparison.measure], looks(comparison)
    labels = [[*two_lines(each.variant), f"\u2212 {short(each.baseline, ROW - 2)}"] for each in shown]

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=GREY, linewidth=3, alpha=0.45, zorder=1)
        for index, each in enumerate(shown):
            style, (mean, interval) = look[each.variant], _known(each)
            axes.plot([interval.low, interval.high], [index, index], color=style.color)
            axes.plot([mean], [index], style.marker, color=style.color)
        axes.set_yticks(range(len(shown)), ["\n".join(lines) for lines in labels])
        axes.set_ylim(len(shown) - 0.5, -0.5)

    height = rows_height(len(shown), max(map(len, labels)))
    pairs = sorted({each.paired.n for each in shown})
    several = f"{pairs[0]} to {pairs[-1]}" if len(pairs) > 1 else f"{pairs[0]}"
    return Picture(
        draw(key, paint, title=f"Differences, {title}", x="points", y="", height=height, legend=False),
        f"Means with intervals: differences of {name} in points at {title}. {'; '.join(map(_words, shown))}.",
        f"Differences of {name} at {title} between runs of the same seed, {several} pairs each, with 95 % intervals: "
        "right of the line the first of the two is better. An interval is that of one difference: of many, some leave "
        "out zero by chance.",
    )


def _known(difference: Difference) -> tuple[float, Interval]:
    mean, interval = difference.paired.difference, difference.paired.interval
    assert mean is not None
    assert interval is not None
    return mean, interval


def _words(difference: Difference) -> str:
    mean, interval = _known(difference)
    between = f"{interval.low:+.2f} to {interval.high:+.2f}"
    return f"{difference.variant} minus {difference.baseline} {mean:+.2f} ({between})"
