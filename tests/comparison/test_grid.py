"""Grids: which runs come of them, under which names, and what is refused."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import train
from torch import nn

from chtconv.comparison.cell import METHOD_NAMES, Cell, slug
from chtconv.comparison.grid import AXES, PLURALS, Grid, canonical, grid_from, read_toml
from chtconv.comparison.table1 import table1
from chtconv.errors import ConfigurationError
from chtconv.methods import METHODS
from chtconv.training import Config, recipe
from chtconv.training.config import DENSE, SECTIONS
from chtconv.training.run import _topology

SHORT = recipe("cifar-short")


def names(grid: Grid) -> list[str]:
    return [cell.name for cell in grid.cells()]


def test_every_method_has_a_name_of_its_own() -> None:
    assert set(METHOD_NAMES) == {DENSE, *METHODS}
    assert len({slug(name) for name in METHOD_NAMES.values()}) == len(METHOD_NAMES)


def test_every_combination_is_a_cell_seed_by_seed() -> None:
    grid = grid_from({"methods": ["set", "chts"], "sparsities": [0.5, 0.9], "seeds": [3, 1], "epochs": 2})
    expected = [
        f"{method}-{sparsity}-seed{seed}"
        for seed, sparsity, method in itertools.product((3, 1), (0.5, 0.9), ("set", "chts"))
    ]
    assert names(grid) == expected
    for cell in grid.cells():
        assert cell.config == Config().replace(epochs=2, method=cell.method, sparsity=cell.sparsity, seed=cell.seed)


def test_what_a_method_does_not_use_makes_no_further_run() -> None:
    grid = grid_from({
        "methods": ["dense", "static", "set", "rigl", "cht", "chts", "occupancy"],
        "predictors": ["ch2_l3n", "ch3_l3n"], "graphs": ["kernel", "layer"], "temperature": [1.0, 4.0],
        "zeta": [0.1, 0.3], "sparsities": [0.5, 0.9], "seeds": [0],
    })  # fmt: skip
    count = {method: sum(cell.method == method for cell in grid.cells()) for method in METHOD_NAMES}
    assert {method: number for method, number in count.items() if number} == {
        "dense": 1, "static": 2, "set": 2 * 2, "rigl": 2 * 2, "cht": 2 * 2 * 2 * 2, "chts": 2 * 2 * 2 * 2 * 2,
        "occupancy": 2 * 2 * 2,
    }  # fmt: skip
    assert len({cell.config for cell in grid.cells()}) == len(grid.cells()) == len(set(names(grid)))


# What a method is given, another value of it, and whether that makes a difference.
SAME = [
    ({"method": "gmp"}, {"zeta": 0.7}, True),
    ({"method": "gmp"}, {"zeta_schedule": "linear"}, True),
    ({"method": "gmp"}, {"early_stop": 0.1}, True),
    ({"method": "gmp"}, {"density": "sigmoid"}, False),
    ({"method": "granet"}, {"zeta": 0.7}, False),
    ({"method": "occupancy"}, {"smoothing": 0.5}, True),
    ({"method": "occupancy"}, {"graph": "layer"}, True),
    ({"method": "occupancy"}, {"windows": "all"}, False),
    ({"method": "chts", "predictor": "occupancy"}, {"graph": "layer"}, True),
    ({"method": "chts", "predictor": "occupancy"}, {"smoothing": 0.5}, True),
    ({"method": "chts", "predictor": "in_bounds"}, {"windows": "all"}, True),
    ({"method": "chts", "predictor": "in_bounds", "smoothing": 0.5}, {"windows": "all"}, False),
    ({"method": "chts"}, {"smoothing": 0.5}, False),
    ({"method": "chts"}, {"graph": "layer"}, False),
    ({"method": "chts"}, {"explore": 0.5}, False),
    ({"method": "chts", "allocation": "layer"}, {"kernel_shares": "equal"}, False),
    ({"method": "chts"}, {"kernel_shares": "equal"}, True),
    ({"method": "cht"}, {"temperature": 4.0}, True),
    ({"method": "set"}, {"predictor": "ch2_l3n", "graph": "layer", "windows": "all", "explore": 0.5}, True),
    ({"method": "static"}, {"zeta": 0.7, "evolutions_per_epoch": 9.0}, True),
]


@pytest.mark.filterwarnings("ignore::chtconv.errors.ChtconvWarning")
@pytest.mark.parametrize(("given", "other", "same"), SAME)
def test_what_is_one_run_ends_with_the_same_masks_and_what_is_two_does_not(given, other, same) -> None:
    table = {"method": given["method"], "seed": 1, "sparsity": 0.6}
    changed = {**given, **other}
    shared = {name: value for name, value in given.items() if name != "method" and name not in other}
    both = {name: [given.get(name, getattr(SHORT.topology, name)), changed[name]] for name in other}
    cells = grid_from({"recipe": "cifar-short", **table, **shared, **both}).cells()
    assert (len(cells) == 1) == same
    ends = []
    for values in (given, changed):
        config = SHORT.replace(**table | values)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten())
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
        topology = _topology(config, model, torch.optim.SGD(model.parameters(), lr=0.1), steps=12)
        optimizer = topology._optimizers[0]
        train(model, optimizer, 30)
        ends.append(topology.masks)
    equal = all(torch.equal(mask, ends[1][name]) for name, mask in ends[0].items())
    assert equal == same


def test_a_methods_own_values_are_the_same_named_or_not() -> None:
    plain = canonical(SHORT.replace(method="granet"), SHORT)
    named = {"removal": "magnitude", "density": "cubic", "initial_sparsity": 0.5, "allocation": "kernel"}
    assert canonical(SHORT.replace(method="granet", **named), SHORT) == plain
    assert canonical(SHORT.replace(method="snfs", allocation="layer"), SHORT) == SHORT.replace(method="snfs")
    assert canonical(SHORT.replace(method="granet", allocation="layer"), SHORT) != plain
    assert canonical(SHORT.replace(method="granet", initial_sparsity=0.4), SHORT) != plain
    shares = {"method": "chts", "kernel_shares": "links"}
    assert canonical(SHORT.replace(**shares), SHORT) == SHORT.replace(method="chts")
    assert canonical(SHORT.replace(**shares, allocation="layer"), SHORT) == SHORT.replace(
        method="chts", allocation="layer"
    )
    within = SHORT.replace(method="chts", kernel_shares="scores", allocation="layer")
    assert canonical(within, SHORT) == within
    assert canonical(SHORT.replace(method="rigl", smoothing=0.5), SHORT) == SHORT.replace(method="rigl")
    assert SHORT.replace(layers="features.0, features.3") == SHORT.replace(layers="features.0,features.3")
    residual = SHORT.replace(model="resnet18")
    assert canonical(residual.replace(dropout=0.1), SHORT) == canonical(residual, SHORT)
    assert canonical(SHORT.replace(dropout=0.1), SHORT) != SHORT
    assert canonical(SHORT.replace(method="chts", smoothing=0.0), SHORT) == SHORT.replace(method="chts")
    for usual in (SHORT, SHORT.replace(zeta_schedule=None), SHORT.replace(zeta_schedule="constant")):
        for method, own in (("set", "cosine"), ("mest", "linear")):
            named, plain = (usual.replace(method=method, zeta_schedule=each) for each in (own, None))
            assert canonical(named, usual) == canonical(plain, usual)
            assert canonical(usual.replace(method=method), usual) == usual.replace(method=method)
            assert canonical(usual.replace(method=method, zeta_schedule="constant"), usual) != canonical(plain, usual)
    adam = SHORT.replace(optimizer="adam", schedule="constant")
    assert canonical(adam.replace(momentum=0.5, final_lr=0.1, decay_end=0.5), SHORT) == adam
    assert canonical(SHORT.replace(momentum=0.5, final_lr=0.1, decay_end=0.5), SHORT) != SHORT
    for name, windows in (("cht", "in_bounds"), ("in_bounds", "all")):
        smoothed = SHORT.replace(method=name, smoothing=0.5, windows=windows)
        assert canonical(smoothed, SHORT) == smoothed


@given(
    method=st.sampled_from([DENSE, *METHODS]),
    values=st.fixed_dictionaries(
        {},
        optional={
            "predictor": st.sampled_from(["ch2_l3n", "ch3_l3n"]),
            "graph": st.sampled_from(["kernel", "layer"]),
            "temperature": st.sampled_from([0.5, 4.0]),
            "initial_sparsity": st.sampled_from([0.2, 0.4]),
            "zeta": st.sampled_from([0.1, 0.3]),
        },
    ),
)
def test_the_canonical_form_is_one_for_all_that_is_the_same(method: str, values: dict[str, Any]) -> None:
    config = canonical(SHORT.replace(method=method, **values), SHORT)
    assert canonical(config, SHORT) == config
    assert config.topology.method == method
    kept = {name for name in values if getattr(config.topology, name) == values[name]}
    if method in ("chts", "chtss"):
        assert kept >= values.keys() - {"initial_sparsity"}
    assert config.to_dict().items() >= {"lr": SHORT.optimisation.lr, "seed": SHORT.machine.seed}.items()


def test_variants_are_combined_with_the_axes_that_they_do_not_name() -> None:
    grid = grid_from({
        "sparsities": [0.9, 0.95], "seeds": [0, 1], "temperature": [1.0, 4.0],
        "variants": [
            {"name": "RigL, ERK", "method": "rigl", "allocation": "layer", "distribution": "erk"},
            {"name": "soft", "method": "chts", "sparsity": 0.8},
        ],
    })  # fmt: skip
    assert [name for name in names(grid) if name.endswith("seed0")] == [
        "soft-0.8-seed0", "soft-temperature-4-0.8-seed0", "rigl-erk-0.9-seed0", "rigl-erk-0.95-seed0",
    ]  # fmt: skip
    assert {cell.config.topology.distribution for cell in grid.cells() if cell.variant == "RigL, ERK"} == {"erk"}


def test_the_name_of_a_variant_lies_in_one_line() -> None:
    variants = [{"name": " CHTs,  layer\n graph ", "method": "chts", "graph": "layer"}]
    assert [cell.variant for cell in grid_from({"seed": 5, "variants": variants}).cells()] == ["CHTs, layer graph"]
    with pytest.raises(ConfigurationError, match="two variants are called 'CHTs, layer graph'"):
        grid_from({"variants": [*variants, {"name": "CHTs, layer graph", "method": "set"}]})


def test_methods_stand_beside_variants() -> None:
    grid = grid_from({"method": "set", "seed": 5, "variants": [{"name": "layer", "method": "chts", "graph": "layer"}]})
    assert names(grid) == ["set-0.9-seed5", "layer-0.9-seed5"]


def test_some_of_the_runs_are_those_of_the_whole() -> None:
    grid = grid_from({
        "methods": ["dense", "set", "chts"], "sparsities": [0.9, 0.95], "seeds": [1, 0], "variants": [
            {"name": "CHTs, ERK", "method": "chts", "distribution": "erk"},
            {"name": "SET, layers features.[!0]*", "method": "set", "layers": "features.[!0]*"},
            {"name": "SET, layers features.[!0]*, ERK", "method": "set", "layers": "*[!0]", "distribution": "erk"},
        ],
    })  # fmt: skip
    for names, chosen in (
        (["dense"], {"dense"}),
        (["CHTs, *"], {"CHTs, ERK"}),
        (["SET, layers features.[!0]*"], {"SET, layers features.[!0]*"}),  # no wildcards where it is a name
        (["SET", "CHT?"], {"SET", "CHTs"}),
        (["*ERK"], {"CHTs, ERK", "SET, layers features.[!0]*, ERK"}),
    ):
        some = grid.only(names)
        assert some.cells() == [cell for cell in grid.cells() if cell.variant in chosen]
        assert {cell.variant for cell in some.cells()} == chosen
    assert grid.only(["*"]).cells() == grid.cells()
    narrowed = grid.only(["CHTs*", "SET"]).only(["SET", "*ERK"])
    assert narrowed.cells() == grid.only(["CHTs, ERK", "SET"]).cells()


@pytest.mark.parametrize("names", [["SET", "CHT"], ["set"], [""], ["SET,*"]])
def test_some_runs_that_are_not_there_are_named(names: list[str]) -> None:
    grid = grid_from({"methods": ["set", "chts"], "seeds": [0]})
    with pytest.raises(ConfigurationError, match=re.escape(f"unknown variant of the grid {names[-1]!r}: ")) as caught:
        grid.only(names)
    assert "Accepted: 'SET', 'CHTs'." in str(caught.value)
    with pytest.raises(ConfigurationError, match="unknown variant of the grid 'set': did you mean 'SET'"):
        grid.only(["set"])
    with pytest.raises(ConfigurationError, match="unknown variant of the grid 'SET'"):
        grid.only(["CHTs"]).only(["SET"])


def test_a_toml_file_and_what_goes_before_it(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text('recipe = "cifar-short"\nmethods = ["set"]\nsparsities = [0.9]\nstop-fraction = 0.5\nepochs = 3\n')
    grid = grid_from(read_toml(path), epochs=4, seed=[7])
    assert grid.base == SHORT.replace(epochs=4, stop_fraction=0.5)
    assert names(grid) == ["set-stop-fraction-0.5-0.9-seed7"]


def test_text_in_a_table_means_what_it_means_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_bytes(
        b'\xef\xbb\xbfflip = "yes"\r\nhead = "none"\r\nmethods = ["set"]\r\nseeds = [1]\r\n'
        b'allocation = ["none", "kernel"]\r\n'
        b'[[variants]]\r\nname = "mine"\r\nmethod = "chts"\r\ntemperature = "none"\r\nprune-dead = "yes"\r\n'
    )
    grid = grid_from(read_toml(path))
    assert grid.base == Config().replace(flip=True, head=None)
    assert grid.axes["allocation"] == (None, "kernel")
    assert {cell.config.topology.prune_dead for cell in grid.cells() if cell.method == "chts"} == {True}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"recipe": "quick", "width": 0.5, "seeds": [1], "epochs": 2, "seed": 2}, "seeds, seed: the same value"),
        ({"seeds": [1, True]}, "seed=True: accepted is a whole number"),
        ({"flip": "maybe"}, "flip='maybe': accepted is yes or no"),
        ({"variants": [{"name": "a", "zeta": "much"}]}, "zeta='much': accepted is a number"),
        (
            {"variants": [{"name": "CHTs \u03b1", "method": "set"}, {"name": "CHTs \u03b2", "method": "cht"}]},
            "accepted are names of variants that differ in letters a to z, digits or points",
        ),
        ({"zetas": 0.1}, "unknown value of a grid 'zetas': did you mean 'zeta'"),
        ({"epochs": [1, 2]}, "epochs takes one value for all runs"),
        ({"methods": ["sett"]}, "unknown method 'sett': did you mean 'set'"),
        ({"sparsity": 1.5}, "sparsity=1.5: accepted is a number, at least 0 and below 1"),
        ({"seeds": []}, "seed: accepted is at least one value"),
        ({"seeds": [[1]]}, "accepted are single values"),
        ({"seeds": [0.5]}, "seed=0.5: accepted is a whole number"),
        ({"sparsity": 0.9, "sparsities": [0.9]}, "named twice"),
        ({"recipe": "papers"}, "unknown recipe 'papers'"),
        ({"recipe": ["quick"]}, "recipe=['quick']: accepted is a name"),
        ({"seeds": {"first": 1}}, "seed={'first': 1}: accepted are single values"),
        ({"methods": {"set": 1}}, "method={'set': 1}: accepted are single values"),
        ({"variants": [{"name": 3, "method": "set"}]}, "variants: accepted is a list of tables, each with a name"),
        ({"variants": [{"name": ["a"], "method": "set"}]}, "variants: accepted is a list of tables, each with a name"),
        ({"variants": [{"name": " ", "method": "set"}]}, "variants: accepted is a list of tables, each with a name"),
        ({"variants": {"name": "a"}}, "variants: accepted is a list of tables"),
        ({"variants": [{"method": "set"}]}, "variants: accepted is a list of tables, each with a name"),
        ({"variants": [{"name": "a", "epochs": 2}]}, "variant 'a': epochs is the same for all runs"),
        ({"variants": [{"name": "a", "zetta": 2}]}, "variant 'a': unknown value 'zetta': did you mean 'zeta'"),
        ({"variants": [{"name": "a", "seed": 2}]}, "variant 'a': seed varies for all variants alike; accepted are"),
        ({"variants": [{"name": "a", "seeds": [2]}]}, "variant 'a': seeds varies for all variants alike; accepted are"),
        (
            {"variants": [{"name": "a", "methods": ["set"]}]},
            "variant 'a': methods takes several values; method takes one",
        ),
        ({"variants": [{"name": "a", "recipe": "quick"}]}, "variant 'a': recipe is the same for all runs"),
        (
            {"methods": ["set"], "variants": [{"name": "mine", "method": "set", "graph": "layer"}]},
            "'SET' and 'mine' are one and the same run: leave one of them out",
        ),
        ({"variants": [{"name": "a", "method": "set"}, {"name": "a", "method": "cht"}]}, "two variants are called 'a'"),
        (
            {"variants": [{"name": "a b", "method": "set"}, {"name": "a-b", "method": "cht"}]},
            "two runs are called 'a-b-0.9-seed14' ('a b' and 'a-b') and differ in method",
        ),
    ],
)
def test_what_is_no_grid_is_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        grid_from(table)


def test_a_toml_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text("methods = = 1")
    with pytest.raises(ConfigurationError, match=r"cannot read the grid .*grid\.toml: .*line 1"):
        read_toml(tmp_path / "grid.toml")


def test_axes_are_the_topology_and_the_seed() -> None:
    assert set(AXES) == {*SECTIONS["topology"], "seed"}
    assert set(PLURALS.values()) <= set(AXES)


def test_table_1_is_the_papers() -> None:
    """42 runs: dense, and SET, CHT-CH2, CHT-CH3 at 50 and 70 %, three seeds, two data sets with their recipes."""
    grids = table1()
    assert sum(len(grid.cells()) for grid in grids.values()) == 42
    for name, epochs, optimizer, rate in (("cifar10", 100, "adam", 0.01), ("cifar100", 240, "sgd", 0.1)):
        cells = grids[name].cells()
        assert [cell.name for cell in cells[:7]] == [
            "dense-seed14", "set-0.5-seed14", "cht-ch2-0.5-seed14", "cht-ch3-0.5-seed14", "set-0.7-seed14",
            "cht-ch2-0.7-seed14", "cht-ch3-0.7-seed14",
        ]  # fmt: skip
        assert {cell.seed for cell in cells} == {14, 15, 16}
        for cell in cells:
            values = cell.config.to_dict()
            assert (values["epochs"], values["optimizer"], values["lr"]) == (epochs, optimizer, rate)
            assert (values["width"], values["batch_size"], values["flip"], values["crop"]) == (1.0, 128, True, 0)
            assert values["dataset"] == f"uoft-cs/{name}"


def test_table_1_takes_other_values_and_local_data(tmp_path: Path) -> None:
    grid = table1(["cifar100"], data=tmp_path, method=["set", "rigl", "chts"], sparsity=[0.95], seed=[1], epochs=2)
    cells = grid["cifar100"].cells()
    assert [cell.name for cell in cells] == [
        "set-0.95-seed1", "rigl-0.95-seed1", "chts-ch2-0.95-seed1", "chts-ch3-0.95-seed1",
    ]  # fmt: skip
    assert {cell.config.data.dataset for cell in cells} == {str(tmp_path / "cifar100")}
    with pytest.raises(ConfigurationError, match="unknown data set of Table 1 'cifar'"):
        table1(["cifar"])


def test_predictors_of_table_1_are_rows_of_their_own() -> None:
    grid = table1(["cifar10"], method=["cht"], predictor=["ch3_l3n", "ch3_l3p", "ch2_l3p"], sparsity=[0.5], seed=[1])
    assert {cell.name: cell.config.topology.predictor for cell in grid["cifar10"].cells()} == {
        "cht-ch3-0.5-seed1": "ch3_l3n", "cht-ch3-l3p-0.5-seed1": "ch3_l3p", "cht-ch2-l3p-0.5-seed1": "ch2_l3p",
    }  # fmt: skip


def test_single_values_of_table_1_count() -> None:
    assert names(table1(("cifar10",), sparsity=0.9, method="set", seed=5)["cifar10"]) == ["set-0.9-seed5"]
    grid = table1(("cifar10",), method="cht", predictor="ch2_l3n", graph="layer", sparsity=0.9, seed=(5, 6), zeta=0.2)
    assert names(grid["cifar10"]) == [f"cht-ch2-layer-graph-0.9-seed{seed}" for seed in (5, 6)]
    assert grid["cifar10"].base.topology.zeta == 0.2


def test_a_name_is_the_same_whatever_else_is_in_the_grid() -> None:
    alone = {cell.name: cell.config for cell in grid_from({"methods": ["chts"], "zeta": 0.5, "seed": 1}).cells()}
    table = {"methods": ["set", "chts"], "zeta": [0.3, 0.5], "seeds": [0, 1], "sparsities": [0.5, 0.9]}
    larger = {cell.name: cell.config for cell in grid_from(table).cells()}
    assert alone.items() <= larger.items()


def test_names_that_are_too_long_for_a_file_are_shortened_and_stay_different(tmp_path: Path) -> None:
    layers = ",".join(f"features.{number}" for number in range(60))
    long = Cell(f"SET, layers {layers}", Config().replace(seed=14)).name
    other = Cell(f"SET, layers {layers}0", Config().replace(seed=14)).name
    assert long != other
    for name in (long, other):
        assert name.startswith("set-layers-features.0-")
        assert name.endswith("-0.9-seed14")
        (tmp_path / name).mkdir()
    fits = "x" * (255 - len("-0.9-seed14"))
    assert Cell(fits, Config().replace(seed=14)).name == f"{fits}-0.9-seed14"


def test_cells_are_plain() -> None:
    assert Cell("SET", Config().replace(method="dense", sparsity=0.9)).sparsity == 0.0


def test_variants_without_a_latin_letter_have_folders_of_their_own() -> None:
    grid = grid_from({
        "seeds": [1], "variants": [{"name": "\u03b1", "method": "set"}, {"name": "\u03b2", "method": "chts"}]
    })  # fmt: skip
    assert len({cell.name for cell in grid.cells()}) == 2
