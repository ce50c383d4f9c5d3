"""How links changed: links re-chosen at once, links replaced, links ever active, and empty slices, over time."""

from typing import Final

from chtconv.report.figures.lines import Quantity, over_time
from chtconv.report.figures.picture import Picture, panels
from chtconv.report.run import Comparison, Row, number
from chtconv.report.series import ratio, weighted


def _slices(row: Row) -> float | None:
    """How many pairs of kernel and input channel a layer has; older rows have its positions alone."""
    return number(row, "slices") or number(row, "size")


_QUANTITIES: Final = (
    Quantity(
        "overlap",
        "Overlap",
        "re-chosen / removed, %",
        ratio("rechosen", "removed"),
        "Overlap at {panel}, the share of the links removed at an evolution that it chose again at once: near 100% the "
        "topology has stopped changing, near 0% every removed link is replaced by another.",
    ),
    Quantity(
        "itop",
        "ITOP",
        "links ever active, %",
        weighted("itop"),
        "ITOP at {panel}, the share of all possible links that were active at some time until then: high where "
        "evolution explores, low where it comes back to the same links.",
    ),
    Quantity(
        "turnover",
        "Turnover",
        "links replaced, %",
        ratio("new", "links"),
        "Turnover at {panel}, the share of the links that an evolution replaced by others: it falls with the drop "
        "fraction and with rising overlap.",
    ),
    Quantity(
        "empty",
        "Empty slices",
        "empty slices, %",
        weighted("empty_slices", by=_slices),
        "Empty slices at {panel}, the share of the pairs of kernel and input channel without any link: it rises where "
        "links concentrate in fewer, fuller slices.",
    ),
)


def pictures(comparison: Comparison, key: str) -> list[Picture]:
    """Overlap, ITOP, turnover and empty slices, each a picture a panel."""
    return quantities(comparison, key, _QUANTITIES)


def quantities(comparison: Comparison, key: str, wanted: tuple[Quantity, ...]) -> list[Picture]:
    """A picture a quantity and panel, but of those that no run has."""
    found = [over_time(panel, quantity) for quantity in wanted for panel in panels(comparison, key)]
    return [picture for picture in found if picture]
