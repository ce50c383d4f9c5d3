"""What figures say in words is what the runs wrote down, and many variants are shared out among pictures."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from scipy import stats

from chtconv.report.facts import facts
from chtconv.report.figures import accuracy, against, differences, evolution, scores, slices
from chtconv.report.figures.layers import layouts
from chtconv.report.figures.picture import MOST_LINES, Panel, Picture, draw, panels, short
from chtconv.report.masks import layer_links, links_of
from chtconv.report.reading import read
from chtconv.report.results import beside_baselines
from chtconv.report.run import Comparison, Run
from chtconv.report.sections import sections


def values_in(picture: Picture) -> dict[str, float]:
    """The numbers of a text alternative by their names."""
    numbers = picture.alternative.rpartition(": ")[2]
    return {name: float(value) for name, value in re.findall(r"([A-Za-z][\w ]*) ([\d.]+)%", numbers)}


@pytest.fixture(scope="module")
def found(trained: Path) -> Comparison:
    return read(trained)[0]


def test_overlap_is_rechosen_by_removed_over_all_layers(trained: Path, found: Comparison) -> None:
    picture = next(each for each in evolution.pictures(found, "k") if "Overlap" in each.alternative)
    expected = {}
    for variant in ("SET", "CHTs"):
        lines = (trained / variant.lower() / "evolution.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["removed"]]
        last = [row for row in rows if row["evolution"] == rows[-1]["evolution"]]
        expected[variant] = 100 * sum(row["rechosen"] for row in last) / sum(row["removed"] for row in last)
    assert values_in(picture) == pytest.approx(expected, abs=0.051)


def test_empty_slices_are_those_of_the_masks(trained: Path, found: Comparison) -> None:
    (panel,) = panels(found, "k")
    links = {run.variant: [links_of(run)[0]] for run in found.done if run.method != "dense"}
    picture = slices.distribution(panel, links)
    assert picture is not None
    shares = values_in(picture)
    for variant in ("SET", "CHTs"):
        masks = safetensors.numpy.load_file(trained / variant.lower() / "masks.safetensors").values()
        filled = np.concatenate([mask.any(axis=(2, 3)).ravel() for mask in masks])
        assert shares[variant] == pytest.approx(100 * (1 - filled.mean()), abs=0.051)
    assert 0 < shares["random placement"] < 100


def many(number: int, sparsities: tuple[float, ...] = (0.9,)) -> Comparison:
    """A comparison of SET, RigL and so many other variants, without results."""
    runs = [
        Run(f"{name}-{sparsity}", Path(name), "done", "", name, {"method": method, "sparsity": sparsity, "seed": 0})
        for sparsity in sparsities
        for name, method in {"SET": "set", "RigL": "rigl"}.items() | {(f"CHTs {i}", "chts") for i in range(number)}
    ]
    return Comparison("many", runs)


@pytest.mark.parametrize("number", [1, 5, 6, 23])
def test_many_variants_are_shared_out_with_the_baselines_in_every_picture(number: int) -> None:
    parts = panels(many(number), "k")
    shown = [[group.variant for group in panel.groups] for panel in parts]
    assert all(len(names) <= MOST_LINES and names[:2] == ["SET", "RigL"] for names in shown)
    assert sorted(name for names in shown for name in names[2:]) == sorted(f"CHTs {i}" for i in range(number))
    colors = [{panel.styles[name].color for name in names} for panel, names in zip(parts, shown, strict=True)]
    assert [len(each) for each in colors] == [len(names) for names in shown]
    assert len({panel.key for panel in parts}) == len({panel.title for panel in parts}) == len(parts)
    assert len(panels(many(number), "k", split=False)) == 1


def test_the_dense_network_stands_beside_every_sparsity() -> None:
    comparison = many(1, (0.8, 0.9))
    dense = Run("dense", Path("dense"), "done", "", "dense", {"method": "dense", "sparsity": 0.0, "seed": 0})
    parts = panels(Comparison("", [*comparison.runs, dense]), "k")
    assert [panel.title for panel in parts] == ["80% sparsity", "90% sparsity"]
    assert all("dense" in {group.variant for group in panel.groups} for panel in parts)
    (alone,) = panels(Comparison("", [dense]), "k")
    assert alone.title == "0% sparsity"


def test_chance_is_drawn_once_for_layers_with_as_many_links() -> None:
    draws = np.random.default_rng(0)
    even, other, odd = ([layer_links("a", draws.random((8, 8, 3, 3)) < density)] for density in (0.3, 0.3, 0.6))
    assert list(layouts({"SET": [even], "CHTs": [other]})) == ["random placement"]
    labels = list(layouts({"SET": [even], "CHTs": [other], "RigL, ERK": [odd]}))
    assert labels == ["random, as many links as SET", "random, as many links as RigL, ERK"]


def test_maps_are_drawn_for_the_highest_sparsities_and_it_is_said(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chtconv.report.sections.MOST_MAPS", 3)
    config = json.loads((trained / "set" / "config.json").read_text())
    summary = {"layers": json.loads((trained / "set" / "summary.json").read_text())["layers"]}
    runs = [
        Run(f"{variant} {sparsity}", trained / "set", "done", "", variant, config | {"sparsity": sparsity}, summary)
        for sparsity in (0.8, 0.9)
        for variant in ("one", "other")
    ]
    links = next(each for each in sections(Comparison("", runs), "k") if each.heading == "Where links went")
    assert len(links.pictures["Kernel positions"]) == 2
    assert links.text == "Kernel positions are drawn for the highest sparsities only, not for 80% sparsity."


def test_names_that_cannot_be_drawn_are_left_out_of_the_drawing(hostile: str) -> None:
    svg = draw("k", lambda axes: axes.plot([0, 1], [0, 1], label=hostile), title=hostile, x="x", y="y", legend=False)
    assert "&lt;script&gt;" in svg
    assert "\x00" not in svg
    svg.encode()


@pytest.mark.parametrize("name", ["_mine", "mine"])
def test_every_name_is_in_the_legend(name: str) -> None:
    svg = draw("k", lambda axes: axes.plot([0, 1], [0, 1], label=short(name)), title="", x="x", y="y")
    assert name in svg


def test_a_panel_without_results_gives_no_picture() -> None:
    comparison = many(2)
    assert evolution.pictures(comparison, "k") == []
    assert isinstance(panels(comparison, "k")[0], Panel)


@pytest.mark.parametrize(("seeds", "known"), [(1, False), (2, True)])
def test_an_error_bar_takes_two_runs(seeds: int, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[float] = []
    monkeypatch.setattr(against, "_bars", lambda _axes, _x, points, **_: errors.extend(each.error for each in points))
    runs = [
        replace(run, config={**run.config, "seed": seed}, metrics=[{"epoch": 1, "test_accuracy": 0.5 + 0.1 * seed}])
        for run in many(0, (0.8, 0.9)).runs
        for seed in range(seeds)
    ]
    comparison = Comparison("", runs)
    pictures = against.against_sparsity(comparison, "k") + accuracy.curves(comparison, "k")
    assert len(errors) == 4
    assert bool(np.isfinite(errors).all()) is known is bool(np.isfinite(errors).any())
    assert len(pictures) == 3
    assert {"standard error" in picture.caption for picture in pictures} == {known}


def caption_of(*curves: list[float]) -> str:
    """The caption of the accuracy curves of one run a variant."""
    runs = [
        replace(run, metrics=[{"epoch": epoch, "test_accuracy": value} for epoch, value in enumerate(curve, 1)])
        for run, curve in zip(many(len(curves) - 2).runs, curves, strict=True)
    ]
    (picture,) = accuracy.curves(Comparison("", runs), "k")
    return picture.caption


def test_only_early_epochs_lie_below_the_axis_of_accuracy() -> None:
    good = [0.1, *np.linspace(0.6, 0.9, 19)]
    assert "the first epochs lie below the axis" in caption_of(good, good)
    assert "below the axis" not in caption_of(good[:3], good[:3])
    # One of seven ends at chance: nobody must miss it.
    assert "below the axis" not in caption_of(*[good[1:]] * 6, [*good[1:-2], 0.1, 0.1])


def test_shares_of_candidates_are_of_those_of_all_layers() -> None:
    records = [
        {"layer": "a", "step": 1, "size": 100, "links": 90, "new": 8, "rechosen": 2, "zero_scores": 1.0},
        {"layer": "b", "step": 1, "size": 100, "links": 20, "new": 0, "rechosen": 0, "zero_scores": 0.5},
    ]
    config, metrics = {"method": "cht", "sparsity": 0.5, "seed": 0}, [{"epoch": 1, "steps": 1}]
    run = Run("a", Path("a"), "done", "", "CHT", config, {}, metrics, records)
    picture = next(each for each in scores.pictures(Comparison("", [run]), "k") if "Scores of 0" in each.alternative)
    assert values_in(picture) == {"CHT": 60.0}


def test_a_commit_with_changes_is_no_other_commit(found: Comparison) -> None:
    commits = [{"revision": "a", "dirty": False}, {"revision": "a", "dirty": True}]
    runs = [
        replace(run, summary={**run.summary, "commit": commit})
        for run, commit in zip(found.runs, commits * 2, strict=False)
    ]
    warnings = facts(Comparison("", runs)).warnings
    assert "Some runs were made from source with uncommitted changes." in warnings
    assert not any("different commits" in each for each in warnings)


def test_what_earlier_processes_of_a_run_were_made_with_is_told(found: Comparison) -> None:
    commit, other = ({"revision": each, "dirty": False} for each in "ab")
    earlier = [{"commit": other, "versions": {"torch": "0.1"}}, "damaged"]
    runs = [replace(run, summary={**run.summary, "commit": commit, "earlier": []}) for run in found.runs]
    assert not any("commits" in each for each in facts(Comparison("", runs)).warnings)
    runs[0] = replace(runs[0], summary={**runs[0].summary, "earlier": earlier})
    told = facts(Comparison("", runs))
    assert "Runs were made from different commits of the source." in told.warnings
    assert "Runs were made with different versions." in told.warnings
    assert dict(told.lines)["source"] == "commit a; commit b"


def measured(accuracies: dict[str, list[float]], sparsity: float = 0.9) -> list[Run]:
    """Complete runs of SET and of forms of CHTs, of which nothing is left but their lines of results."""
    return [
        Run(
            f"{variant} {seed}", Path(variant), "done", "", variant, config,
            {"config": config, "test_accuracy": value / 100, "curve": {"test_accuracy": [value / 100]}},
            [{"test_accuracy": value / 100}], from_line=True,
        )
        for index, (variant, values) in enumerate(accuracies.items())
        for seed, value in enumerate(values)
        for config in [
            {"method": "set" if variant == "SET" else "chts", "sparsity": sparsity, "seed": seed, "validation": 0,
             "temperature": None if variant == "SET" else 1.0 + index}
        ]
    ]  # fmt: skip


def test_differences_are_paired_with_the_intervals_of_a_paired_t_test() -> None:
    accuracies = {"SET": [70.0, 72.0, 71.0], "CHTs": [71.0, 72.5, 73.0], "CHTs, more": [69.0, 70.0, 75.0]}
    comparison = Comparison("", measured(accuracies))
    (picture,) = differences.pictures(comparison, beside_baselines(comparison), "k")
    for variant in ("CHTs", "CHTs, more"):
        found = stats.ttest_rel(accuracies[variant], accuracies["SET"]).confidence_interval(0.95)
        mean = np.mean(accuracies[variant]) - np.mean(accuracies["SET"])
        assert f"{variant} minus SET {mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})" in picture.alternative
    assert "3 pairs each" in picture.caption


def test_differences_take_two_pairs_and_a_table_of_their_own() -> None:
    single = Comparison("", measured({"SET": [70.0], "CHTs": [71.0]}))
    assert differences.pictures(single, beside_baselines(single), "k") == []
    wide = [replace(run, summary={**run.summary, "config": run.config | {"width": 0.5}}) for run in single.runs]
    assert len(beside_baselines(single)) == 1
    assert beside_baselines(replace(single, runs=[*single.runs, *wide])) == []


def test_differences_of_names_that_figures_do_not_know_are_left_out() -> None:
    """As where a summary contradicts the configuration beside it."""
    comparison = Comparison("", measured({"SET": [70.0, 71.0], "CHTs": [71.0, 73.0]}))
    zetas = {run.name: 0.1 + 0.1 * (run.seed or 0) for run in comparison.runs}
    runs = [
        replace(run, summary={**run.summary, "config": {**run.config, "zeta": zetas[run.name]}})
        for run in comparison.runs
    ]
    assert beside_baselines(replace(comparison, runs=runs)) == []


def test_empty_slices_of_layers_count_by_their_slices() -> None:
    """Half of the slices are of 1x1 kernels."""
    rows = [{"empty_slices": 0.5, "slices": 10, "size": 90}, {"empty_slices": 0.9, "slices": 10, "size": 10}]
    (quantity,) = [each for each in evolution._QUANTITIES if each.key == "empty"]
    assert quantity.value(rows) == pytest.approx(0.7)
    assert quantity.value([{"empty_slices": 0.5, "size": 30}, {"empty_slices": 0.9, "size": 10}]) == pytest.approx(0.6)


def test_many_differences_are_shared_out_by_sparsity_and_by_what_they_are_to() -> None:
    many = {"SET": [70.0, 71.0]} | {f"CHTs {index}": [71.0, 73.0 + index] for index in range(differences.MOST_ROWS)}
    runs = [run for sparsity in (0.8, 0.9) for run in measured(many | {"CHTs last": [60.0, 63.0]}, sparsity)]
    comparison = Comparison("", runs)
    found = differences.pictures(comparison, beside_baselines(comparison), "k")
    assert [picture.alternative.count(" minus ") for picture in found] == [differences.MOST_ROWS, 1] * 2
    titles = [re.search(r"points at (.*?)\.", picture.alternative) for picture in found]
    assert [title and title[1] for title in titles] == [
        f"{sparsity}% sparsity ({part} of 2)" for sparsity in (80, 90) for part in (1, 2)
    ]
