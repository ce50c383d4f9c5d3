"""The page: all comparisons of a folder in one HTML document, which loads nothing and runs nothing."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources
from typing import Final

from jinja2 import Environment, StrictUndefined, Template

from chtconv.report.facts import Facts, counted, facts
from chtconv.report.results import PageTable, results
from chtconv.report.run import Comparison
from chtconv.report.sections import Section, sections
from chtconv.training.environment import package_version

TERMS: Final = (
    ("sparsity", "share of the links (weights) of the convolutions that is absent"),
    ("link", "a weight that is there; all others are held at 0"),
    ("kernel", "the weights of one output channel"),
    ("slice", "the weights of one kernel on one input channel, 9 positions for a 3 x 3 kernel"),
    ("evolution", "links of smallest magnitude are removed, and as many regrow elsewhere by the method's rule"),
    ("zeta", "drop fraction: the share of a kernel's links that an evolution removes"),
    ("candidate", "a position without a link at the time of regrowth; link prediction gives it a score"),
    ("standard error", "of a mean over seeds: standard deviation by the square root of their number"),
)
# What HTML has no place for: control characters, and halves of surrogate pairs, which UTF-8 cannot hold.
_UNPRINTABLE: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Part:
    """One comparison on the page; ``anchor`` is what links lead to."""

    anchor: str
    facts: Facts
    sections: Sequence[Section]


def page(comparisons: Sequence[Comparison]) -> str:
    """The HTML of the page.

    Args:
        comparisons: as :func:`chtconv.report.reading.read` found them.
    """
    parts = [
        Part(f"c{index}", found, sections(comparison, f"c{index}"))
        for index, (comparison, found) in enumerate(zip(comparisons, _facts(comparisons), strict=True))
    ]
    tables, problems = results(comparisons)
    html = _template().render(
        title=_title([part.facts.title for part in parts]),
        counted=counted(run for comparison in comparisons for run in comparison.runs),
        written=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
        version=package_version(),
        style=_style(),
        tables=tables,
        legend=_legend(tables),
        problems=problems,
        parts=parts,
        terms=TERMS,
    )
    return _UNPRINTABLE.sub("\ufffd", html)


def _facts(comparisons: Sequence[Comparison]) -> list[Facts]:
    """The facts of each; those that would be called alike are called as their folders too."""
    found = [facts(comparison) for comparison in comparisons]
    titles = [each.title for each in found]
    return [
        each
        if titles.count(each.title) == 1
        else Facts(f"{comparison.title}: {each.title}", each.lines, each.shared, each.warnings)
        for comparison, each in zip(comparisons, found, strict=True)
    ]


def _title(titles: Sequence[str], most: int = 3) -> str:
    return "; ".join(titles[:most]) + (f" and {len(titles) - most} more" if len(titles) > most else "")


def _legend(tables: Iterable[PageTable]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(entry for table in tables for entry in table.legend))


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_resource("page.html"))


def _style() -> str:
    return _resource("page.css")


def _resource(name: str) -> str:
    return resources.files("chtconv.report").joinpath(name).read_text(encoding="utf-8")
