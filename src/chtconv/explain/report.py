"""The statistics of layers as a person reads them: a table, and plain sentences."""

import textwrap
from collections.abc import Callable, Mapping

from chtconv.explain.statistics import ScoreStatistics

_NAME = 14  # letters of the longest name with which the table has 100 columns
_ROW = "{:<{}} {:>15}{:>10}{:>8}{:>8}{:>8}{:>8}{:>11}{:>9}{:>8}"
_LEGEND = """\
zero       candidates (disabled positions) of score 0
reach      candidates beside a link of their slice that have a score, of all beside one
tied       candidates that tie at the cut of the hard rule; by lot: links that CHT draws among them
effective  candidates that the soft rule really has: 100% means that CHTs samples like SET
R²         variance of scores within kernels that the links of the slice, or of the input channel,
           explain; - where the scores do not vary"""
# Where sampling is near uniform, and what share of candidates or of variance is most of it.
NEARLY_SET = 0.9
MOSTLY = 0.5


def report(found: Mapping[str, ScoreStatistics]) -> str:
    """The text for the statistics of layers by name, which all come from one predictor and graph."""
    some = next(iter(found.values()))
    short = {name.removesuffix(".weight"): statistics for name, statistics in found.items()}
    width = max(_NAME, *map(len, short))
    header = _ROW.format(
        "layer", width, "shape", "links", "zero", "reach", "tied", "by lot", "effective", "R² slice", "channel"
    )
    lines = [f"{some.predictor} on the {some.graph} graph", "", header]
    lines += [_row(name, width, statistics) for name, statistics in short.items()]
    told = [textwrap.fill(sentence, 100, break_on_hyphens=False) for sentence in sentences(short)]
    return "\n".join([*lines, "", _LEGEND, "", *told])


def sentences(found: Mapping[str, ScoreStatistics]) -> list[str]:
    """What the numbers mean, a sentence for each group of layers that are alike.

    A layer can be in several groups; one that is in none has scores that differ and that no cheap rule explains.
    """
    graph = next(iter(found.values())).graph
    lines = []
    for belongs, value, text in _VERDICTS:
        members = {name: value(statistics) for name, statistics in found.items() if belongs(statistics)}
        if members:
            low, high = min(members.values()), max(members.values())
            # Rounded for people: a range of one number is that number.
            span = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
            many = len(members) == len(found) > 1
            layers = "all layers" if many else ", ".join(members)
            lines.append(text.format(graph=graph, layers=layers, span=span))
    return lines or [f"On the {graph} graph scores differ, and no cheap rule explains most of them."]


def _unscored(statistics: ScoreStatistics) -> bool:
    return statistics.spread is None


def _nearly_set(statistics: ScoreStatistics) -> bool:
    return not _unscored(statistics) and statistics.effective_candidates >= NEARLY_SET


def _mostly_zero(statistics: ScoreStatistics) -> bool:
    return not _unscored(statistics) and statistics.zero_scores >= MOSTLY


def _out_of_sight(statistics: ScoreStatistics) -> bool:
    return not _unscored(statistics) and statistics.reach is not None and statistics.reach < MOSTLY


def _falls_short(statistics: ScoreStatistics) -> bool:
    return not _unscored(statistics) and statistics.ties.unscored > 0


Verdict = tuple[Callable[[ScoreStatistics], bool], Callable[[ScoreStatistics], float], str]
_VERDICTS: list[Verdict] = [
    (
        _unscored,
        lambda statistics: statistics.zero_scores,
        "On the {graph} graph every score is 0 in {layers}: CHT and CHTs choose at random there, like SET.",
    ),
    (
        _nearly_set,
        lambda statistics: statistics.effective_candidates,
        "On the {graph} graph CHTs samples {layers} nearly like SET (effective candidates {span}).",
    ),
    (
        _mostly_zero,
        lambda statistics: statistics.zero_scores,
        "On the {graph} graph most candidates have score 0 in {layers} (a share of {span}): they regrow only where no "
        "positive score is left.",
    ),
    (
        _out_of_sight,
        lambda statistics: statistics.reach or 0,
        "On the {graph} graph paths reach fewer than half of the free positions beside links in {layers} (a share of "
        "{span}): links of a kernel are too few to predict others from.",
    ),
    (
        _falls_short,
        lambda statistics: statistics.ties.unscored,
        "On the {graph} graph positive scores run out in {layers}: a share of {span} of the links to regrow is "
        "chosen at random.",
    ),
    (
        lambda statistics: (statistics.explained.occupancy or 0) >= MOSTLY,
        lambda statistics: statistics.explained.occupancy or 0,
        "On the {graph} graph scores say little more than how many links a slice has in {layers} (R² {span}).",
    ),
    (
        lambda statistics: (statistics.explained.input_degree or 0) >= MOSTLY,
        lambda statistics: statistics.explained.input_degree or 0,
        "On the {graph} graph scores say little more than how many links an input channel has in {layers} (R² {span}).",
    ),
]


def _row(name: str, width: int, found: ScoreStatistics) -> str:
    return _ROW.format(
        name,
        width,
        "x".join(map(str, found.shape)),
        f"{found.links:,}",
        f"{found.zero_scores:.1%}",
        "-" if found.reach is None else f"{found.reach:.1%}",
        f"{found.ties.at_cut:.1%}",
        f"{found.ties.drawn:.1%}",
        f"{found.effective_candidates:.1%}",
        _r_squared(found.explained.occupancy),
        _r_squared(found.explained.input_degree),
    )


def _r_squared(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
