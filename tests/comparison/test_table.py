"""Tables: what goes into one row, what is compared with what, the paper's numbers, and how all of it reads."""

import math
import random
import re
from pathlib import Path

import pytest
from scipy import stats

from chtconv.comparison import rendering
from chtconv.comparison.cell import METHOD_NAMES, Cell, variant_name
from chtconv.comparison.paper import TABLE_1, paper_cell, readings
from chtconv.comparison.result import read_lines
from chtconv.comparison.rows import check_line, rows
from chtconv.comparison.sheets import LEGEND, paper_sheet, ranges, sheets
from chtconv.comparison.statistics import holm
from chtconv.comparison.table import CONTROL_METHODS, tables
from chtconv.comparison.table1 import table1
from chtconv.errors import ConfigurationError
from chtconv.methods import METHODS
from chtconv.training import Config, recipe

SHORT = recipe("cifar-short")
RESULTS = Path(__file__).resolve().parents[2] / "results" / "cifar10.jsonl"


def line(accuracy, *, variant=None, usual=SHORT, test=0.123, **changes):
    """The line of a run whose headline accuracy, in %, is this."""
    config = usual.replace(**{"seed": 14} | changes)
    values, held_out = config.to_dict(), config.data.validation
    name = values["dataset"].rpartition("/")[2]
    return {
        "variant": variant_name(config, usual) if variant is None else variant,
        "test_accuracy": test if held_out else accuracy / 100,
        "validation_accuracy": accuracy / 100 if held_out else None,
        "best_test_accuracy": 0.999,
        "itop": 0.25,
        "seconds": 100.0 + values["seed"],
        "seed": values["seed"],
        "dataset": {"name": name, "train": 50_000 - held_out, "validation": held_out, "test": 10_000},
        "config": values | {"dataset": name},
        "evolution": {"rechosen": 0.2, "empty_slices": 0.6, "zero_scores": 0.5},
        "flops": {"inference": 2.0, "dense_inference": 10.0, "training": 9.0, "dense_training": 30.0},
    }


def lines(accuracies, **changes):
    """Lines of runs by seed."""
    return [line(accuracy, seed=seed, **changes) for seed, accuracy in accuracies.items()]


SET = {14: 72.88, 15: 72.12, 16: 72.14}
RIGL = {14: 72.34, 15: 73.03, 16: 73.18}
CHTS = {14: 74.76, 15: 74.11, 16: 73.41}
THREE = lines(CHTS, method="chts") + lines(SET, method="set") + lines(RIGL, method="rigl")


def pairs_of(table):
    return [(each.variant, each.baseline, each.sparsity) for each in table.comparisons]


# ---------------------------------------------------------------------------------------------------------- rows


def test_a_row_is_a_variant_over_its_seeds():
    row = rows(lines(CHTS, method="chts"))[0]
    assert (row.variant, row.method, row.sparsity, row.metric) == ("CHTs", "chts", 0.95, "test")
    assert row.seeds == (14, 15, 16)
    assert row.accuracy.mean == pytest.approx(74.0933, abs=1e-4)
    assert row.accuracy.standard_error == pytest.approx(stats.sem(list(CHTS.values())))
    means = row.means
    assert (means.training, means.inference) == pytest.approx((0.3, 0.2))
    assert (means.itop, means.empty_slices, means.new_share, means.seconds) == pytest.approx((0.25, 0.6, 0.8, 115))
    assert (row.paper, row.difference, row.interval) == (None, None, None)


def test_means_are_of_the_lines_that_have_a_value():
    found = lines({14: 70, 15: 71, 16: 72}, method="chts")
    del found[0]["flops"], found[0]["evolution"]
    found[1]["flops"] = {"inference": 4.0, "dense_inference": 10.0}
    found[2]["itop"] = None
    means = rows(found)[0].means
    assert means.inference == pytest.approx(0.3)
    assert means.training == pytest.approx(0.3)
    assert means.new_share == pytest.approx(0.8)
    assert means.itop == 0.25


def test_links_that_are_pruned_for_good_are_not_chosen_again_in_older_lines_either():
    """They have new links by removed ones, which says nothing of that where fewer come than go."""
    falling = {"density": "cubic", "initial_sparsity": 0.5}
    for method, changes, known in (
        ("set", {}, 0.8), ("set", falling, None), ("granet", {}, None), ("gmp", {}, None), ("snfs", {}, 0.8),
    ):  # fmt: skip
        (found,) = lines({14: 70}, method=method, **changes)
        found["evolution"] = {"turnover": 0.8}
        assert rows([found])[0].means.new_share == known
    assert rows(lines({14: 70}, method="set", **falling))[0].means.new_share == pytest.approx(0.8)


@pytest.mark.parametrize("value", [math.inf, 1.5, -0.1, "0.9", None])
def test_an_accuracy_is_a_share(value):
    (found,) = lines({14: 70}, method="set")
    with pytest.raises(ConfigurationError, match=r"SET, seed 14, has no test_accuracy from 0 to 1"):
        check_line(found | {"test_accuracy": value})


def test_seeds_are_in_order_whatever_that_of_the_lines():
    assert rows(reversed(lines(CHTS, method="chts")))[0].seeds == (14, 15, 16)


def test_the_order_of_the_lines_changes_nothing():
    found = [*THREE, *lines(SET, method="dense"), *lines(SET, method="set", sparsity=0.7)]
    found += lines(SET, method="chts", graph="layer") + lines(SET, method="set", dataset="uoft-cs/cifar100")
    for seed in range(5):
        shuffled = random.Random(seed).sample(found, len(found))
        assert tables(shuffled) == tables(found)


def test_lines_of_two_data_sets_of_one_name_make_no_table():
    found = lines({14: 70, 15: 71, 16: 72}, method="set") + lines({14: 73}, method="chts")
    found[-1]["dataset"]["train"] = 400
    with pytest.raises(
        ConfigurationError, match=r"CHTs, seed 14, is of another data set 'cifar10' .*train 400, not 50000"
    ):
        tables(found)
    found[-1]["dataset"] = {"name": "cifar10"}  # of an older version
    found[1]["labels"], found[2]["labels"] = "a", "b"
    with pytest.raises(ConfigurationError, match="labels b, not a"):
        tables(found)
    found[2]["config"]["dataset"] = "cifar100"
    assert len(tables(found)) == 2


def test_dense_comes_first_then_sparsities_then_methods_then_variants():
    found = [
        line(70, method="chts", temperature=16.0), line(70, method="chts", temperature=4.0), line(70, method="chts"),
        line(70, method="set"), line(70, method="static"), line(70, method="rigl", sparsity=0.9),
        line(70, method="dense"), line(70, method="occupancy"),
    ]  # fmt: skip
    assert [(row.sparsity, row.variant) for row in rows(found)] == [
        (0.0, "dense"), (0.9, "RigL"), (0.95, "static"), (0.95, "SET"), (0.95, "CHTs"),
        (0.95, "CHTs, temperature 4"), (0.95, "CHTs, temperature 16"), (0.95, "slice occupancy"),
    ]  # fmt: skip


def test_the_last_line_of_a_run_counts():
    found = [*lines(CHTS, method="chts"), line(80, method="chts", threads=2, backend="dense", dataset="at/cifar10")]
    assert rows(found)[0].accuracies == pytest.approx({14: 80.0, 15: 74.11, 16: 73.41})


def test_dense_runs_of_any_sparsity_are_one_row():
    found = [line(84, method="dense", sparsity=0.9), line(85, method="dense", sparsity=0.5, seed=15)]
    assert [row.seeds for row in rows(found)] == [(14, 15)]


def test_what_goes_by_one_name_and_differs_is_told_apart():
    found = [line(70, method="set", variant="SET"), line(71, method="set", zeta=0.5, variant="SET")]
    assert [row.variant for row in rows(found)] == ["SET, zeta 0.3", "SET, zeta 0.5"]


def test_older_lines_have_the_name_of_their_method():
    found = line(70, method="rigl")
    for name in ("variant", "flops", "validation_accuracy"):
        del found[name]
    row = rows([found])[0]
    assert (row.variant, row.accuracy.mean) == ("RigL", 70)


def test_images_held_out_make_it_a_screening_and_its_accuracy_is_theirs():
    row = rows([line(70.5, method="set", validation=5000, test=0.99)])[0]
    assert (row.metric, row.accuracy.mean) == ("validation", 70.5)


def test_a_screening_without_its_accuracy_is_named():
    found = line(70, method="set", validation=5000)
    del found["validation_accuracy"]
    with pytest.raises(ConfigurationError, match="result of SET, seed 14, has no validation_accuracy"):
        rows([found])


def test_an_accuracy_that_is_no_number_is_named():
    with pytest.raises(ConfigurationError, match="result of SET, seed 14, has no test_accuracy"):
        rows([line(70, method="set") | {"test_accuracy": "70 %"}])


# -------------------------------------------------------------------------------------------------------- tables


def test_no_lines_make_no_table():
    assert tables([]) == []
    assert rendering.text([]) == rendering.markdown([]) == "No complete runs yet."


@pytest.mark.parametrize(
    "changes",
    [
        {"validation": 5000},
        {"dataset": "uoft-cs/cifar100"},
        {"epochs": 24},
        {"width": 0.5},
        {"lr": 0.05},
        {"crop": 4},
        {"precision": "float32"},
    ],
)
def test_what_is_not_alike_never_mixes(changes):
    found = tables(THREE + lines(SET, method="set", **changes) + lines(CHTS, method="chts", **changes))
    assert len(found) == 2
    assert len({table.title for table in found}) == 2
    assert sorted(len(table.rows) for table in found) == [2, 3]
    for table in found:
        assert {row.metric for row in table.rows} == {table.metric}


def test_titles_say_what_tells_tables_apart_and_no_more():
    found = tables(THREE + lines(SET, method="set", crop=4, epochs=24))
    assert [table.title for table in found] == [
        "CIFAR-10, vgg16 at width 0.25, 12 epochs, crop 0",
        "CIFAR-10, vgg16 at width 0.25, 24 epochs, crop 4",
    ]
    assert tables(THREE)[0].title == "CIFAR-10, vgg16 at width 0.25, 12 epochs"
    screening = tables(lines(SET, method="set", validation=5000))[0].title
    assert screening == "CIFAR-10, vgg16 at width 0.25, 12 epochs, 5,000 images held out"


def test_every_variant_is_compared_with_the_baselines_of_its_sparsity_and_each_pair_once():
    found = lines(CHTS, method="chts", sparsity=0.9) + lines(SET, method="set", sparsity=0.9) + THREE
    assert pairs_of(tables(found)[0]) == [
        ("CHTs", "SET", 0.9), ("RigL", "SET", 0.95), ("CHTs", "SET", 0.95), ("CHTs", "RigL", 0.95),
    ]  # fmt: skip


def test_dense_runs_are_compared_with_nothing():
    assert pairs_of(tables(lines(SET, method="dense") + lines(SET, method="set"))[0]) == []


def test_baselines_are_the_plain_variants():
    better = lines(RIGL, method="rigl", allocation="layer", variant="A RigL at its best")
    assert pairs_of(tables(better + THREE)[0]) == [
        ("RigL", "SET", 0.95),
        ("A RigL at its best", "SET", 0.95),
        ("A RigL at its best", "RigL", 0.95),
        ("CHTs", "SET", 0.95),
        ("CHTs", "RigL", 0.95),
    ]


def test_a_baseline_of_the_same_allocation_comes_before_the_plain_one():
    moving = {"allocation": "layer"}
    found = THREE + lines(SET, method="set", **moving) + lines(CHTS, method="chts", **moving)
    pairs = pairs_of(tables(found)[0])
    assert [pair for pair in pairs if pair[0].endswith("layer")] == [
        ("SET, allocation layer", "SET", 0.95),
        ("SET, allocation layer", "RigL", 0.95),
        ("CHTs, allocation layer", "SET, allocation layer", 0.95),
        ("CHTs, allocation layer", "RigL", 0.95),
    ]
    both = found + lines(RIGL, method="rigl", **moving)
    pairs = [pair[:2] for pair in pairs_of(tables(both)[0])]
    assert ("RigL, allocation layer", "SET, allocation layer") in pairs
    assert ("SET, allocation layer", "RigL, allocation layer") not in pairs
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)


def test_without_a_plain_one_the_first_is_the_baseline():
    found = lines(SET, method="set", zeta=0.5) + lines(SET, method="set", zeta=0.1) + lines(CHTS, method="chts")
    assert pairs_of(tables(found)[0]) == [("SET, zeta 0.5", "SET, zeta 0.1", 0.95), ("CHTs", "SET, zeta 0.1", 0.95)]


@pytest.mark.parametrize("elsewhere", [{"distribution": "erk"}, {"layers": "features.[!0]*"}])
def test_links_in_other_layers_are_compared_with_baselines_that_have_theirs_there_too(elsewhere):
    found = THREE + lines(CHTS, method="chts", **elsewhere) + lines(SET, method="set", **elsewhere)
    assert [(a.startswith("CHTs, "), b.startswith("SET, ")) for a, b, _ in pairs_of(tables(found)[0])] == [
        (False, False),
        (False, False),
        (False, False),
        (True, True),
    ]


def test_a_changing_density_is_compared_with_baselines_that_change_alike():
    cubic = {"density": "cubic", "initial_sparsity": 0.5}
    found = THREE + lines(CHTS, method="chtss") + lines(CHTS, method="cht", **cubic)
    found += lines(RIGL, method="granet") + lines(SET, method="set", **cubic)
    compared = [pair[:2] for pair in pairs_of(tables(found)[0])]
    changing = "SET, density cubic, initial sparsity 0.5"
    assert compared == [
        ("RigL", "SET"),
        ("GraNet", changing),
        ("CHT, density cubic, initial sparsity 0.5", changing),
        ("CHT, density cubic, initial sparsity 0.5", "GraNet"),
        ("CHTs", "SET"),
        ("CHTs", "RigL"),
    ]


def test_layers_that_are_pruned_together_have_other_numbers_of_links():
    falling = {"density": "cubic", "initial_sparsity": 0.5}
    found = lines(SET, method="set", **falling) + lines(RIGL, method="granet", allocation="model")
    assert pairs_of(tables(found + lines(CHTS, method="chts", **falling))[0]) == [
        ("CHTs, density cubic, initial sparsity 0.5", "SET, density cubic, initial sparsity 0.5", 0.95)
    ]
    both = found + lines(CHTS, method="chts", allocation="model", **falling)
    assert [pair[1] for pair in pairs_of(tables(both)[0])] == ["GraNet, allocation model"]


def test_link_prediction_is_compared_with_controls_that_are_alike_and_controls_with_none():
    alike = {"allocation": "layer", "windows": "all"}
    found = tables(
        lines(CHTS, method="chts")
        + lines(CHTS, method="chts", kernel_shares="links", **alike)
        + lines(SET, method="set", allocation="layer")
        + lines(RIGL, method="occupancy", **alike)
        + lines(RIGL, method="shuffled")
        + lines(RIGL, method="occupancy", sparsity=0.9)
    )
    pairs = [pair[:2] for pair in pairs_of(found[0]) if not pair[1].startswith("SET")]
    controlled = "CHTs, all windows, allocation layer, kernel shares links"
    assert pairs == [
        ("CHTs", "shuffled scores"), (controlled, "slice occupancy, all windows, allocation layer"),
    ]  # fmt: skip


def test_controls_are_alike_also_where_they_take_no_notice_or_links_move_by_themselves():
    found = tables(
        lines(CHTS, method="chts", windows="all")
        + lines(SET, method="cht", prune_dead=True)
        + lines(SET, method="cht_gradient", predictor="occupancy")
        + lines(RIGL, method="in_bounds")
        + lines(RIGL, method="occupancy")
        + lines(RIGL, method="occupancy", allocation="layer")
    )
    assert {pair[:2] for pair in pairs_of(found[0])} == {
        ("CHTs, all windows", "share of windows"),
        ("CHT, prune dead", "slice occupancy, allocation layer"),
    }


def test_the_controls_are_the_methods_that_say_so():
    assert set(CONTROL_METHODS) == {name for name, known in METHODS.items() if known.summary.startswith("control")}


def test_comparisons_are_paired_over_common_seeds():
    each = tables(THREE[:-1])[0].comparisons[-1]
    assert (each.variant, each.baseline, each.paired.n) == ("CHTs", "RigL", 2)
    first = tables(THREE)[0].comparisons[1]
    assert (first.variant, first.baseline) == ("CHTs", "SET")
    assert first.paired.difference == pytest.approx(1.7133, abs=1e-4)
    assert first.paired.p == pytest.approx(float(stats.ttest_rel(list(CHTS.values()), list(SET.values())).pvalue))


def test_holm_is_over_everything_of_a_metric_and_of_that_alone():
    other = {"dataset": "uoft-cs/cifar100"}
    found = THREE + lines(CHTS, method="chts", **other) + lines(RIGL, method="set", **other)
    held_out = lines(CHTS, method="chts", validation=5000) + lines(SET, method="set", validation=5000)
    together = tables(found + held_out)
    for metric, count in (("test", 4), ("validation", 1)):
        family = [each for table in together if table.metric == metric for each in table.comparisons]
        assert len(family) == count
        assert [each.holm for each in family] == holm([each.paired.p for each in family])
    assert [table.comparisons for table in tables(found)] == [t.comparisons for t in together if t.metric == "test"]


def test_one_seed_has_a_difference_and_no_interval():
    found = tables([line(74, method="chts"), line(72, method="set")])[0]
    each = found.comparisons[0]
    assert (each.paired.n, each.paired.difference, each.paired.interval, each.holm) == (1, 2, None, None)
    assert found.rows[0].accuracy.standard_error is None


# ----------------------------------------------------------------------------------------------------- the paper

# As printed.
PRINTED = """\
0% Dense 92.28 ± 0.11 72.19 ± 0.17
50% SET 91.64 ± 0.10 71.76 ± 0.13
50% CHT-CH2 91.99 ± 0.13 71.72 ± 0.13
50% CHT-CH3 91.99 ± 0.13 71.72 ± 0.13
70% SET 91.40 ± 0.19 70.56 ± 0.15
70% CHT-CH2 91.88 ± 0.18 70.48 ± 0.23
70% CHT-CH3 91.61 ± 0.02 70.51 ± 0.18
"""


def paper_cells():
    return [cell for grid in table1().values() for cell in grid.cells()]


def paper_line(cell, accuracy, **changes):
    return line(accuracy, variant=cell.variant, usual=cell.config, seed=cell.seed, **changes)


def cifar10(**changes):
    """The paper's run of CHT on CIFAR-10 at 70 %, with changes."""
    return line(91.5, usual=recipe("paper-cifar10"), **changes)


def test_table_1_is_what_is_printed():
    printed = {}
    for text in PRINTED.splitlines():
        sparsity, method, *numbers = text.replace("± ", "").split()
        for dataset, (mean, error) in zip(("cifar10", "cifar100"), (numbers[:2], numbers[2:]), strict=True):
            printed[dataset, float(sparsity[:-1]) / 100, method] = (float(mean), float(error), 3)
    ours = {
        (cell.dataset, cell.sparsity, cell.name): (cell.accuracy.mean, cell.accuracy.standard_error, cell.accuracy.n)
        for cell in TABLE_1
    }
    assert ours == printed
    assert len(TABLE_1) == 14


def test_every_run_of_our_table_1_has_its_cell_of_the_papers():
    cells = paper_cells()
    assert len(cells) == 42
    found = [paper_cell(paper_line(cell, 90)) for cell in cells]
    assert all(found.count(each) == 3 for each in TABLE_1)
    for cell, theirs in zip(cells, found, strict=True):
        assert theirs.name.lower() == cell.variant.lower()
        assert (theirs.dataset, theirs.sparsity) == (Path(cell.config.data.dataset).name, cell.sparsity)
        assert readings(paper_line(cell, 90)) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 0.25}, {"epochs": 99}, {"optimizer": "sgd"}, {"lr": 0.1}, {"batch_size": 64}, {"schedule": "cosine"},
        {"validation": 5000}, {"flip": False}, {"sparsity": 0.9}, {"method": "chts"}, {"method": "rigl"},
        {"graph": "layer"}, {"predictor": "occupancy"}, {"layers": "features.[!0]*"}, {"distribution": "erk"},
        {"allocation": "layer"}, {"removal": "soft_magnitude"}, {"regrowth": "uniform"},
        {"smoothing": 0.5}, {"density": "cubic", "initial_sparsity": 0.5},
        {"dataset": "uoft-cs/cifar100"}, {"dataset": "digits"},
    ],
)  # fmt: skip
def test_other_runs_have_no_cell(changes):
    found = cifar10(**changes)
    assert paper_cell(found) is None
    assert readings(found) == {}
    row = rows([found])[0]
    assert (row.paper, row.difference, row.interval) == (None, None, None)


def test_a_part_of_the_images_is_not_the_papers_data_set():
    found = cifar10()
    assert paper_cell(found).name == "CHT-CH3"
    found["dataset"]["train"] = 10_000
    assert paper_cell(found) is None
    assert paper_cell({"config": found["config"]}) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"crop": 4}, {"crop": 4}),
        ({"warmup_epochs": 1.0, "final_lr": 0.01, "decay_end": 0.9},
         {"warmup_epochs": 1.0, "final_lr": 0.01, "decay_end": 0.9}),
        ({"zeta": 0.5, "head": 512}, {"zeta": 0.5, "head": 512}),
        ({"precision": "bf16", "device": "cuda", "threads": 4, "backend": "dense"}, {"precision": "bf16"}),
        ({"allocation": "kernel", "removal": "magnitude", "density": "constant"}, {}),
    ],
)  # fmt: skip
def test_what_the_paper_leaves_open_is_compared_and_named(changes, expected):
    found = cifar10(**changes)
    assert paper_cell(found) == next(
        c for c in TABLE_1 if (c.dataset, c.sparsity, c.name) == ("cifar10", 0.7, "CHT-CH3")
    )
    assert readings(found) == expected


def test_the_difference_to_the_paper_is_welchs():
    values = (91.2, 91.9, 91.7)
    row = rows([cifar10(seed=seed) | {"test_accuracy": value / 100} for seed, value in enumerate(values, 14)])[0]
    # Three runs with the paper's mean and standard error: one at the mean, two as far from it as gives s = sqrt(3) e.
    theirs = [91.61 + 0.02 * 3**0.5 * side for side in (-1, 0, 1)]
    interval = stats.ttest_ind(values, theirs, equal_var=False).confidence_interval(0.95)
    assert row.difference == pytest.approx(91.6 - 91.61)
    assert (row.interval.low, row.interval.high) == pytest.approx((interval.low, interval.high))


def test_one_line_that_is_no_run_of_the_papers_takes_the_comparison_from_its_row():
    part = cifar10(seed=15)
    part["dataset"]["train"] = 49_000
    assert rows([cifar10(), part])[0].paper is None


# ------------------------------------------------------------------------------------------------------ reading


def table_1_lines(**changes):
    chance = random.Random(0)
    means = {(cell.dataset, cell.sparsity, cell.name.lower()): cell.accuracy.mean for cell in TABLE_1}
    found = []
    for cell in paper_cells():
        key = (Path(cell.config.data.dataset).name, cell.sparsity, cell.variant.lower())
        found.append(paper_line(cell, chance.gauss(means[key], 0.3), **changes))
    return found


def test_the_terminal_shows_the_real_results():
    text = rendering.text(tables(read_lines(RESULTS)))
    assert "CIFAR-10, vgg16 at width 0.25, 12 epochs" in text
    for name in ("dense", "static", "SET", "CHT", "CHTs"):
        assert re.search(rf"^.{{10}}{name} ", text, re.MULTILINE), name


RESULTS_TEXT = """\
sparsity  variant  n   seeds      accuracy  train  infer   new  ITOP  empty  seconds
------------------------------------------------------------------------------------
0%        dense    2  14, 15  84.60 ± 0.10  30.0%  20.0%  0.80  0.25   0.60      114
90%       SET      1      14  73.00         30.0%  20.0%  0.80  0.25   0.60      114
95%       SET      3   14-16  72.38 ± 0.25  30.0%  20.0%  0.80  0.25   0.60      115
          RigL     3   14-16  72.85 ± 0.26  30.0%  20.0%  0.80  0.25   0.60      115
          CHTs     3   14-16  74.09 ± 0.39  30.0%  20.0%  0.80  0.25   0.60      115"""

# The numbers are what scipy.stats says: ttest_rel, pearsonr, ttest_ind(equal_var=False).
COMPARISONS_TEXT = """\
sparsity  variant  minus            difference      p  Holm p  pairs      r  unpaired
-------------------------------------------------------------------------------------
95%       RigL     SET    +0.47 [-1.71, +2.65]  0.451   0.451      3  -0.98      1.00
          CHTs     SET    +1.71 [+0.75, +2.68]  0.017   0.050      3   0.84      1.38
                   RigL   +1.24 [-1.50, +3.99]  0.190   0.381      3  -0.93      1.38"""


def test_a_table_reads_well():
    found = [*THREE, *lines({14: 84.5, 15: 84.7}, method="dense"), line(73.0, method="set", sparsity=0.9)]
    assert rendering.text_sheet(sheets(tables(found))[0]) == RESULTS_TEXT


def test_comparisons_read_well():
    assert rendering.text_sheet(sheets(tables(THREE))[1]) == COMPARISONS_TEXT


def test_the_papers_table_reads_like_it():
    sheet = paper_sheet(tables(table_1_lines()))
    assert sheet.header == (
        "sparsity", "method", "CIFAR-10, ours", "CIFAR-10, n", "CIFAR-10, paper", "CIFAR-10, difference",
        "CIFAR-100, ours", "CIFAR-100, n", "CIFAR-100, paper", "CIFAR-100, difference",
    )  # fmt: skip
    assert [f"{row[0]} {row[1]} {row[4]} {row[8]}" for row in sheet.rows] == PRINTED.splitlines()
    for row in sheet.rows:
        for ours, n, difference in ((row[2], row[3], row[5]), (row[6], row[7], row[9])):
            assert re.fullmatch(r"\d\d\.\d\d ± \d\.\d\d", ours)
            assert n == "3"
            assert re.fullmatch(r"[+-]\d\.\d\d \[[+-]\d\.\d\d, [+-]\d\.\d\d\]", difference)


def test_other_readings_have_a_line_of_their_own():
    found = table_1_lines() + [each for each in table_1_lines(crop=4) if each["config"]["dataset"] == "cifar10"]
    sheet = paper_sheet(tables(found))
    assert len(sheet.rows) == 14
    assert [row[1] for row in sheet.rows[:4]] == ["Dense", "Dense, crop 4", "SET", "SET, crop 4"]
    assert sheet.rows[1][2] == sheet.rows[0][2]
    assert sheet.rows[1][6:8] == ("", "")


def test_the_papers_rows_without_a_run_of_ours_are_empty():
    sheet = paper_sheet(tables([cifar10()]), ["cifar10"])
    assert sheet.header == ("sparsity", "method", "ours", "n", "paper", "difference")
    assert [row[2:4] for row in sheet.rows] == [("", "")] * 6 + [("91.50", "1")]
    assert sheet.rows[-1] == ("70%", "CHT-CH3", "91.50", "1", "91.61 ± 0.02", "-0.11")


def everything():
    """Long names, missing seeds, one seed, screenings, data sets and readings."""
    found = [*THREE, *table_1_lines(), *table_1_lines(crop=4), *lines(SET, method="set", validation=5000)]
    long = {"distribution": "erk", "allocation": "layer", "layers": "features.[!0]*", "zeta": 0.5}
    found += lines({14: 73}, method="rigl", **long) + lines({14: 70, 17: 71}, method="mest", **long)
    return found + lines(CHTS, method="chts", validation=5000, variant="CHTs | in\n two, " + "x" * 60)


def test_a_terminal_of_100_columns_holds_everything():
    text = rendering.text(tables(everything()))
    assert max(map(len, text.splitlines())) <= 100
    assert "\n\n\n" not in text
    assert not any(each != each.rstrip() for each in text.splitlines())


def test_markdown_has_as_many_cells_in_every_row():
    for sheet in sheets(tables(everything()), together=True):
        cells = [re.split(r"(?<!\\)\|", row) for row in rendering.markdown_sheet(sheet).splitlines()]
        assert len(cells) == len(sheet.rows) + 2
        assert {len(row) for row in cells} == {len(sheet.header) + 2}


def test_no_number_is_lost_on_the_way():
    text, marked = rendering.text(tables(THREE)), rendering.markdown(tables(THREE))
    for sheet in sheets(tables(THREE)):
        for cell in (cell for row in sheet.rows for cell in row):
            assert cell in text
            assert cell in marked


def test_every_column_that_needs_it_is_explained_and_no_other():
    for found in (THREE, table_1_lines(), [line(70, method="dense")]):
        shown = {name for sheet in sheets(tables(found)) for name in sheet.header}
        explained = {name for name in LEGEND if re.search(rf"^{name} +\w", rendering.text(tables(found)), re.MULTILINE)}
        assert explained == shown & set(LEGEND)


def test_a_screening_says_so():
    test, screening = tables(THREE + lines(SET, method="set", validation=5000))
    assert "Test accuracy of the last epoch" in sheets([test])[0].title
    assert "Screening" in sheets([screening])[0].title
    assert "images held out" in sheets([screening])[0].title


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([14], "14"), ([15, 14], "14, 15"), ([18, 14, 15, 16, 16], "14-16, 18")]
)
def test_seeds_are_short(numbers, text):
    assert ranges(numbers) == text


def test_every_method_has_a_name():
    assert set(METHOD_NAMES) == {"dense", *METHODS}
    assert Cell("SET", Config()).variant in METHOD_NAMES.values()
