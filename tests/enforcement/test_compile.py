"""torch.compile: no graph break, nothing compiled anew at an evolution, and the same masks as without."""

import os
import shutil

import pytest
import torch
from support import small_network, train
from torch import nn

import chtconv
from chtconv.errors import ConfigurationError

WAYS = ("before", "after", "inside", "part")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def start(method="chts", way="after", backend="aot_eager", **options):
    """The model to call, its optimizer and its topology, with the model compiled before or after ``sparsify``."""
    torch.manual_seed(0)
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    called, given = model, model
    if way == "before":
        called = torch.compile(model, backend=backend, fullgraph=True)
    elif way == "inside":
        called = given = torch.compile(model, backend=backend, fullgraph=True)
    elif way == "part":
        model[3] = torch.compile(model[3], backend=backend, fullgraph=True)
    topology = chtconv.sparsify(given, optimizer, **{"method": method, "interval": 2} | options)
    if way == "after":
        called = torch.compile(model, backend=backend, fullgraph=True)
    return called, optimizer, topology


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["chts", "rigl"])
def test_nothing_is_compiled_anew_and_masks_are_those_without_a_compiler(method, way):
    _, plain_optimizer, plain = start(method, "never")
    plain_model = plain._model()
    train(plain_model, plain_optimizer, 7)
    model, optimizer, topology = start(method, way)
    train(model, optimizer, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, 2, seed=1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert topology.evolutions == 2
    # The same seven batches for both, from the start.
    model, optimizer, topology = start(method, way)
    train(model, optimizer, 7)
    assert topology.evolutions == plain.evolutions == 3
    for mask, other in zip(topology.masks.values(), plain.masks.values(), strict=True):
        assert torch.equal(mask, other)
    for weight, other in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)


def test_module_compile_in_place():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = small_network()

        def forward(self, images):
            return self.layers(images)

    model = Network()
    model.compile(backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, interval=2)
    train(model, optimizer, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, optimizer, 2)
    assert topology.evolutions == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_evolution_follows_the_input_size_when_it_changes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, interval=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for height, width in ((8, 8), (10, 9), (13, 7)):
        optimizer.zero_grad()
        compiled(torch.randn(2, 3, height, width)).sum().backward()
        optimizer.step()
        assert [layer.input_size for layer in topology._layers] == [(height, width)] * 2
    assert topology.evolutions == 3


def test_evaluation_before_training_and_between_compiles_once_for_each():
    model, optimizer, topology = start(interval=1)
    images = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        model.eval()
        model(images)
        model.train()
        train(model, optimizer, 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        model.eval()
        model(images)
        model.train()
        train(model, optimizer, 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert topology.evolutions == 3


def test_a_model_compiled_and_called_before_is_told_what_to_do():
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.randn(8, 3, 8, 8))
    topology = chtconv.sparsify(model, optimizer, interval=1)
    with pytest.raises(ConfigurationError, match=r"torch\.compile compiled .* call torch\.compiler\.reset\(\)"):
        train(compiled, optimizer, 1)
    assert topology.evolutions == 0
    torch.compiler.reset()
    train(compiled, optimizer, 1)
    assert topology.evolutions == 1


def test_methods_without_link_prediction_do_not_mind_when_the_model_was_compiled():
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.randn(8, 3, 8, 8)).sum().backward()
    topology = chtconv.sparsify(model, optimizer, interval=2, method="rigl", sparsity=0.8)
    train(compiled, optimizer, 4)
    assert topology.evolutions == 2
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in topology.masks.items())


def test_a_compiled_step_does_not_compile_evolutions():
    model, optimizer, topology = start("set", "never", interval=2)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for seed in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 8, 8)).sum().backward()
        step()
        if seed == 2:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs <= 3
    assert (topology.step_count, topology.evolutions) == (6, 3)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
def test_inductor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, interval=1, method="cht", sparsity=0.5)
    compiled, images = torch.compile(model, fullgraph=True), torch.randn(2, 2, 4, 4)
    for step in range(3):
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            optimizer.zero_grad()
            compiled(images).sum().backward()
            optimizer.step()
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    assert topology.evolutions == 3
