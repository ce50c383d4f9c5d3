"""The configuration: what it refuses, how it is written down, and what the recipes fix."""

import json
import math
from typing import Any

import pytest

from chtconv.errors import ConfigurationError
from chtconv.training import RECIPES, Config, recipe
from chtconv.training.config import SETTINGS

BAD: list[tuple[str, Any]] = [
    ("dataset", ""),
    ("image_size", 31),
    ("validation", -1),
    ("batch_size", 0),
    ("batch_size", 1.5),
    ("flip", 1),
    ("crop", -1),
    ("crop", 32),
    ("width", 0),
    ("width", math.nan),
    ("width", math.inf),
    ("head", 0),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("sparsity", 1),
    ("sparsity", -0.1),
    ("sparsity", math.nan),
    ("sparsity", "0.9"),
    ("sparsity", True),
    ("layers", ""),
    ("zeta", 0),
    ("zeta", 1.01),
    ("evolutions_per_epoch", 0),
    ("stop_fraction", 0),
    ("stop_fraction", 1.1),
    ("epochs", 0),
    ("epochs", None),
    ("lr", 0),
    ("lr", math.inf),
    ("momentum", 1),
    ("weight_decay", -1e-4),
    ("warmup_epochs", -1),
    ("final_lr", 1.5),
    ("decay_end", 0),
    ("seed", -1),
    ("seed", 1.0),
    ("threads", 0),
    ("zeta_schedule", 3),
    ("allocation", 3),
    ("removal", True),
    ("regrowth", 1.5),
    ("density", 0.5),
    ("initial_sparsity", 1.0),
    ("temperature", -1.0),
    ("explore", 1.5),
    ("smoothing", -0.1),
    ("kernel_shares", 3),
    ("early_stop", 0.0),
    ("prune_dead", "maybe"),
]
TABLES = [
    "model",
    "method",
    "predictor",
    "graph",
    "windows",
    "distribution",
    "optimizer",
    "schedule",
    "device",
    "precision",
    "step",
    "optimizer_kernel",
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_named_with_what_is_accepted(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}={value!r}.*accepted".replace("(", r"\(")):
        Config().replace(**{name: value})


@pytest.mark.parametrize("name", [*TABLES, "backend"])
def test_a_name_that_is_in_no_table_is_answered_with_those_that_are(name: str) -> None:
    value = Config().to_dict()[name]
    with pytest.raises(ConfigurationError, match=f"unknown {name} '{value}x': did you mean '{value}'"):
        Config().replace(**{name: value + "x"})


def test_every_value_has_a_test_that_refuses_it() -> None:
    assert {name for name, _ in BAD} | {*TABLES, "backend"} == set(SETTINGS)


@pytest.mark.parametrize("name", RECIPES)
def test_survives_json(name: str) -> None:
    config = recipe(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="unknown configuration value 'sparsty': did you mean 'sparsity'"):
        Config.from_dict({"sparsty": 0.5})


def test_differences_name_both_values() -> None:
    other = Config().replace(lr=0.2, seed=3)
    assert Config().differences(other) == {"lr": (0.05, 0.2), "seed": (0, 3)}


def test_the_defaults_are_the_quick_recipe_and_do_not_mirror_digits() -> None:
    assert recipe("quick") == Config()
    assert not Config().data.flip


def test_unknown_recipe_gives_the_nearest_match() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'quick'"):
        recipe("quik")


# Appendix A, table A1, and the readings of what the paper leaves open.
PAPER = {
    "paper-cifar10": {"optimizer": "adam", "lr": 0.01, "epochs": 100, "schedule": "linear", "weight_decay": 0.0},
    "paper-cifar100": {"optimizer": "sgd", "lr": 0.1, "epochs": 240, "schedule": "cosine", "weight_decay": 5e-4},
}
BOTH = {
    **dict.fromkeys(("width", "evolutions_per_epoch", "stop_fraction", "decay_end"), 1.0),
    **dict.fromkeys(("final_lr", "crop"), 0),
    "batch_size": 128,
    "flip": True,
    "head": 4096,
    "dropout": 0.5,
    "precision": "float32",
    "momentum": 0.9,
    "warmup_epochs": 5,
    "zeta": 0.3,
    "zeta_schedule": "constant",
    "layers": "*",
}
SHORT = {
    "width": 0.25,
    "epochs": 12,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "warmup_epochs": 1,
    "schedule": "cosine",
    "final_lr": 0,
    "flip": True,
    "crop": 0,
    "precision": "bf16",
    "evolutions_per_epoch": 3,
    "zeta": 0.3,
    "zeta_schedule": "cosine",
    "stop_fraction": 0.75,
}


@pytest.mark.parametrize(
    ("name", "values"), [*((name, values | BOTH) for name, values in PAPER.items()), ("cifar-short", SHORT)]
)
def test_recipes_hold_what_they_are_named_after(name: str, values: dict[str, Any]) -> None:
    found = recipe(name).to_dict()
    assert {key: found[key] for key in values} == values
