"""A figure as SVG that can stand in a page beside others: no identifier twice, colours of the page, few digits."""

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from chtconv.errors import ConfigurationError
from chtconv.report.figures.style import RC, THEMED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TAG = re.compile(r"<[^<>]*>")


def drawn(key: str, width: float, height: float, paint: Callable[["Figure"], Any]) -> str:
    """A figure as an ``<svg>`` element, whose identifiers all begin with ``key``.

    Args:
        key: a word that no other figure of the page has.
        width: in inches.
        height: in inches; ``paint`` may change both.
        paint: draws on the empty figure.

    Raises:
        ConfigurationError: where matplotlib is absent.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            "the report needs matplotlib, which is not installed: pip install 'chtconv[compare]'"
        ) from error
    settings: Any = {**RC, "svg.hashsalt": key}
    buffer = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's font may well have it
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return embedded(buffer.getvalue(), key)


def embedded(document: str, key: str) -> str:
    """An SVG document as an element of a page.

    >>> embedded('<?xml version="1.0"?><svg width="9pt"><g id="a" style="fill: #1a1b1c"/><use href="#a"/></svg>', "f1")
    '<svg ><g id="f1-a" style="fill: var(--ink)"/><use href="#f1-a"/></svg>'
    """
    element = document[document.index("<svg") :]
    for pattern in (r"<metadata>.*?</metadata>", r"<!--.*?-->"):
        element = re.sub(pattern, "", element, flags=re.DOTALL)
    element = re.sub(r"\n\s*", "\n", element).strip()
    # The size is the page's business, the ratio that of viewBox.
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"( height="[^"]*")?', r"\1 ", element, count=1)
    return _TAG.sub(lambda tag: _rewritten(tag.group(), key), element)


def _rewritten(tag: str, key: str) -> str:
    tag = re.sub(r'\bid="', f'id="{key}-', tag)
    tag = re.sub(r'href="#', f'href="#{key}-', tag)
    tag = tag.replace("url(#", f"url(#{key}-").replace("xlink:href", "href")
    tag = re.sub(r"font: ((?:\w+ )*)([\d.]+px) [^;\"]*", _font, tag)
    for color, name in THEMED.items():
        tag = tag.replace(color, f"var({name})")
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag)


def _font(found: re.Match[str]) -> str:
    """Size and weight: the family is the page's."""
    weight = re.search(r"\b(bold|\d00)\b", found[1])
    return f"font-size: {found[2]}" + (f"; font-weight: {weight[1]}" if weight else "")
