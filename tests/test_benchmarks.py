"""What the benchmarks measure by names of functions must still be there, and add up."""

import argparse
import contextlib
import importlib
import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import chtconv
from chtconv.sparse_compute.library import library

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
def benchmark(monkeypatch):
    """The modules of the folder benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


needs_kernels = pytest.mark.skipif(library() is None, reason="there are no compiled kernels")
SMALL = {"width": 1 / 16, "batch": 16}


@pytest.mark.parametrize("sparsity", [0.0, pytest.param(0.9, marks=needs_kernels)])
def test_every_pass_of_every_layer_runs(benchmark, sparsity):
    subject = benchmark("layer_passes").Layers(sparsity, width=1 / 16)
    layers = subject.about["layers"]
    assert sum(each["count"] for each in layers.values()) == 13
    assert list(subject.actions) == [f"{name}/{each}" for name, layer in layers.items() for each in layer["passes"]]
    for run in subject.actions.values():
        run()


@needs_kernels
def test_sparse_passes_compute_what_dense_ones_do(benchmark):
    passes, layer = benchmark("layer_passes"), nn.Conv2d(3, 4, 3, padding=1, bias=False)
    mask, x = torch.rand(layer.weight.shape) < 0.5, torch.randn(16, 3, 8, 8)
    layer.weight.data *= mask
    sparse, dense = passes._sparse_passes(layer, x, mask), passes._dense_passes(layer, x, None)
    assert torch.allclose(sparse["forward"](), dense["forward"](), atol=1e-5)
    assert torch.allclose(sparse["input gradient"]()[0], dense["input gradient"]()[0], atol=1e-4)
    assert torch.allclose(sparse["weight gradient"]()[1], dense["weight gradient"]()[1] * mask, atol=1e-3)


@pytest.mark.parametrize("way", ["dense", "sparse", "auto", "sparseprop"])
def test_a_training_step_is_made_in_every_way(benchmark, way):
    if way == "sparseprop":
        pytest.importorskip("sparseprop")
    elif way != "dense" and library() is None:
        pytest.skip("there are no compiled kernels")
    sparsity = 0.0 if way == "dense" else 0.9
    subject = benchmark("sparse_ways").Training("vgg16, head 512", way, sparsity, **SMALL)
    weight = subject._trainee.optimizer.param_groups[0]["params"][-1]
    before = weight.detach().clone()
    subject.actions["step"]()
    assert not torch.equal(weight, before)
    assert way != "sparse" or subject.about["sparse_layers"] == "13 of 13"


@pytest.mark.parametrize(
    "way", ["dense", "dense, contiguous", "folded", "folded, contiguous", "accelerate", "compile_sparse"]
)
def test_a_batch_is_computed_in_every_way(benchmark, way):
    sparsity = 0.9 if way in ("accelerate", "compile_sparse") else 0.0
    if sparsity and library() is None:
        pytest.skip("there are no compiled kernels")
    subject = benchmark("sparse_ways").Inference(way, sparsity=sparsity, **SMALL)
    assert list(subject.actions) == ["batch"]
    subject.actions["batch"]()
    assert ("sparse_layers" in subject.about) == bool(sparsity)


def test_nothing_is_called_sparse_that_runs_densely(benchmark, monkeypatch):
    ways = benchmark("sparse_ways")
    trainee = ways.Dense("vgg16", "sgd", 1 / 16)
    topology = ways.sparsified(trainee, sparsity=0.9)
    assert ways.chosen(topology) == "0 of 13"
    with pytest.raises(SystemExit, match=r"way 'sparse': .*features\..*not accelerated.* accepted is 'auto'"):
        ways.chosen(topology, "sparse")
    monkeypatch.setattr(ways, "library", lambda: None)
    for way in ("sparse", "auto"):
        with pytest.raises(SystemExit, match=f"way '{way}': there are no compiled kernels"):
            ways.Training("vgg16", way, 0.9, **SMALL)
    for way in ("accelerate", "compile_sparse"):
        with pytest.raises(SystemExit, match=f"way '{way}': there are no compiled kernels"):
            ways.Inference(way, 16, 0.9, 1 / 16)


def test_a_line_tells_which_kernels_there_were(benchmark, monkeypatch, tmp_path):
    common, path = benchmark("common"), tmp_path / "lines.jsonl"
    for kernels in (argparse.Namespace(isa="avx2", threaded=True), None):
        monkeypatch.setattr(common, "library", lambda kernels=kernels: kernels)
        common.append(path, "name", {}, rows=[])
    with_some, without = map(json.loads, path.read_text().splitlines())
    assert with_some["kernels"] == {"isa": "avx2", "threaded": True}
    assert without["kernels"] is None


def test_rows_of_memory_tell_how_many_layers_were_sparse(benchmark, monkeypatch):
    module = benchmark("sparse_compute")

    @contextlib.contextmanager
    def running(specs):
        about = {name: {"sparse_layers": "13 of 13"} if "sparsity" in spec else {} for name, spec in specs.items()}
        yield {name: argparse.Namespace(peak=lambda: 10, about=each) for name, each in about.items()}

    monkeypatch.setattr(module, "running", running)
    rows = {row["name"]: row for row in module.memory(argparse.Namespace(threads=1, width=1.0))}
    assert rows["90%, sparse"]["sparse_layers"] == rows["90%, auto"]["sparse_layers"] == "13 of 13"
    assert "sparse_layers" not in rows["dense"]


def test_the_compiled_model_is_measured_with_memory_kept_too(benchmark, monkeypatch):
    module, found = benchmark("sparse_compute"), {}
    monkeypatch.setattr(module, "steps", lambda model, options, ways: found.update(ways) or iter(()))
    list(module.baselines(argparse.Namespace()))
    dense = [spec for spec in found.values() if spec["way"] == "dense" and spec.get("compiled")]
    assert [spec.get("keeping", False) for spec in dense] == [False, True]


def test_scores_of_large_networks_are_timed_beside_convolutions_and_nothing_else(benchmark, monkeypatch):
    pytest.importorskip("scipy")
    module, asked = benchmark("link_prediction"), []
    layers = [((8, 3, 3, 3), 8, {"padding": 1}), ((8, 1, 3, 3), 8, {"groups": 8}), ((8, 8, 1, 1), 8, {"stride": 2})]
    monkeypatch.setattr(module, "resnet50", lambda: layers)
    monkeypatch.setattr(module, "convnext_tiny", lambda: layers[1:])

    def in_turns(rounds, step, **actions):
        asked.append(rounds)
        with monkeypatch.context() as patch:
            for place, name in ((nn, "Conv2d"), (torch, "randn"), (torch.Tensor, "to"), (torch.Tensor, "sum")):
                patch.setattr(place, name, None)
            step()
        return dict.fromkeys(("step", *actions), [1.0] * rounds)

    monkeypatch.setattr(module, "in_turns", in_turns)
    rows = list(module.of_large_networks(3, batch=2))
    assert asked == [3, 3]
    assert len(rows) == 4


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
