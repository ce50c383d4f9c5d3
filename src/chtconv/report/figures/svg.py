"""A figure as SVG that can stand in a page beside others: no identifier twice, colours of the page, few bytes."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from chtconv.report.figures.style import RC, THEMED

_SVG: Final = "{http://www.w3.org/2000/svg}"
_LINK: Final = "{http://www.w3.org/1999/xlink}href"
_REFERENCE: Final = re.compile(r"url\(#([^)]+)\)")
# What the page's style sheet says, or says for all figures at once.
_OF_THE_PAGE: Final = re.compile(r"font-family: [^;]*;? ?|font: (?P<weight>(?:\w+ )*)(?P<size>[\d.]+px) [^;]*")

# Inches at both sides: the reader's font may be wider than the one that the figure was laid out with.
_MARGIN: Final = 0.1


def drawn(key: str, width: float, height: float, paint: Callable[[Figure], Any]) -> str:
    """A figure as an ``<svg>`` element, whose identifiers all begin with ``key``.

    Args:
        key: a word that no other figure of the page has.
        width: in inches.
        height: in inches; ``paint`` may change both.
        paint: draws on the empty figure.
    """
    settings: Any = {**RC, "svg.hashsalt": key}
    buffer = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's font may well have it
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=_MARGIN))
        paint(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return embedded(buffer.getvalue(), key)


def embedded(document: str, key: str) -> str:
    r"""An SVG document as an element of a page; its size is the page's business, its ratio that of viewBox.

    >>> embedded('<svg xmlns="http://www.w3.org/2000/svg" width="9pt"><g id="a"><path id="b" d="M 0.1234 1 \nz"/></g>'
    ... '<path style="fill: #1a1b1c; clip-path: url(#b)"/></svg>', "f1")
    '<svg><path id="f1-0" d="M0.12 1z" /><path style="fill: var(--ink); clip-path: url(#f1-0)" /></svg>'
    """
    root = ElementTree.fromstring(document)
    for parent in root.iter():
        for child in [child for child in parent if child.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            parent.remove(child)
    root.attrib = {name: value for name, value in root.attrib.items() if name == "viewBox"}
    names = {name: f"{key}-{index}" for index, name in enumerate(_referenced(root))}
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = dict(_attributes(element, names))
        element.tail = None
        if element.tag != "text":
            element.text = None
    _unwrap(root)
    return ElementTree.tostring(root, encoding="unicode")


def _referenced(root: ElementTree.Element) -> list[str]:
    """The identifiers that something refers to, in their order: matplotlib's own are not always the same."""
    values = [(name, value) for element in root.iter() for name, value in element.attrib.items()]
    used = {found for _, value in values for found in _REFERENCE.findall(value)}
    used |= {value[1:] for name, value in values if name == _LINK}
    return [value for name, value in values if name == "id" and value in used]


def _attributes(element: ElementTree.Element, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names and values: identifiers that nothing refers to are left out, and so is what draws nothing."""
    for name, value in element.attrib.items():
        if name == "id":
            if value in names:
                yield name, names[value]
        elif name == _LINK:
            yield "href", f"#{names[value[1:]]}" if value.startswith("#") else value
        elif not value.startswith("rotate(-0 "):
            yield name, _compact(name, _REFERENCE.sub(lambda found: f"url(#{names[found[1]]})", value))


def _compact(name: str, value: str) -> str:
    if name == "style":
        value = _OF_THE_PAGE.sub(_font, value)
        for color, variable in THEMED.items():
            value = value.replace(color, f"var({variable})")
        return value
    if name == "d":
        value = re.sub(r"\s*([A-Za-z])\s*", r"\1", value)
    return re.sub(r"(\d\.\d\d)\d+", r"\1", value)


def _font(found: re.Match[str]) -> str:
    """Size and weight: the family is the page's."""
    if not found["size"]:
        return ""
    weight = re.search(r"\b(bold|\d00)\b", found["weight"])
    return f"font-size: {found['size']}" + (f"; font-weight: {weight[1]}" if weight else "")


def _unwrap(parent: ElementTree.Element) -> None:
    """Groups without attributes give way to what is in them; they only had names."""
    children: list[ElementTree.Element] = []
    for child in parent:
        _unwrap(child)
        children += list(child) if child.tag == "g" and not child.attrib else [child]
    parent[:] = children
