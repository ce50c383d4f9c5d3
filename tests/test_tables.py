"""The tables of the README and the docs: made from the results, and saying what these say."""

import json
import re
from pathlib import Path

import pytest
from scipy import stats

from chtconv.comparison.grid import grid_from, read_toml
from chtconv.comparison.result import identity

ROOT = Path(__file__).resolve().parent.parent
PLANS = ROOT / "experiments"


def test_the_table_of_stages_shows_shares(experiments, monkeypatch):
    tables = experiments("benchmark_tables")
    rows = [
        {"graph": graph, "ratio": 0.25, "stages": {"removal": a, "top-k": 1.0}} for graph, a in (("A", 3), ("B", 1))
    ]
    lines = [{"benchmark": "link_prediction", "rows": rows}, {"benchmark": "link_prediction", "rows": [{"ratio": 1}]}]
    monkeypatch.setattr(tables, "read", lambda name: lines)
    table = tables.stages().splitlines()
    assert table[0] == "| stage of an evolution | A graph | B graph |"
    assert "| removal | 75.0% | 50.0% |" in table
    assert "| seconds, profiled | 4 | 2 |" in table


def test_at_a_glance_has_the_latest_line_of_each_benchmark(experiments, monkeypatch):
    tables = experiments("benchmark_tables")

    def sparse(name, low):
        row = {"name": name, "of_keeping": {"low": low, "median": low + 0.1, "high": low + 0.2}}
        return {"benchmark": "sparse_compute", "configuration": {"part": "training"}, "rows": [{"name": "other"}, row]}

    evolution = {"ratio": 0.25, "ratio_low": 0.2, "ratio_high": 0.3}
    graph = {"name": "explicit sparse graph (SciPy) / closed form", "ratio": 2000.0, "low": 1000.0, "high": 4000.0}
    lines = [
        sparse("vgg16: 90%, auto", 0.7),
        sparse("vgg16: 90%, auto", 0.3),
        {"benchmark": "evolution", "rows": {"evolution, CHTs, CH3-L3n": evolution}},
        {"benchmark": "link_prediction", "rows": [{"name": "something else"}, graph]},
    ]
    monkeypatch.setattr(tables, "read", lambda name: lines)
    _, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in tables.at_a_glance().splitlines())
    assert [row[-1] for row in rows] == [
        "0.40 (0.30 to 0.50)",
        "0.25 (0.20 to 0.30)",
        "1 / 2,000 (1 / 4,000 to 1 / 1,000)",
    ]
    assert rows[0][0] == "training step, 90% sparse"
    monkeypatch.setattr(tables, "read", lambda name: [])
    assert tables.at_a_glance() == ""


def test_columns_that_the_latest_line_does_not_fill_are_left_out(experiments, monkeypatch):
    tables, rows = experiments("benchmark_tables"), [{"name": "A", "megabytes": 1.0}, {"name": "B", "megabytes": 2.0}]
    line = {"benchmark": "sparse_compute", "configuration": {"part": "memory"}, "rows": rows}
    monkeypatch.setattr(tables, "read", lambda name: [line])
    assert tables.sparse_table("memory").splitlines()[0] == "| peak of a training step | MB |"
    rows[1]["sparse_layers"] = "13 of 13"
    assert tables.sparse_table("memory").splitlines() == [
        "| peak of a training step | sparse layers | MB |",
        "| --- | ---: | ---: |",
        "| A |  | 1 |",
        "| B | 13 of 13 | 2 |",
    ]


def test_the_table_of_reach_averages_layers_and_seeds_and_takes_the_latest(experiments, monkeypatch):
    tables = experiments("evidence_tables")

    def line(masks, seed, *reach):
        layers = {size: {"input_size": size // 10, "reach": x} for size, x in zip((80, 81, 82, 40), reach, strict=True)}
        return {"masks": masks, "configuration": {"width": 0.25, "sparsity": 0.9, "seed": seed}, "layers": layers}

    lines = [
        line("SET", 1, 0.9, 0.9, 0.9, 0.9),
        line("SET", 1, 0.0, 0.2, 0.4, 0.5),
        line("SET", 2, 0.5, 0.6, 0.8, None),
    ]
    monkeypatch.setattr(tables, "read", lambda name: [*lines, line("random", 1, 0.1, 0.1, 0.3, None)])
    assert tables.reach().splitlines() == [
        "| masks | width | sparsity | seeds | first layer | 8x8 | 4x4 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| random | 0.25 | 90% | 1 | 10% | 20% |  |",
        "| SET | 0.25 | 90% | 2 | 25% | 50% | 50% |",
    ]


def test_the_table_of_gradients_averages_layers_behind_the_first_on_maps_that_are_not_all_border(
    experiments, monkeypatch
):
    tables = experiments("evidence_tables")

    def line(method, seed, *places):
        layers = {
            str(index): {"input_size": size, "gains": {"A": {"place": place, "slice": 1.5, "position": 0.75}}}
            for index, (size, place) in enumerate(zip((32, 32, 4, 2), places, strict=True))
        }
        return {"configuration": {"sparsity": 0.9, "method": method, "seed": seed}, "layers": layers}

    lines = [
        line("set", 1, 9.0, 1.25, 1.5, 9.0),
        line("set", 2, 9.0, 1.75, 2.0, 9.0),
        line("chts", 1, 1.0, 1.0, 1.0, 1.0),
    ]
    monkeypatch.setattr(tables, "read", lambda name: lines)
    assert tables.gradient().splitlines() == [
        "| sparsity | masks of | seeds | rule | place | slice | position |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 90% | CHTs | 1 | A | +0.0% | +50.0% | -25.0% |",
        "| 90% | SET | 2 | A | +62.5% | +50.0% | -25.0% |",
    ]


def test_the_screening_leaves_out_differences_of_single_pairs_and_no_run(experiments):
    tables = experiments("evidence_tables")
    every, shown = tables.results("screening.jsonl").splitlines(), tables.TABLES["screening"]().splitlines()
    number = every[every.index(next(line for line in every if line.startswith("| sparsity | variant | minus"))) :]
    column = [cell.strip() for cell in number[0].split("|")].index("pairs")
    single = [line for line in number if line.startswith("| 9") and line.split("|")[column].strip() == "1"]
    assert single
    assert shown == [line for line in every if line not in single]


def test_the_table_of_training_has_the_latest_line_of_each_width_and_precision(experiments, monkeypatch):
    tables = experiments("benchmark_tables")

    def line(width, precision, rate, device="cpu"):
        ratio = {"low": 1.0, "median": 1.5, "high": 2.0}
        rows = [
            {"name": "plain", "images_per_second": rate, "of_matrix_rate": 0.25},
            {"name": "dense", "images_per_second": 2 * rate, "of_matrix_rate": 0.5, "of_plain": ratio},
            {"name": "one matrix product", "flops_a_second": 2e12},
        ]
        configuration = {"width": width, "precision": precision, "device": device}
        at_once = [{"name": "2 at once", "images_per_second": rate, "of_one": ratio}]
        updates = [{"name": "adam, fused", "seconds": 0.01, "of_plain": ratio}]
        parts = {"rows": rows, "updates": updates, "at_once": at_once}
        return {"benchmark": "training", "configuration": configuration} | parts

    lines = [line(1.0, "bf16", 99), line(0.25, "float32", 3), line(1.0, "bf16", 7)]
    monkeypatch.setattr(tables, "read", lambda name: lines)
    table = tables.training()
    assert "| width 0.25, float32: plain | 3 |" in table
    assert "| width 1, bf16: dense | 14 |  | 1.500 (1.000 to 2.000) |  | 0.5 |" in table
    assert "| width 1, bf16: 2 at once | 7 | 1.500 (1.000 to 2.000) |" in table
    assert "| width 0.25: adam, fused | 10.0 | 1.500 (1.000 to 2.000) |" in table
    assert "2.00 TFLOP/s" in table
    assert "99" not in table
    monkeypatch.setattr(tables, "read", lambda name: [])
    assert tables.training() == ""


# What the tables call the variants of each file of results, the one that its test is about first.
NAMES = {
    "confirmation": {
        "CHTs, allocation layer, all windows, kernel shares links": "CHTs",
        "SET, allocation layer": "SET",
        "RigL, allocation layer": "RigL",
        "slice occupancy, allocation layer, all windows": "slice occupancy",
    },
    "confirmation-smoothing": {"CHTs, allocation layer, all windows, smoothing 0.5": "CHTs, smoothing 0.5"},
    "confirmation-paper": {"CHT": "CHT", "SET": "SET", "slice occupancy": "slice occupancy"},
    "confirmation-density": {
        "CHTs, density cubic, all windows": "CHTs",
        "SET, density cubic": "SET",
        "SET, density cubic, allocation layer": "SET, allocation layer",
        "GraNet": "GraNet",
        "slice occupancy, density cubic, all windows": "slice occupancy",
    },
    "confirmation-model": {
        "CHTs, density cubic, allocation model, all windows, smoothing 0.5": "CHTs, smoothing 0.5",
        "SET, density cubic, allocation model": "SET",
        "GraNet, allocation model": "GraNet",
        "slice occupancy, density cubic, allocation model, all windows": "slice occupancy",
    },
}
NAMES["confirmation-density-90"] = NAMES["confirmation-density"]
# The files that the runs of a test are in, its own last.
TESTS = [
    ["confirmation"],
    ["confirmation", "confirmation-smoothing"],
    ["confirmation-paper"],
    ["confirmation-density"],
    ["confirmation-density-90"],
    ["confirmation-model"],
]


@pytest.mark.parametrize("files", TESTS)
def test_the_tables_of_preregistered_tests_are_paired_tests(experiments, files):
    """Paired t-tests by scipy, the p values adjusted by hand."""
    accuracies = {}
    for file in files:
        for text in (ROOT / "results" / f"{file}.jsonl").read_text().splitlines():
            line = json.loads(text)
            key = NAMES[file][line["variant"]], line["config"]["sparsity"]
            accuracies.setdefault(key, {})[line["seed"]] = 100 * line["test_accuracy"]
    mine = next(iter(NAMES[files[-1]].values()))
    others = {name for name, _ in accuracies} - {mine}
    sparsities = sorted(sparsity for name, sparsity in accuracies if name == mine)
    differences, p_values = {}, {}
    for sparsity in sparsities:
        ours = accuracies[mine, sparsity]
        for name in others:
            theirs = accuracies[name, sparsity]
            seeds = sorted(ours.keys() & theirs.keys())
            found = stats.ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            interval = found.confidence_interval(0.95)
            mean = sum(ours[seed] - theirs[seed] for seed in seeds) / len(seeds)
            differences[name, sparsity] = f"{mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
            p_values[name, sparsity] = found.pvalue
    adjusted, highest = {}, 0.0
    for place, key in enumerate(sorted(p_values, key=p_values.get)):
        highest = adjusted[key] = max(highest, min(1.0, (len(p_values) - place) * p_values[key]))
    made = experiments("evidence_tables").TABLES[files[-1].replace("-", "_")]()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines())
    assert header == ["", *(f"{sparsity:.0%} sparsity" for sparsity in sparsities)]
    cells = {title: dict(zip(sparsities, values, strict=True)) for title, *values in rows}
    assert cells.keys() == {mine, *others, *(f"{mine} minus {name}" for name in others)}
    for (name, sparsity), difference in differences.items():
        p = adjusted[name, sparsity]
        shown = "<0.001" if p < 0.0005 else f"{p:.3f}"
        assert cells[f"{mine} minus {name}"][sparsity] == f"{difference} (p {shown})"
    for name in (mine, *others):
        for sparsity in sparsities:
            values = list(accuracies[name, sparsity].values())
            assert cells[name][sparsity] == f"{sum(values) / len(values):.2f} ± {stats.sem(values):.2f}"


@pytest.mark.parametrize("files", TESTS)
def test_the_runs_of_a_preregistered_test_are_those_of_its_file(experiments, files):
    """Every run that was planned, once, and no other; with the fused optimizer, as the Makefile says."""
    for file in files:
        plan = [identity(cell.config.to_dict()) for cell in grid_from(read_toml(PLANS / f"{file}.toml")).cells()]
        lines = [json.loads(text) for text in (ROOT / "results" / f"{file}.jsonl").read_text().splitlines()]
        made = [identity(line["config"]) for line in lines]
        assert len(made) == len(plan)
        assert all(each in made for each in plan)
        assert {line["config"]["optimizer_kernel"] for line in lines} == {"fused"}
        assert f"compare experiments/{file}.toml --jobs 2 --optimizer-kernel fused" in (ROOT / "Makefile").read_text()


def test_complete_preregistered_tests_are_tested_here_and_others_show_nothing(experiments):
    found = experiments("preregistered").PREREGISTERED_TESTS
    complete = {name for name, test in found.items() if not test.missing}
    assert complete == {files[-1].replace("-", "_") for files in TESTS}
    for name in found.keys() - complete:
        text = experiments("evidence_tables").TABLES[name]()
        assert text == f"{found[name].missing} of its runs are still to be made; nothing is shown before."


def test_the_table_of_forms_has_all_variants_of_preregistered_tests_with_their_costs(experiments):
    _, _, *found = experiments("evidence_tables").TABLES["forms"]().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found]
    expected = set()
    for file, names in NAMES.items():
        groups = {}
        for line in map(json.loads, (ROOT / "results" / f"{file}.jsonl").read_text().splitlines()):
            groups.setdefault((line["config"]["sparsity"], names[line["variant"]]), []).append(line)
        for (sparsity, name), lines in groups.items():
            shares = (
                sum(line["flops"][part] / line["flops"][f"dense_{part}"] for line in lines) / len(lines)
                for part in ("training", "inference")
            )
            accuracy = sum(100 * line["test_accuracy"] for line in lines) / len(lines)
            expected.add((f"{sparsity:.0%}", name, f"{accuracy:.2f}", *(f"{share:.1%}" for share in shares)))
    assert {(cell[0], cell[2], cell[3].partition(" ")[0], *cell[4:]) for cell in cells} == expected
    assert len(cells) == len(expected)


def test_every_table_has_a_place_and_every_place_a_table(experiments):
    tables = experiments("tables")
    places = [name for page in tables.PAGES for name in re.findall(r"<!-- table: (.*?) -->", page.read_text())]
    assert set(places) == set(tables.TABLES)
    assert sum(page.read_text().count("<!-- end -->") for page in tables.PAGES) == len(places)
    with pytest.raises(SystemExit, match="there is no table 'nothing'"):
        tables.filled("<!-- table: nothing -->\n<!-- end -->")


def test_the_figure_of_the_evidence_shows_the_differences_of_its_tables_and_knows_when_it_is_old(
    experiments, monkeypatch, tmp_path
):
    figure, tests = experiments("evidence_figure"), experiments("preregistered").PREREGISTERED_TESTS
    rows = [row for row in figure.shown() if "other" in row]
    tests = {name: test for name, test in tests.items() if not test.missing}
    for name, test in tests.items():
        table = experiments("evidence_tables").TABLES[name]()
        for each in test.differences:
            if each.paired.interval is None:
                continue
            (row,) = [row for row in rows if row["mean"] == each.paired.difference and row["other"] == each.other]
            assert f"{row['mean']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" in table
    assert len(rows) == sum(each.paired.interval is not None for test in tests.values() for each in test.differences)
    monkeypatch.setattr(figure, "FIGURE", tmp_path / "evidence.png")
    assert not figure.is_current()
    figure.draw()
    assert figure.is_current()
    monkeypatch.setattr(figure, "shown", lambda: rows[1:])
    assert not figure.is_current()
