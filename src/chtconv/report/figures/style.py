"""How everything is drawn: for readers with any colour vision, in grey and on small screens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

# Placeholders that no other colour of a figure has: the page gives them a value for light and one for dark.
INK: Final = "#1a1b1c"
FAINT: Final = "#d8d9da"
GREY: Final = "#76777a"
# Okabe and Ito, Color Universal Design (2008), without the yellow that white paper swallows.
COLORS: Final = (INK, "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
THEMED: Final = MappingProxyType({
    color: f"--{name}"
    for color, name in {
        INK: "ink", FAINT: "faint", GREY: "grey", "#d55e00": "vermilion", "#0072b2": "blue", "#009e73": "green",
        "#cc79a7": "purple", "#e69f00": "orange", "#56b4e9": "sky",
    }.items()
})  # fmt: skip
_SOLID: Final = (0.0, ())
_DASHES: Final[Sequence[tuple[float, tuple[float, ...]]]] = (
    _SOLID, (0.0, (5, 1.6)), (0.0, (1.2, 1.2)), (0.0, (5, 1.4, 1.2, 1.4)), (0.0, (2.6, 1.2)),
)  # fmt: skip
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<")

WIDTH: Final = 4.2  # inches
HEIGHT: Final = 2.7  # of the axes with their labels, without the legend

RC: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "svg.fonttype": "none",  # text stays text: it can be searched, and takes no room
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8.5,
        "text.parse_math": False,  # names of runs are no formulas
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": FAINT,
        "grid.linewidth": 0.5,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.handlelength": 3.2,
        "lines.linewidth": 1.5,
        "lines.markersize": 4.2,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "path.simplify_threshold": 0.2,
    }
)


@dataclass(frozen=True)
class Style:
    """How a variant is drawn everywhere on the page; no two share colour and dashes."""

    color: str
    dashes: tuple[float, tuple[float, ...]]
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of a line with a few markers."""
        return {"color": self.color, "linestyle": self.dashes, "marker": self.marker}


def styles(variants: Sequence[str], baselines: Sequence[str] = ()) -> dict[str, Style]:
    """A style for each variant: grey for the dense network, a colour of their own for the other baselines.

    The others take turns with what is left, so that those who are next to each other have different colours.

    >>> found = styles([f"variant {number}" for number in range(35)])
    >>> len({(style.color, style.dashes) for style in found.values()})
    35
    >>> {style.color for name, style in styles(["SET", "a", "b"], ["SET"]).items()} == set(COLORS[:3])
    True
    """
    own = [name for name in variants if name in baselines and name != "dense"]
    found = {name: Style(COLORS[i], _DASHES[i], _MARKERS[i]) for i, name in enumerate(own)}
    found |= {"dense": Style(GREY, _DASHES[2], "s")} if "dense" in variants else {}
    colors, others = COLORS[len(own) :], [name for name in variants if name not in found]
    for i, name in enumerate(others):
        turn = len(own) + i + i // len(colors)
        found[name] = Style(colors[i % len(colors)], _DASHES[turn % len(_DASHES)], _MARKERS[turn % len(_MARKERS)])
    return {name: found[name] for name in variants}
