"""Methods are compositions: every one of them runs, and those that cannot be are refused with what would be."""

import itertools

import pytest
import torch
from support import expected_density, sparse
from torch import nn

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.methods import METHODS, Method
from chtconv.methods.regrowth import REGROWTHS
from chtconv.methods.removal import REMOVALS
from chtconv.methods.schedule import DENSITIES

PARTS = {
    "static": (None, None, "constant"),
    "set": ("magnitude", "uniform", "constant"),
    "rigl": ("magnitude", "gradient", "constant"),
    "snfs": ("magnitude", "momentum", "constant"),
    "mest": ("magnitude_and_gradient", "uniform", "constant"),
    "gmp": ("magnitude", None, "cubic"),
    "granet": ("magnitude", "gradient", "cubic"),
    "cht": ("magnitude", "highest_score", "constant"),
    "chts": ("magnitude", "sampled_by_score", "constant"),
    "chtss": ("soft_magnitude", "sampled_by_score", "sigmoid"),
    "cht_gradient": ("magnitude", "score_times_gradient", "constant"),
    "random_turnover": ("magnitude", "random_at_turnover", "constant"),
    "shuffled": ("magnitude", "shuffled_scores", "constant"),
    "occupancy": ("magnitude", "sampled_by_score", "constant"),
    "input_degree": ("magnitude", "sampled_by_score", "constant"),
    "in_bounds": ("magnitude", "sampled_by_score", "constant"),
}


def test_methods_are_put_together_from_what_their_papers_say():
    assert {name: (m.removal, m.regrowth, m.density) for name, m in METHODS.items()} == PARTS
    assert [name for name, m in METHODS.items() if m.predictor] == ["occupancy", "input_degree", "in_bounds"]
    dense = [name for name, m in METHODS.items() if m.needs_dense_gradients]
    assert dense == ["rigl", "snfs", "granet", "cht_gradient"]
    assert [name for name, m in METHODS.items() if not m.evolves] == ["static"]
    controls = {"random_turnover", "shuffled", "occupancy", "input_degree", "in_bounds"}
    scored = {"cht", "chts", "chtss", "cht_gradient", *controls}
    assert {name for name, m in METHODS.items() if m.uses_scores} == scored
    assert all(m.summary and not m.summary.endswith(".") for m in METHODS.values())


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("removal", REMOVALS)
def test_every_composition_has_exact_links(removal, density):
    for regrowth, allocation in itertools.product((None, *REGROWTHS), ("kernel", "layer")):
        method = Method(removal, regrowth, density, initial_sparsity=0.2)
        model, optimizer, topology = sparse(
            nn.Sequential(nn.Conv2d(2, 4, 3)), method=method, sparsity=0.7, interval=1, stop=3, zeta=0.6,
            allocation=allocation,
        )  # fmt: skip
        stands_for = {"constant": "set", "cubic": "gmp", "sigmoid": "chtss"}[density]
        for step in range(3):
            if density == "constant":
                expected = 0.3
            else:
                way = (expected_density(stands_for, 0.7, step / 2) - expected_density(stands_for, 0.7, 0)) / (
                    expected_density(stands_for, 0.7, 1) - expected_density(stands_for, 0.7, 0)
                )
                expected = 0.8 + (0.3 - 0.8) * way
            mask = topology.masks["0.weight"].flatten(1)
            if allocation == "kernel":
                assert mask.sum(1).tolist() == [round(expected * 18)] * 4
            else:
                assert mask.sum() == round(expected * 72)
            assert not model[0].weight.flatten(1)[~mask].any()
            optimizer.zero_grad()
            model(torch.randn(2, 2, 5, 5)).square().sum().backward()
            optimizer.step()
        if regrowth is None and density == "constant":
            assert all(row["removed"] == 0 for row in topology.records)


def test_changing_a_part_leaves_the_method_alone():
    changed = chtconv.method("chts", removal="soft_magnitude", temperature=4)
    assert (changed.removal, changed.regrowth, changed.temperature) == ("soft_magnitude", "sampled_by_score", 4)
    assert METHODS["chts"].temperature == 1
    assert chtconv.method("chts") is not changed
    assert chtconv.method(changed, explore=0.5) == chtconv.method(
        "chts", removal="soft_magnitude", temperature=4, explore=0.5
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rigle", {}, "unknown method 'rigle': did you mean 'rigl'"),
        ("chts", {"temprature": 2}, "unknown field of a method 'temprature': did you mean 'temperature'"),
        ("set", {"removal": "magnitud"}, "unknown removal 'magnitud': did you mean 'magnitude'"),
        ("set", {"regrowth": "gradients"}, "unknown regrowth 'gradients': did you mean 'gradient'"),
        ("set", {"density": "cube"}, "unknown density schedule 'cube'"),
        ("set", {"zeta_schedule": "cosin"}, "unknown zeta schedule 'cosin': did you mean 'cosine'"),
        ("cht", {"predictor": "ch3"}, "unknown predictor 'ch3': did you mean 'ch3_l3n'"),
        ("set", {"removal": None}, "regrowth 'uniform' without a removal: .*accepted removals are 'magnitude'"),
        ("static", {"density": "cubic"}, "the density schedule 'cubic' needs a removal"),
        ("chts", {"temperature": -1}, "temperature=-1: accepted are numbers from 0 up"),
        ("chts", {"temperature": float("nan")}, "temperature=nan"),
        ("chts", {"kernel_shares": "link"}, "unknown kernel_shares 'link': did you mean 'links'"),
        ("gmp", {"initial_sparsity": 1.0}, r"initial_sparsity=1\.0: accepted are numbers from 0 up and below 1"),
        ("gmp", {"initial_sparsity": -0.1}, r"initial_sparsity=-0\.1"),
        (["set"], {}, r"unknown method \['set'\]"),
        ("set", {"removal": ["magnitude"]}, r"unknown removal \['magnitude'\]: .*Accepted: 'magnitude', "),
        ("set", {"density": None}, "unknown density schedule None"),
        ("snfs", {"redistribute": "yes"}, "redistribute='yes': accepted are True and False"),
        ("chts", {"prune_dead": 1}, "prune_dead=1: accepted are True and False"),
        ("chts", {"explore": 1.5}, r"explore=1\.5: accepted are numbers from 0 to 1"),
        ("chts", {"smoothing": -1}, r"smoothing=-1: accepted are numbers from 0 to 1"),
        ("chts", {"smoothing": "much"}, r"smoothing='much': accepted are numbers\."),
        ("cht", {"early_stop": 0}, "early_stop=0: accepted are numbers above 0"),
        ("cht", {"early_stop": 1.1}, r"early_stop=1\.1"),
        ("snfs", {"density": "cubic"}, "redistribute=True keeps the number of links; accepted is density='constant'"),
        ("gmp", {"prune_dead": True}, "prune_dead=True needs a regrowth"),
        ("rigl", {"redistribute": True}, "redistribute=True goes by momentum; accepted is regrowth='momentum'"),
    ],
)
def test_methods_that_cannot_be(name, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        chtconv.method(name, **changes)


def test_temperature_and_explore_reach_regrowth():
    """At a high temperature the sampling of CHTs is the choice of CHT; explored evenly, it is another one."""
    masks = {}
    for name, method in {
        "highest": chtconv.method("cht"),
        "sharp": chtconv.method("chts", temperature=float("inf")),
        "even": chtconv.method("chts", explore=1.0),
    }.items():
        torch.manual_seed(0)
        model, _, topology = sparse(
            nn.Sequential(nn.Conv2d(3, 8, 3)), method=method, sparsity=0.6, zeta=0.3, interval=10, predictor="ch3_l3n"
        )
        model(torch.zeros(1, 3, 7, 7))
        topology.evolve()
        masks[name] = topology.masks["0.weight"]
    agree = {name: int((mask & masks["highest"]).sum()) for name, mask in masks.items()}
    assert agree["sharp"] >= 0.95 * agree["highest"] > 1.05 * agree["even"]
