"""What the benchmarks measure by names of functions must still be there, and add up."""

import argparse
import importlib
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import chtconv

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("graph", ["kernel", "layer"])
def test_the_stages_of_an_evolution_are_all_there_and_within_its_time(graph, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    stages = importlib.import_module("stages")
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method="chts", graph=graph)
    model(torch.zeros(1, 3, 8, 8))
    original = chtconv.topology.topology.evolve
    start = time.perf_counter()
    spent = stages.seconds_by_stage(lambda: topology.evolve(), lambda: None, 1)
    assert list(spent) == list(stages.STAGES)
    assert all(seconds > 0 for seconds in spent.values())
    assert sum(spent.values()) < time.perf_counter() - start
    assert chtconv.topology.topology.evolve is original
    assert topology.evolutions == 1


@pytest.fixture
def training(monkeypatch):
    """The benchmark of whole training steps."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("training")


def quick(training, **values):
    shared = {"device": "cpu", "threads": 1, "batch": 16, "optimizer": "sgd"}
    return argparse.Namespace(**shared | training.QUICK | {"images": 64, "product": 64} | values)


def test_ways_of_training_train_and_say_what_they_compute(training, monkeypatch):
    kinds, about = importlib.import_module("ways").KINDS, {}
    specs = training.ways(quick(training), 1 / 16, "float32")
    assert list(specs) == [training.PLAIN, training.KEEPING, "dense", "fused, dense", "90%", "fused, 90%", "product"]
    for name, spec in specs.items():
        if name == training.KEEPING:
            continue
        rest = {key: value for key, value in spec.items() if key not in ("kind", "threads")}
        subject = kinds[spec["kind"]](**rest | ({"backend": "sparse"} if "90%" in name else {}))
        try:
            assert list(subject.actions) == ["product" if name == "product" else "steps"]
            before = [each.detach().clone() for each in parameters(subject)]
            next(iter(subject.actions.values()))()
            assert all(not torch.equal(a, b) for a, b in zip(before, parameters(subject), strict=True))
            about[name] = subject.about
        finally:
            getattr(subject, "close", lambda: None)()
    model = chtconv.models.build_model("vgg16", 10, seed=0, width=1 / 16, head=64)
    dense = chtconv.count_flops(model, torch.zeros(1, 3, 32, 32)).dense_step
    assert {name: each["flops"] for name, each in about.items() if "90%" not in name} == {
        training.PLAIN: dense, "dense": dense, "fused, dense": dense, "product": 2 * 64**3,
    }  # fmt: skip
    if chtconv.sparse_compute.library.library() is not None:
        assert about["90%"]["sparse_layers"] == "13 of 13"
        assert about["90%"]["flops"] < 0.2 * dense
    assert {each.get("images") for each in about.values()} == {2 * 16, None}


def parameters(subject):
    trained = getattr(subject, "_trained", None)
    model = trained[0].run.model if trained else getattr(subject, "_model", None)
    return list(model.parameters())[-1:] if model is not None else []


def test_several_runs_in_one_process_each_make_their_steps(training):
    spec = training.trained(quick(training), 1 / 16, "float32") | {"at_once": 2, "method": "dense"}
    subject = importlib.import_module("training_loops").Chtconv(**{k: v for k, v in spec.items() if k != "threads"})
    subject.close()
    assert subject.about["images"] == 2 * 2 * 16
    assert len(subject._trained) == 2


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_updates_are_made_in_every_way(training, optimizer):
    subject = importlib.import_module("training_loops").Updates(optimizer, width=1 / 16, head=8)
    assert list(subject.actions) == ["plain", "foreach", "fused"]
    for update in subject.actions.values():
        weight = update.__self__.param_groups[0]["params"][0]
        before = weight.detach().clone()
        update()
        assert not torch.equal(weight, before)


def test_rates_are_compared_by_round(training):
    times = {training.PLAIN: [4.0, 2.0, 4.0], training.KEEPING: [2.0, 2.0, 2.0], "90%": [1.0, 1.0, 2.0]}
    about = {name: {"images": 10, "flops": 6.0} for name in times} | {"90%": {"images": 5, "flops": 3.0}}
    plain, keeping, sparse = training.rows(times, about, 120.0)
    assert (plain["images_per_second"], keeping["images_per_second"]) == (2.5, 5.0)
    assert (plain["of_matrix_rate"], keeping["of_matrix_rate"]) == (0.125, 0.25)
    assert "of_plain" not in plain
    assert sparse["of_plain"]["median"] == 1.0
    assert sparse["of_keeping"] == {"low": 0.5, "median": 1.0, "high": 1.0}
