"""The parts of a comparison on the page, each with its figures, or with a sentence on why there are none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from chtconv.report.figures import accuracy, against, cost, degrees, differences, evolution, positions, scores, slices
from chtconv.report.figures.layers import Layers, Runs
from chtconv.report.figures.picture import Panel, Picture, panels
from chtconv.report.masks import links_of
from chtconv.report.naming import brief
from chtconv.report.results import PageTable, beside_baselines, run_list
from chtconv.report.run import Comparison

MOST_MAPS: Final = 24

Links = Mapping[tuple[str, float], Runs]


@dataclass(frozen=True)
class Section:
    """A part of a comparison.

    Attributes:
        heading: what it is about.
        text: what the reader should know first, or why there is nothing to see.
        pictures: its figures by subheading; none where the subheading is empty.
        tables: its tables.
    """

    heading: str
    text: str = ""
    pictures: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    tables: Sequence[PageTable] = ()


def sections(comparison: Comparison, key: str) -> list[Section]:
    """All parts of a comparison, in the order in which one asks.

    Args:
        comparison: its runs.
        key: a word that no other comparison of the page has.
    """
    short, common = brief(comparison)
    return [
        _accuracy(short, key, common),
        _evolution(short, key),
        _links(short, key),
        _scores(short, key),
        _cost(short, key),
        Section("Runs", tables=[run_list(comparison)]),
    ]


def _accuracy(comparison: Comparison, key: str, common: str) -> Section:
    drawn = [
        *against.against_sparsity(comparison, key),
        *differences.pictures(comparison, beside_baselines(comparison), key),
        *accuracy.curves(comparison, key),
        *accuracy.seeds(comparison, key),
    ]
    text = f"In figures names go without what those of all sparse runs have in common: {common}." if common else ""
    return Section("Accuracy", text if drawn else "No run has finished an epoch.", {"": drawn})


def _evolution(comparison: Comparison, key: str) -> Section:
    drawn = evolution.pictures(comparison, f"{key}evolution")
    none = "No complete run has a record of how its links evolved."
    return Section("Evolution of the links", "" if drawn else _without(none, comparison), {"": drawn})


def _scores(comparison: Comparison, key: str) -> Section:
    drawn = scores.pictures(comparison, f"{key}score")
    none = "No complete run has a record of link scores."
    return Section("Link scores", "" if drawn else _without(none, comparison), {"": drawn})


def _cost(comparison: Comparison, key: str) -> Section:
    drawn = [*cost.times(comparison, key), *against.against_flops(comparison, key)]
    silent = sum(not run.summary.get("flops") for run in comparison.done)
    none = f"{silent} of {len(comparison.done)} complete runs did not record floating point operations."
    return Section("Time and arithmetic", (none if silent else "") if drawn else "No run is complete.", {"": drawn})


def _without(none: str, comparison: Comparison) -> str:
    """The sentence on what there is not; where runs have left no more than their lines of results, that is why."""
    lines = sum(run.from_line for run in comparison.done)
    return f"{none} Of {lines} of {len(comparison.done)} only the line of results is left." if lines else none


def _links(comparison: Comparison, key: str) -> Section:
    """Where links went: nothing to see without a complete sparse run."""
    links, problems = _all_links(comparison)
    if not links:
        return Section(
            "Where links went",
            " ".join([_without("No complete run has masks of convolutions.", comparison), *problems]),
        )
    here = [(panel, _of_groups(panel, links)) for panel in panels(comparison, f"{key}links")]
    known = [(panel, runs) for panel, runs in here if runs]
    maps, left_out = _maps(comparison, key, links)
    if left_out:
        problems.append(f"Kernel positions are drawn for the highest sparsities only, not for {left_out}.")
    drawn = {
        "Slices": _drawn(known, slices.distribution, slices.empty_by_layer),
        "Degrees of channels": _drawn(known, degrees.sources, degrees.kernels, degrees.spread_by_layer),
        "Kernel positions": maps,
    }
    return Section("Where links went", " ".join(problems), drawn, [_layer_table(comparison, links)])


def _drawn(
    known: Sequence[tuple[Panel, dict[str, Runs]]], *kinds: Callable[[Panel, Mapping[str, Runs]], Picture | None]
) -> list[Picture]:
    found = [kind(panel, runs) for kind in kinds for panel, runs in known]
    return [picture for picture in found if picture]


def _all_links(comparison: Comparison) -> tuple[Links, list[str]]:
    found: dict[tuple[str, float], list[Layers]] = {}
    problems = []
    for group in comparison.groups:
        for run in group.done:
            layers, problem = links_of(run)
            problems += [problem + "."] if problem else []
            if layers:
                found.setdefault((group.variant, group.sparsity), []).append(layers)
    return found, problems


def _of_groups(panel: Panel, links: Links) -> dict[str, Runs]:
    places = [(group.variant, group.sparsity) for group in panel.groups]
    return {place[0]: links[place] for place in places if place in links}


def _maps(comparison: Comparison, key: str, links: Links) -> tuple[list[Picture], str]:
    """Heat maps of the highest sparsities, as many as a reader can take in, and the sparsities without."""
    found: list[Picture] = []
    left_out = []
    for panel in reversed(panels(comparison, f"{key}maps", split=False)):
        here = _of_groups(panel, links)
        if found and len(found) + len(here) > MOST_MAPS:
            left_out.append(panel.title)
        elif here:
            found += positions.pictures(panel, here)
    return found, ", ".join(left_out)


def _layer_table(comparison: Comparison, links: Links) -> PageTable:
    """What the numbers of the layers stand for."""
    known = {layer.name: layer for runs in links.values() for layer in runs[0]}
    rows = [
        (str(number), name, f"{known[name].shape[0]:,}", f"{known[name].shape[1]:,}", _kernel(known[name].shape[2:]))
        for name, number in comparison.layers.items()
        if name in known
    ]
    return PageTable("Layers by their number", ("number", "layer", "kernels", "input channels", "kernel"), rows, 2)


def _kernel(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
