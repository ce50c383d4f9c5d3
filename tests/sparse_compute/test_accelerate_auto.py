"""The automatic backend: what it measures, when it chooses, and that neither leaves a trace; and whole runs."""

import logging
from itertools import pairwise

import pytest
import torch
from support import small_network
from torch import nn
from torch.utils.checkpoint import checkpoint

import chtconv
from chtconv.data import load_dataset
from chtconv.errors import ConfigurationError
from chtconv.sparse_compute import backends, computation
from chtconv.sparse_compute.blocked import Blocked
from chtconv.sparse_compute.library import library
from chtconv.sparse_compute.links import Links
from chtconv.sparse_compute.measurement import measure
from chtconv.sparse_compute.tuning import Measurement, Tuner
from chtconv.training import Config, device, train

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels")


@pytest.fixture
def clock(monkeypatch):
    """Seconds by the number of output channels of a layer, and what was measured so far."""

    class Clock:
        def __init__(self):
            self.default = Measurement(1, 2, 0.1)
            self.seconds = {}
            self.taken = []

        def measure(self, module, input, links, passes, dense_type):
            self.taken.append((module.out_channels, passes, dense_type, len(input)))
            return self.seconds.get(module.out_channels, self.default)

    clock = Clock()
    monkeypatch.setattr(computation, "measure", clock.measure)
    monkeypatch.setattr(Tuner, "_known", {})
    return clock


def start(build=small_network, backend="auto", **options):
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    topology = chtconv.sparsify(model, optimizer, **{"sparsity": 0.8, "method": "static"} | options)
    if backend:
        chtconv.accelerate(model, topology, backend=backend)
    return model, optimizer, topology


def network(*channels):
    return lambda: nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise((3, *channels))))


def batch(size=9, height=8, seed=0):
    return torch.randn(size, 3, height, 8, generator=torch.Generator().manual_seed(seed))


def step(model, optimizer, images):
    optimizer.zero_grad()
    loss = model(images).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def kinds(topology):
    return [backend.kind for backend in backends(topology).values()]


def watch(model):
    """The types of what layers give, as they come."""
    seen = []
    for module in model:
        module.register_forward_hook(lambda m, args, out: seen.append(type(out)))
    return seen


def test_the_first_step_is_dense_and_leaves_no_trace_of_the_measurement():
    """With the real clock: random numbers, gradients, statistics and outputs to the bit."""
    results = []
    for backend in (None, "auto"):
        model, optimizer, _ = start(backend=backend)
        loss = step(model, optimizer, batch())
        results.append([loss, *model.state_dict().values(), *(p.grad for p in model.parameters()), torch.rand(2)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_layers_are_measured_once_and_chosen_for_at_the_step(clock, caplog):
    clock.seconds[6] = Measurement(5, 1, 0.1)
    model, optimizer, topology = start(network(4, 5, 6))
    seen = watch(model)
    with caplog.at_level(logging.INFO, logger="chtconv"):
        for _ in range(3):
            step(model, optimizer, batch())
    assert [taken[:2] for taken in clock.taken] == [(4, "fw"), (5, "fiw"), (6, "fiw")]
    assert seen == [torch.Tensor] * 3 + [Blocked, Blocked, torch.Tensor] * 2
    assert kinds(topology) == ["sparse", "sparse", "dense"]
    assert backends(topology)["2.weight"][1:] == ("measured", 5, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "0: sparse in training; sparse takes 1e+03 ms, dense 2e+03 ms, conversion 100 ms",
        "1: sparse in training; sparse takes 1e+03 ms, dense 2e+03 ms, conversion 100 ms",
        "2: dense in training; sparse takes 5e+03 ms, dense 1e+03 ms, conversion 100 ms",
    ]


def test_where_dense_is_faster_nothing_is_converted(clock):
    clock.default = Measurement(2, 1, 0.1)
    model, optimizer, topology = start()
    plain, other, _ = start(backend=None)
    seen = watch(model)
    for index in range(3):
        assert torch.equal(step(model, optimizer, batch(seed=index)), step(plain, other, batch(seed=index)))
    assert set(seen) == {torch.Tensor}
    assert kinds(topology) == ["dense"] * 3


def test_conversions_are_weighed(clock):
    clock.default = Measurement(1, 2, 0.4)
    clock.seconds[5] = Measurement(1.5, 1, 0.4)
    model, optimizer, topology = start(network(4, 5, 4))
    step(model, optimizer, batch())
    assert kinds(topology) == ["sparse"] * 3
    clock.default = Measurement(1, 2, 0.9)
    clock.seconds[6] = Measurement(9, 1, 0.9)
    model, optimizer, topology = start(network(7, 6, 7))
    step(model, optimizer, batch())
    assert kinds(topology) == ["dense"] * 3


def test_layers_that_must_convert_on_both_sides_are_found_out(clock):
    """What lies between them does not know the blocked layout, which shows in the first step that is sparse."""
    clock.default = Measurement(1, 2, 0.6)

    class Fourier(nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x).real

    model, optimizer, topology = start(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Fourier(), nn.Conv2d(4, 4, 3)))
    chosen = []
    for _ in range(4):
        step(model, optimizer, batch())
        chosen.append(kinds(topology))
    assert chosen == [["sparse"] * 2] + [["dense"] * 2] * 3
    model, optimizer, topology = start(network(4, 4))
    for _ in range(4):
        step(model, optimizer, batch())
        assert kinds(topology) == ["sparse"] * 2


def test_other_sizes_and_densities_are_measured_again(clock):
    model, optimizer, topology = start(network(4, 5))
    for size in (64, 64, 66, 17, 64, 17):
        step(model, optimizer, batch(size))
    assert [taken[3] for taken in clock.taken] == [64, 64, 17, 17]
    step(model, optimizer, batch(64, height=16))
    assert len(clock.taken) == 6
    clock.taken.clear()
    options = {"method": "gmp", "interval": 1, "total_steps": 8, "sparsity": 0.8}
    model, optimizer, topology = start(network(8, 8), **options)
    densities = []
    for index in range(8):
        step(model, optimizer, batch(64, seed=index))
        densities.append(topology.stats()["density"])
    # From 1 to 0.2, in steps of 1.3.
    assert densities[-1] == pytest.approx(0.2, abs=0.01)
    assert 3 * 2 <= len(clock.taken) <= 7 * 2


def test_the_last_small_batch_of_an_epoch_has_a_choice_of_its_own(clock):
    model, optimizer, topology = start(network(4))
    for size in (64, 64, 5, 64, 5):
        if size == 5:
            clock.default = Measurement(3, 1, 0)
        step(model, optimizer, batch(size))
    seen = watch(model)
    model(batch(64)), model(batch(5))
    assert seen == [Blocked, torch.Tensor]
    assert len(clock.taken) == 2
    assert list(topology.acceleration.tuner.choices.values()) == [True, False]


def test_nothing_changes_between_a_forward_pass_and_its_recomputation(clock):
    model, optimizer, _ = start(network(4, 5))
    images = batch().requires_grad_()
    for index in range(3):
        seen = watch(model)
        optimizer.zero_grad()
        checkpoint(model, images, use_reentrant=False).square().mean().backward()
        optimizer.step()
        assert set(seen) == {Blocked if index else torch.Tensor}
        assert len(seen) > 2
    assert len(clock.taken) == 2


def test_evaluation_without_training(clock):
    model, _, topology = start(network(4, 5))
    seen = watch(model.eval())
    with torch.no_grad():
        model(batch())
        assert backends(topology)["0.weight"].reason == "not measured yet"
        model(batch())
    assert [taken[1] for taken in clock.taken] == ["f", "f"]
    assert seen == [torch.Tensor] * 2 + [Blocked] * 2
    assert kinds(topology) == ["sparse"] * 2


def test_gradients_that_nobody_wants_are_not_measured(clock):
    model, optimizer, _ = start(network(4, 5))
    model[0].requires_grad_(False)
    step(model, optimizer, batch())
    assert [taken[1] for taken in clock.taken] == ["f", "fw"]


def test_dense_layers_are_measured_as_autocast_runs_them(clock):
    model, optimizer, _ = start(network(4))
    step(model, optimizer, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, optimizer, batch())
    assert [taken[2] for taken in clock.taken] == [torch.float32, torch.bfloat16]


def test_compiled_models_are_compiled_anew_once_where_dense_is_faster(clock):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    clock.seconds[5] = Measurement(2, 1, 0.1)
    model, optimizer, topology = start(network(4, 5), method="set", interval=2)
    plain, other, _ = start(network(4, 5), backend=None, method="set", interval=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for index in range(5):
        with torch.compiler.set_stance("default" if index < 2 else "fail_on_recompile"):
            found = step(compiled, optimizer, batch(seed=index))
        torch.testing.assert_close(found, step(plain, other, batch(seed=index)), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert (topology.evolutions, len(clock.taken)) == (2, 2)
    torch.compiler.reset()


def test_choices_are_taken_up(clock):
    model, optimizer, topology = start(network(4, 5))
    step(model, optimizer, batch())
    with torch.no_grad():
        model.eval()(batch())
    state = topology.acceleration.state_dict()
    model, optimizer, topology = start(network(4, 5))
    topology.acceleration.load_state_dict(state)
    clock.taken.clear()
    clock.default = Measurement(2, 1, 0)
    seen = watch(model)
    step(model.train(), optimizer, batch())
    with torch.no_grad():
        model.eval()(batch())
    assert (seen, clock.taken) == ([Blocked] * 4, [])


def test_measuring_takes_real_numbers():
    model, optimizer, topology = start()
    step(model, optimizer, batch(17))
    found = backends(topology).values()
    assert all(0 < each.sparse_seconds < 1 and 0 < each.dense_seconds < 1 for each in found)
    case = topology.acceleration.tuner.last("3.weight")
    assert topology.acceleration.tuner.measured["3.weight", case].conversion > 0


@pytest.mark.parametrize("padding", ["same", (1, 2)])
@pytest.mark.parametrize("passes", ["f", "fw", "fi", "fiw"])
@pytest.mark.parametrize("size", [3, 9])
def test_every_kind_of_layer_can_be_measured(padding, passes, size):
    module = nn.Conv2d(4, 6, 2, padding=padding, dilation=2, groups=2)
    mask = torch.rand(module.weight.shape) < 0.5
    links = Links.of(mask, 2)
    found = measure(module, torch.randn(size, 4, 8, 8), links, passes, torch.bfloat16)
    assert min(found[:2]) > 0


# ---- Whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


RUN = {"width": 1 / 8, "head": 32, "threads": 1, "batch_size": 64, "seed": 3, "device": "cpu"}


def small_resnet():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
                *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)),
            )

        def forward(self, x):
            return torch.relu(x + self.layers(x))

    first = (nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*first, Block(), nn.MaxPool2d(2), Block(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 10))


@pytest.mark.parametrize("method", ["chts", "rigl"])
def test_training_learns_as_much(method):
    data = load_dataset("digits")
    images, tests = (nn.functional.avg_pool2d(part.images.float() / 255, 2) for part in (data.train, data.test))
    accuracies = []
    for backend in ("dense", "sparse"):
        model, optimizer, topology = start(small_resnet, backend, method=method, interval=40, stop=100)
        for index in range(150):
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(index))[:60]
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - index / 150)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[chosen]), data.train.labels[chosen])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = model.eval()(tests).argmax(1) == data.test.labels
        accuracies.append(right.double().mean().item())
        assert set(kinds(topology)) == {backend}
        assert topology.evolutions == 2
    assert min(accuracies) > 0.9
    assert abs(accuracies[0] - accuracies[1]) < 0.04


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("backend", ["sparse", "auto"])
def test_resumed_runs_have_the_same_bits(tmp_path, backend):
    from chtconv.training.progress import Progress

    class Stop(Progress):
        def epoch(self, *_):
            raise KeyboardInterrupt

    config = Config().replace(**RUN | {"width": 1 / 16}, epochs=2, backend=backend)
    whole = train(config, tmp_path / "whole")
    reasons = {row["backend_reason"] for row in whole["layers"].values()}
    assert reasons == {"" if backend == "sparse" else "measured"}
    # A resumed run measures nothing: it would be another time.
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", progress=Stop())
    Tuner._known.clear()
    parts = train(config, tmp_path / "parts", resume=True)
    for name in ("model.safetensors", "masks.safetensors", "evolution.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert [row["backend"] for row in whole["layers"].values()] == [row["backend"] for row in parts["layers"].values()]
    assert not Tuner._known


def test_backends_that_a_run_cannot_have(monkeypatch, tmp_path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert device.check_backend("auto", cuda, "chts") == device.check_backend("dense", cuda, "chts") == "dense"
    assert device.check_backend("auto", cpu, "chts") == "auto"
    with pytest.raises(ConfigurationError, match="backend='sparse': device 'cuda' has no sparse kernels; accepted is"):
        device.check_backend("sparse", cuda, "chts")
    with pytest.raises(ConfigurationError, match="method='dense' has no sparse layers"):
        device.check_backend("sparse", cpu, "dense")
    monkeypatch.setattr(device, "library", lambda: None)
    with pytest.raises(ConfigurationError, match="no compiled kernels here; accepted are 'auto' and 'dense'"):
        train(Config().replace(backend="sparse", device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
