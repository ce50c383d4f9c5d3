"""The line of a run, what identifies it, and files of such lines."""

import copy
import json

import pytest

from chtconv.comparison.result import distinct, identity, read_lines, result_line, same_run, variant_of
from chtconv.errors import ConfigurationError
from chtconv.training import Config, recipe, train

METRICS = [
    {"epoch": 1, "test_accuracy": 0.5, "validation_accuracy": 0.4},
    {"epoch": 2, "test_accuracy": 0.7, "validation_accuracy": 0.6},
]
# Links are pruned: fewer come than go.
RECORDS = [
    {"evolution": 0, "layer": "a", "removed": 10, "rechosen": 5, "new": 4, "empty_slices": 0.9, "zero_scores": 0.9},
    {"evolution": 0, "layer": "b", "removed": 30, "rechosen": 15, "new": 12, "empty_slices": 0.9, "zero_scores": None},
    {"evolution": 1, "layer": "a", "removed": 10, "rechosen": 5, "new": 1, "empty_slices": 0.2, "zero_scores": 0.5},
    {"evolution": 1, "layer": "b", "removed": 30, "rechosen": 25, "new": 3, "empty_slices": 0.4, "zero_scores": None},
]


def summary(**changes):
    config = recipe("cifar-short").replace(dataset="/somewhere/on/a/machine/cifar10", seed=14).to_dict()
    dataset = {"name": config["dataset"], "classes": 10, "train": 45_000, "validation": 5_000, "test": 10_000}
    return {"test_accuracy": 0.7, "layers": {"a": {}}, "seed": 14, "dataset": dataset, "config": config} | changes


def test_a_line_says_all_but_the_layers_and_where_the_images_lay():
    before = summary()
    given = copy.deepcopy(before)
    line = result_line(before, METRICS, RECORDS, "CHTs, layer graph")
    assert before == given
    assert line["variant"] == "CHTs, layer graph"
    assert "layers" not in line
    assert line["dataset"] == before["dataset"] | {"name": "cifar10"}
    assert line["config"] == before["config"] | {"dataset": "cifar10"}
    assert "somewhere" not in json.dumps(line, allow_nan=False)
    assert line["curve"] == {"test_accuracy": [0.5, 0.7], "validation_accuracy": [0.4, 0.6]}
    assert line["validation_accuracy"] == 0.6
    assert line["test_accuracy"] == 0.7


def test_evolution_is_what_was_rechosen_over_all_and_means_of_the_last():
    evolution = result_line(summary(), METRICS, RECORDS, "CHTs")["evolution"]
    assert evolution == pytest.approx({"rechosen": 50 / 80, "empty_slices": 0.3, "zero_scores": 0.5})


def test_a_run_that_never_evolves_has_nothing_to_say_of_it():
    metrics = [row | {"validation_accuracy": None} for row in METRICS]
    line = result_line(summary(), metrics, [], "static")
    assert line["evolution"] == {"rechosen": None, "empty_slices": None, "zero_scores": None}
    assert line["curve"]["validation_accuracy"] == []
    assert line["validation_accuracy"] is None


def test_where_no_link_was_removed_none_was_rechosen():
    records = [record | {"removed": 0, "rechosen": 0, "new": 0} for record in RECORDS]
    assert result_line(summary(), METRICS, records, "CHTs")["evolution"]["rechosen"] is None


def test_what_the_summary_says_of_validation_counts():
    assert result_line(summary(validation_accuracy=0.61), METRICS, [], "SET")["validation_accuracy"] == 0.61


def test_the_line_of_a_real_run(tmp_path):
    values = {
        "width": 1 / 16,
        "head": 8,
        "epochs": 1,
        "batch_size": 512,
        "validation": 200,
        "threads": 1,
        "backend": "dense",
    }
    config = Config().replace(**values, method="chts", evolutions_per_epoch=3.0, stop_fraction=1.0)
    given = train(config, tmp_path / "run")
    metrics, records = (
        [json.loads(text) for text in (tmp_path / "run" / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "evolution.jsonl")
    )
    line = result_line(given, metrics, records, "CHTs")
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert line["curve"]["test_accuracy"] == [line["test_accuracy"]]
    assert line["curve"]["validation_accuracy"] == [line["validation_accuracy"]]
    assert all(0 < value <= 1 for value in line["evolution"].values())
    assert same_run(line["config"], config.to_dict())


# ------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "/data/cifar10"},
        {"dataset": "cifar10/"},
        {"device": "cuda"},
        {"threads": 7},
        {"backend": "dense"},
        {"temperature": 9.0},  # of sampling, and SET does not sample by score
    ],
)
def test_where_a_run_is_computed_is_not_what_it_is(changes):
    config = recipe("cifar-short").replace(method="set")
    assert same_run(config.to_dict(), config.replace(**changes).to_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "uoft-cs/cifar100"},
        {"seed": 15},
        {"precision": "float32"},
        {"sparsity": 0.9},
        {"method": "rigl"},
        {"epochs": 13},
        {"width": 0.5},
        {"validation": 5000},
        {"zeta": 0.2},
        {"distribution": "erk"},
        {"layers": "features.[!0]*"},
    ],
)
def test_what_changes_a_run_makes_another_one(changes):
    config = recipe("cifar-short").replace(method="set", seed=14)
    assert not same_run(config.to_dict(), config.replace(**changes).to_dict())


def test_dense_runs_have_no_topology():
    config = recipe("cifar-short").replace(method="dense")
    assert same_run(config.to_dict(), config.replace(sparsity=0.5, zeta=0.1, graph="layer").to_dict())


def test_values_that_an_older_line_lacks_are_the_usual_ones():
    config = recipe("cifar-short").to_dict()
    older = {name: value for name, value in config.items() if name not in ("temperature", "allocation", "early_stop")}
    assert same_run(older, config)


def test_what_identity_gives_is_nobody_elses():
    config = recipe("cifar-short").to_dict()
    identity(config)["seed"] = 99
    assert identity(config)["seed"] == 0


def test_a_value_that_no_configuration_has_is_named():
    with pytest.raises(ConfigurationError, match="'colour'"):
        identity({"colour": "red"})


# ----------------------------------------------------------------------------------------------------- the lines


def test_of_two_lines_of_a_run_the_later_one_counts():
    first, other, again = (result_line(summary(), METRICS, [], "SET") for _ in range(3))
    other["config"] |= {"seed": 15}
    again |= {"test_accuracy": 0.71}
    again["config"] |= {"device": "cpu"}
    assert distinct([first, other, again]) == [again, other]


def test_older_lines_are_called_by_their_method():
    assert variant_of({"config": {"method": "rigl"}}) == "RigL"
    assert variant_of({"config": {"method": "chts"}, "variant": "CHTs, layer graph"}) == "CHTs, layer graph"
    assert variant_of({"config": {"method": "unheard of"}}) == "unheard of"


def test_a_name_is_one_line_of_a_table():
    assert variant_of({"config": {"method": "set"}, "variant": "SET,\n  slowly"}) == "SET, slowly"


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "results.jsonl") == []


def test_lines_come_in_their_order(tmp_path):
    path = tmp_path / "results.jsonl"
    lines = [result_line(summary(), METRICS, [], name) for name in ("b", "a")]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert read_lines(path) == lines


@pytest.mark.parametrize("text", ['{"config": {', "3", "[]", "{}", '{"config": 3}'])
def test_a_line_that_is_no_result_is_named(tmp_path, text):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(result_line(summary(), METRICS, [], "SET")) + "\n" + text)
    with pytest.raises(ConfigurationError, match=r"results\.jsonl, line 2 is no"):
        read_lines(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"colour": "red"}}, "line 2, is no result of a run of this version: .*'colour'"),
        ({"config": {"seed": "0"}}, "line 2, is no result of a run of this version: seed='0'"),
        ({"seconds": float("nan")}, "line 2 is no JSON: it has no NaN"),
    ],
)
def test_a_line_that_this_version_cannot_use_is_named(tmp_path, change, message):
    path = tmp_path / "results.jsonl"
    line = result_line(summary(), METRICS, [], "SET")
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | change) + "\n")
    with pytest.raises(ConfigurationError, match=rf"results\.jsonl, {message}"):
        read_lines(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_what_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "results.jsonl"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"cannot read .*results\.jsonl"):
        read_lines(path)
