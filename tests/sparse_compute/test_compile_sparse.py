"""Compiled models: the plain model in eval mode computes the same, and no file of any kind is run or crashes."""

import copy
import json
import math
import operator
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.models import build_model, resnet18
from chtconv.sparse_compute import compiled_file, execution, inference, positions
from chtconv.sparse_compute.execution import SparseConvolution, SparseLinear
from chtconv.sparse_compute.inference import SparseModel, compile_sparse, load_compiled
from chtconv.sparse_compute.library import library

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def trained(model: nn.Module, sparsity: float = 0.8, seed: int = 0) -> nn.Module:
    """A model in eval mode with sparse weights, and statistics unlike those of a fresh one."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, WEIGHTED):
            weight = module.weight.data
            active = torch.rand(weight.shape, generator=draw) >= sparsity
            weight.copy_(torch.randn(weight.shape, generator=draw) * active)
            weight.mul_(math.sqrt(2 * len(weight) / max(1, int(active.sum()))))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, least, most in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=draw) * (most - least) + least)
    return model.eval()


def same(actual: object, expected: object, tolerance: float = 2e-5) -> None:
    """Equal up to rounding, relative to the largest number."""
    if isinstance(expected, Tensor):
        assert type(actual) is Tensor
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        assert float((actual - expected).abs().max()) <= tolerance * scale
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            same(actual[key], expected[key], tolerance)
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected)
        for one, other in zip(actual, expected, strict=True):
            same(one, other, tolerance)
    else:
        assert actual == expected


def identical(actual: object, expected: object) -> None:
    """Equal bit for bit."""
    same(actual, expected, 0.0)


@torch.no_grad()
def check(model: nn.Module, *inputs: tuple[Tensor, ...], path: Path | None = None, **options: object) -> SparseModel:
    """A model compiled, compared on all inputs, and once more when it was saved and loaded."""
    compiled = compile_sparse(model, **options)
    loaded = None
    if path is not None:
        compiled.save(path)
        loaded = load_compiled(path)
        assert loaded.backends == compiled.backends
    for each in inputs:
        # In-place operations of the model may change its inputs, and ours must not.
        expected = model(*(x.clone() for x in each))
        before = [x.clone() for x in each]
        actual = compiled(*each)
        same(actual, expected)
        assert all(torch.equal(x, y) for x, y in zip(each, before, strict=True))
        if loaded is not None:
            identical(loaded(*each), actual)
    return compiled


# ------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("backend", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_networks_of_the_benchmarks(tmp_path, name, backend):
    model = trained(build_model(name, 10, width=0.25, seed=0), 0.9)
    inputs = [(torch.randn(batch, 3, 32, 32),) for batch in (1, 3, 8, 64)]
    compiled = check(model, *inputs, path=tmp_path / "file", backend=backend)
    words = [each.op for each in compiled.operations]
    assert "batch_norm" not in words
    # Left are those behind additions and linear layers.
    assert words.count("relu") == (2 if name == "vgg16" else 8)
    assert words.count("conv2d") == (13 if name == "vgg16" else 20)
    sparse = [each for each in compiled.operations if isinstance(each, SparseConvolution)]
    assert len(sparse) == (0 if backend == "dense" or library() is None else words.count("conv2d"))


@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith("vit")])
def test_the_zoo(tmp_path, name):
    case = ZOO[name]
    inputs = [(case.inputs(batch),) for batch in (1, 3, 8)]
    check(trained(case.build(), 0.85), *inputs, path=tmp_path / "file", backend="sparse")


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith("vit")])
def test_what_cannot_be_traced_is_refused_with_the_reason(name):
    with pytest.raises(ConfigurationError, match=r"ViT cannot be traced by torch\.fx \('len' is not .*compile a part"):
        compile_sparse(ZOO[name].build())
    model = ZOO[name].build()
    assert model.training


class Forward(nn.Module):
    """Some layers, with a forward of the test's own."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.head, self.relu = nn.Linear(4, 5), nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def residual(m, x):
    y = m.a(x)
    z = m.norm(m.b(y))
    z += y
    return m.relu(z)


def in_place_before_another_use(m, x):
    y = m.a(x)
    z = m.relu(y)
    # y is what z is.
    return m.b(y) + z


def in_place_as_a_statement(m, x):
    y = m.a(x)
    functional.relu_(y)
    y.mul_(2)
    return m.norm(m.b(y)), y


def in_place_after_dropout(m, x):
    y = m.a(x)
    z = functional.dropout(y, 0.5, m.training)
    z.add_(1)
    return m.b(y)


SAVED = {
    "residual": residual,
    "in place, seen by another use": in_place_before_another_use,
    "in place, as a statement": in_place_as_a_statement,
    "in place, through what dropout returns": in_place_after_dropout,
    "input in place": lambda m, x: m.a(functional.relu(x, inplace=True)),
    "norm of an output that is used twice": lambda m, x: (lambda y: m.norm(y) + y)(m.a(x)),
    "two norms": lambda m, x: m.norm2(m.norm(m.a(x))),
    "norm after relu": lambda m, x: m.norm(m.a(x).relu()),
    "layer called twice": lambda m, x: m.norm(m.b(m.norm2(m.b(m.a(x))))),
    "relu of an output that is used twice": lambda m, x: (lambda y: torch.relu(y) - y)(m.a(x)),
    "output of a convolution and of its norm": lambda m, x: (lambda y: (y, m.norm(y)))(m.a(x)),
    "functional": lambda m, x: functional.linear(
        functional.conv2d(x, m.a.weight, m.a.bias, 2, 1).mean((2, 3)), m.head.weight
    ),
    "computed weights": lambda m, x: (
        functional.linear(functional.conv2d(x, m.a.weight * 2, m.a.bias).mean((2, 3)), m.head.weight, m.head.bias.exp())
        + functional.conv2d(x, m.a.weight, m.a.bias * 2).sum()
    ),
    "several outputs": lambda m, x: {"a": [m.a(x), 2], "b": (m.a(x).amax((2, 3)), None)},
    "sizes": lambda m, x: m.head(m.a(x).view(x.size(0), 4, -1).transpose(1, 2)).reshape(x.shape[0], -1),
    "pieces": lambda m, x: m.c(torch.cat([m.a(x).chunk(2, 1)[1], m.b(m.a(x)), m.a(x)[:, 1:3]], dim=1)),
    "numbers and parameters": lambda m, x: 1 - m.scale * m.a(x) / 3 + m.a(x).pow(2) * -0.5,
    "shape of another": lambda m, x: m.a(x).flatten(1).view(m.b(m.a(x)).shape),
    "activations": lambda m, x: (
        functional.gelu(m.a(x), approximate="tanh")
        + functional.leaky_relu(m.a(x), 0.2)
        + functional.hardtanh(m.a(x), -0.5, 0.5)
        + m.a(x).softmax(1)
        + functional.softmax(m.a(x), 1)
        + functional.log_softmax(m.a(x), dim=-1)
        + m.a(x).clamp(min=0)
        + functional.elu_(m.a(x))
    ),
    "resizing": lambda m, x: functional.interpolate(m.a(x), scale_factor=2.0, mode="bilinear", align_corners=True),
    "padding and pooling": lambda m, x: functional.avg_pool2d(
        functional.max_pool2d(functional.pad(m.a(x), (1, 0, 2, 0), value=3.0), 3, stride=1, padding=1),
        2,
        ceil_mode=True,
    ),
}


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("case", SAVED)
def test_forwards(tmp_path, case, backend):
    inputs = [(torch.randn(batch, 3, 6, 6),) for batch in (1, 9)]
    compiled = check(trained(Forward(SAVED[case]), 0.5), *inputs, path=tmp_path / "file", backend=backend)
    assert "sparse" not in compiled.backends.values() or backend == "sparse"


@fx.wrap
def own_function(x: Tensor) -> Tensor:
    return x.cumsum(1)


OPAQUE = {
    "function": (lambda m, x: own_function(m.a(x)), "own_function"),
    "module": (lambda m, x: m.lstm(m.a(x).flatten(2).transpose(1, 2))[0], "lstm"),
    "method": (lambda m, x: m.a(x).roll(1, 1), "roll"),
    "sorted": (lambda m, x: m.a(x).sort(1)[0], "sort"),
    "gathered": (lambda m, x: m.a(x)[[0, 0]], "getitem"),
}


@pytest.mark.parametrize("case", OPAQUE)
def test_operations_that_no_file_holds_are_computed_and_not_saved(tmp_path, case):
    forward, name = OPAQUE[case]
    compiled = check(trained(Forward(forward), 0.5), *[(torch.randn(n, 3, 6, 6),) for n in (1, 9)], backend="sparse")
    with pytest.raises(ConfigurationError, match=f"{name}: this operation cannot be saved"):
        compiled.save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_in_place_changes_that_cannot_be_followed_are_refused():
    def through_a_view(m, x):
        y = m.a(x)
        z = y.flatten(1)
        y.relu_()
        return z

    for forward, message in (
        (through_a_view, "changes in place what other operations see through a view"),
        (lambda m, x: m.a(x).fill_(1), "fill_: accepted in place are usual activations and arithmetic"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            compile_sparse(Forward(forward))


IN_PLACE = {
    "add": lambda y: torch.add(y, 1.0, out=y),
    "sigmoid": lambda y: torch.sigmoid(y, out=y),
    "normalize": lambda y: functional.normalize(y, dim=1, out=y),
    "threshold_": lambda y: functional.threshold_(y, 0.1, 0.2),
    "_foreach_add_": lambda y: torch._foreach_add_([y], 1.0),
    "constant_": lambda y: nn.init.constant_(y, 1.0),
    r"add_\.Tensor": lambda y: torch.ops.aten.add_.Tensor(y, 1.0),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_functions_that_change_a_tensor_in_place_are_refused(name):
    def forward(m, x):
        y = m.a(x)
        IN_PLACE[name](y)
        return y

    with pytest.raises(ConfigurationError, match=f"^{name}: accepted in place are usual .* without out=; do this one"):
        compile_sparse(Forward(forward))


def test_functions_that_are_named_as_if_in_place_are_computed():
    model = Forward(lambda m, x: (lambda y: ((y > 0) & (y < 1) | (y < -1)) * y)(m.a(x)))
    check(trained(model), (torch.randn(2, 3, 6, 6),))


LAYERS = {
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(0, 2)),
    "dilated": lambda: nn.Conv2d(4, 6, (3, 1), dilation=2, bias=False),
    "same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", stride=2),
    "zeros around": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 6, 3)),
    "numbers around": lambda: nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 6, 3)),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
}


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Zero", "Constant", "Reflection", "Replication", "Circular"])
def test_padding_of_all_kinds(tmp_path, kind, axes):
    padding = getattr(nn, f"{kind}Pad{axes}d")
    model = nn.Sequential(padding(1, 0.5) if kind == "Constant" else padding((2, 1, *[1, 0] * (axes - 1))))
    check(model.eval(), (torch.randn(2, 3, *[5] * axes),), path=tmp_path / "file")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_of_all_geometries(tmp_path, name, dtype):
    model = trained(nn.Sequential(LAYERS[name](), nn.Identity(), nn.BatchNorm2d(8 if name == "depthwise" else 6)), 0.5)
    inputs = [(torch.randn(*batch, 4, 9, 7, dtype=dtype),) for batch in ((1,), (9,), (17,))]
    compiled = check(model.to(dtype), *inputs, path=tmp_path / "file", backend="sparse")
    if name != "transposed":
        assert [each.op for each in compiled.operations if each.op != "pad"] == ["conv2d"]
    if name in ("grouped", "strided", "reflected"):
        without_norm = nn.Sequential(model[0], nn.ReLU())
        check(without_norm, (torch.randn(4, 9, 7, dtype=dtype),), path=tmp_path / "file", backend="sparse")


def test_several_inputs_and_optional_ones(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, unused, y, flag=True, mask=None):
            return self.conv(x) + (self.conv(y) if flag else 0)

    inputs = tuple(torch.randn(3, 3, 5, 5) for _ in range(3))
    compiled = check(trained(Two()), inputs, path=tmp_path / "file", backend="sparse")
    with pytest.raises(ConfigurationError, match=r"1 inputs; accepted are 3: \['x', 'unused', 'y'\]"):
        compiled(inputs[0])


def test_layers_without_weights_or_with_a_channel_that_has_none(tmp_path):
    wide = nn.Conv2d(4, 400, 3)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), wide, nn.Flatten(), nn.Linear(400, 300)))
    model[0].weight.data.zero_()
    wide.weight.data[:390] = 0
    wide.bias.data[:390] = 0
    model[4].weight.data.zero_()
    model[4].bias.data[:290] = 0
    check(model, *[(torch.randn(n, 3, 5, 5),) for n in (1, 8)], path=tmp_path / "file", backend="sparse")


# ------------------------------------------------------------------------------- what is kept, and what is left alone


def tensors_of(value: object, seen: set[int]) -> int:
    """Bytes of all floating-point memory that is reachable."""
    if id(value) in seen or isinstance(value, (str, int, float, type)) or value is None:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.layout is torch.sparse_csr:
            return tensors_of(value.values(), seen)
        if value.numel() == 0 or not value.is_floating_point() or value.untyped_storage().data_ptr() in seen:
            return 0
        seen.add(value.untyped_storage().data_ptr())
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(tensors_of(each, seen) for each in value.values())
    if isinstance(value, (list, tuple, set)):
        return sum(tensors_of(each, seen) for each in value)
    return tensors_of(vars(value), seen) if hasattr(value, "__dict__") and not callable(value) else 0


@pytest.mark.skipif(library() is None, reason="without kernels, weights are dense")
def test_sparse_layers_hold_no_dense_weight(tmp_path):
    model = trained(build_model("vgg16", 10, width=0.25, seed=0), 0.9)
    compiled = compile_sparse(model, backend="sparse")
    compiled.save(tmp_path / "file")
    for each in (compiled, load_compiled(tmp_path / "file")):
        assert not list(each.parameters())
        assert not each.training
        assert not each.train().training
        for batch in (1, 8):
            each(torch.randn(batch, 3, 32, 32))
        found = 0
        for layer in each.operations:
            if isinstance(layer, (SparseConvolution, SparseLinear)):
                weight = layer.args["weight"]
                bias = weight.shape[0]
                # Values may be kept twice: as they are, and in the order of a kernel.
                held = tensors_of([layer._buffers, getattr(layer, "links", None) and layer.links.__dict__], set())
                assert held <= 4 * (2 * len(weight.values) + bias), layer
                found += 1
        assert found == 16
    assert set(compiled.backends.values()) == {"sparse"}


def test_the_model_is_left_as_it_is():
    model = trained(resnet18(10, width=0.125), 0.8).train()
    model.features[4].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.8, method="set", interval=1)
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    images = torch.randn(8, 3, 32, 32)
    compiled = compile_sparse(model, topology, example=images)
    first = compiled(images)
    assert not first.requires_grad
    assert modes == [module.training for module in model.modules()]
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    # Training goes on, and the compiled model stays what it was.
    model(images).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.state_dict()["features.0.weight"], state["features.0.weight"])
    identical(compiled(images), first)
    identical(copy.deepcopy(compiled)(images), first)


class Counting(nn.Module):
    """Tensors of its own, which ``forward`` may change."""

    def __init__(self, forward):
        super().__init__()
        self.register_buffer("buffer", torch.zeros(3))
        self.bias = nn.Parameter(torch.zeros(3))
        self.plain, self.kept, self.number, self._forward = torch.zeros(3), torch.zeros(3), 0, forward
        self.linear, self.relu, self.late = nn.Linear(3, 3), nn.LeakyReLU(0.1, inplace=True), None

    def forward(self, x):
        return self._forward(self, x)


def _replaced(name, computed):
    def forward(m, x):
        setattr(m, name, computed(m, x))
        return x + getattr(m, name)

    return forward


CHANGING = {
    "a buffer that is written to": ("buffer", lambda m, x: (m.buffer.add_(x.mean(0)), x + m.buffer)[1]),
    "a buffer that is added to": ("buffer", _replaced("buffer", lambda m, x: operator.iadd(m.buffer, 1))),
    "a buffer that is replaced": ("buffer", _replaced("buffer", lambda m, x: m.buffer + 1)),
    "a parameter that is written to": ("bias", lambda m, x: (m.bias.mul_(2), x + m.bias)[1]),
    "a tensor that is written to": ("plain", lambda m, x: (m.plain.add_(1), x + m.plain)[1]),
    "a tensor that is replaced": ("plain", _replaced("plain", lambda m, x: m.plain + 1)),
    "an average": ("plain", _replaced("plain", lambda m, x: torch.lerp(m.plain, x.mean(0), 0.1))),
    "after it was read": ("buffer", lambda m, x: (x + m.buffer, m.buffer.add_(1))[0]),
    "past autograd": ("bias", lambda m, x: (m.bias.data.clamp_(0, 1), x + m.bias)[1]),
    "detached": ("bias", lambda m, x: (m.bias.detach().clamp_(0, 1), x + m.bias)[1]),
    "a view": ("buffer", lambda m, x: (m.buffer.view(3, 1).add_(1), x + m.buffer)[1]),
    "a part": ("buffer", lambda m, x: (m.buffer[0].add_(1), x + m.buffer)[1]),
    "a number": ("number", _replaced("number", lambda m, x: m.number + 1)),
    "computed of it": ("plain", lambda m, x: (m.plain.add_(1), x + m.plain * 2)[1]),
    "read into what is new": (
        "buffer",
        lambda m, x: (t := torch.zeros(2, 3), t.add_(x * m.buffer), m.buffer.add_(1))[0],
    ),
    "in a function": ("buffer", lambda m, x: x + functional.leaky_relu(m.buffer, 0.1, inplace=True)),
    "in a module": ("buffer", lambda m, x: x + m.relu(m.buffer)),
    "of a module of torch": ("linear.bias", lambda m, x: (m.linear.bias.data.add_(1), m.linear(x))[1]),
    "after it was read, to the same": ("plain", lambda m, x: (x + m.plain, m.plain.fill_(1.0))[0]),
    "what was not there at first": ("late", _replaced("late", lambda m, x: x if m.late is None else 0.9 * m.late + x)),
}


@pytest.mark.parametrize("case", CHANGING)
def test_models_that_change_what_they_compute_with_are_refused(case):
    name, forward = CHANGING[case]
    model = Counting(forward).eval()
    before = operator.attrgetter(name)(model)
    numbers = None if before is None else torch.as_tensor(before).clone()
    with pytest.raises(ConfigurationError, match=f"^{name}: forward computes with it and changes it in eval mode"):
        compile_sparse(model)
    now = operator.attrgetter(name)(model)
    assert now is before
    assert now is None or torch.equal(torch.as_tensor(now), numbers)


def test_a_tensor_under_two_names_is_one():
    model = Counting(lambda m, x: (m.linear.alias.add_(1), x + m.plain)[1]).eval()
    model.linear.alias = model.plain
    with pytest.raises(ConfigurationError, match=r"^plain, linear\.alias: forward computes with it"):
        compile_sparse(model)


KEPT = [torch.zeros(3)]


def _a_column(m, x):
    total = torch.zeros(2, 3)
    total[:, 0].add_(x[:, 0])
    return total


def _an_entry(m, x):
    total = torch.zeros(2, 3)
    total[:, 0] = x[:, 0]
    return total


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda m, x: (KEPT[0].add_(x.mean(0)), x + KEPT[0])[1],
            "a tensor that is no attribute: forward computes with it",
        ),
        (_a_column, "a tensor that is no attribute: forward computes with it"),
        (_an_entry, "__setitem__: accepted in place"),
        (lambda m, x: x + torch.randn(3), "a tensor that is no attribute: forward computes with it"),
    ],
)
def test_tensors_that_are_no_attributes_are_written_into_where_that_can_be_followed(forward, message):
    with pytest.raises(ConfigurationError, match=message):
        compile_sparse(Counting(forward).eval())


def _lazily(m, x):
    if not m.number:
        m.plain, m.number = torch.arange(3.0), 1
    return x + m.plain


def _summed(m, x):
    total = torch.zeros(2, 3)
    total.add_(x)
    total += m.bias
    return total


def _changed_again(m, x):
    m.plain = torch.arange(3.0)
    return x * m.plain


LEAVING = {
    "a result": lambda m, x: setattr(m, "kept", x * 2) or m.kept + m.plain + m.buffer,
    "a result in a buffer": lambda m, x: setattr(m, "buffer", x.mean(0)) or x * 2,
    "a counter": lambda m, x: (m.buffer.add_(1), setattr(m, "number", m.number + 1), x)[-1],
    "a counter that is no buffer": lambda m, x: (operator.iadd(m.plain, 1), x)[1],
    "a buffer that counts": lambda m, x: setattr(m, "buffer", operator.iadd(m.buffer, 1)) or x,
    "what it saw": lambda m, x: setattr(m, "kept", torch.maximum(m.kept, x.abs().amax(0))) or x * 2,
    "a table, made when it is needed": _lazily,
    "a table, made anew": _changed_again,
    "another view": lambda m, x: setattr(m, "plain", m.plain.view(1, 3)) or x + m.plain,
    "the same numbers": lambda m, x: x + m.plain.fill_(1.0),
    "a tensor of another size": lambda m, x: m.plain.resize_(5) is None or x,
    "what is new in every call": _summed,
    "a buffer that is filled": lambda m, x: (m.buffer.copy_(x.mean(0)), x * 2)[1],
    "an infinite number": lambda m, x: (setattr(m, "number", m.number + 1), x.masked_fill(x > 9, math.nan))[1],
    "a sparse tensor": lambda m, x: (setattr(m, "number", m.number + 1), torch.sparse.mm(torch.eye(2).to_sparse(), x))[
        1
    ],
    "another type": lambda m, x: setattr(m, "buffer", m.buffer.to(x.dtype)) or x + m.buffer,
    "a result that was not there": lambda m, x: setattr(m, "late", x * 2) or m.late + 1,
}


@pytest.mark.parametrize("case", LEAVING)
def test_models_may_leave_behind_what_they_do_not_compute_with(case):
    model, images = Counting(LEAVING[case]).eval(), torch.randn(2, 3)
    before = {key: value for key, value in {**vars(model), **model._buffers}.items() if not key.startswith("_")}
    numbers = {key: torch.as_tensor(value or 0 if value is None else value).clone() for key, value in before.items()}
    compiled = compile_sparse(model)
    now = {key: value for key, value in {**vars(model), **model._buffers}.items() if not key.startswith("_")}
    assert now.keys() == before.keys()
    for key, value in before.items():
        assert now[key] is value
        assert value is None or torch.equal(torch.as_tensor(value), numbers[key])
    for _ in range(2):
        assert torch.equal(compiled(images), model(images))


def test_modules_of_other_kinds_are_traced_past():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lazy = nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()
            self.register_buffer("later", nn.UninitializedBuffer())
            self.scripted = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))

        @property
        def plain(self):
            raise AssertionError("nobody asked for it")

        def forward(self, x):
            return self.conv(x)

    model, images = Several().eval(), torch.randn(2, 3, 6, 6)
    vars(model)["plain"] = torch.zeros(3)
    same(compile_sparse(model)(images), model(images).detach())


def test_sparse_layers_are_copied_and_shared():
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 4)), torch.randn(9, 3, 6, 6)
    compiled = compile_sparse(trained(model, 0.9), backend="sparse")
    linear = "sparse" if torch.backends.mkl.is_available() else "dense"
    assert compiled.backends == {"0": "dense" if library() is None else "sparse", "2": linear}
    expected = compiled(images)
    identical(copy.deepcopy(compiled)(images), expected)
    identical(compiled.share_memory()(images), expected)
    assert all(buffer.is_shared() for buffer in compiled.buffers())
    same(compiled.double()(images.double()).float(), expected)


@pytest.mark.filterwarnings("error")
def test_sparse_matrices_do_not_warn_in_a_new_process():
    compiled = compile_sparse(trained(nn.Sequential(nn.Linear(64, 4)), 0.9), backend="sparse")
    code = (
        "import pickle, sys, warnings; import torch; warnings.simplefilter('error');"
        "pickle.loads(sys.stdin.buffer.read())(torch.zeros(1, 64))"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(compiled), check=True)


@pytest.mark.parametrize("case", OPAQUE)
def test_compiled_models_are_pickled(case):
    forward, _ = OPAQUE[case]
    model = Forward(lambda m, x: functional.max_pool2d(m.norm(m.b(m.a(x))) + m.a(x), 2))
    images = torch.randn(2, 3, 6, 6)
    for each in (model, Forward(forward)):
        compiled = compile_sparse(trained(each), backend="sparse")
        identical(pickle.loads(pickle.dumps(compiled))(images), compiled(images))


def test_weights_that_are_computed_in_another_way_in_training_mode():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    nn.utils.parametrizations.spectral_norm(model[0])
    images = torch.randn(2, 3, 8, 8)
    state = copy.deepcopy(model.train().state_dict())
    compiled = compile_sparse(model)
    assert model.training
    assert model[0].parametrizations.weight[0].training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    with torch.no_grad():
        same(compiled(images), model.eval()(images))


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own, and tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.gain = torch.tensor(2.0)

    def forward(self, x):
        return functional.conv2d(x, self.weight * self.gain, self.bias)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_hooks_compute_are_refused():
    for make in (
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
    ):
        for layer in (nn.Conv2d(3, 4, 3), Standardised(), nn.Bilinear(3, 3, 4)):
            forward = (lambda m, x: m.a(x, x)) if isinstance(layer, nn.Bilinear) else (lambda m, x: m.a(x))
            model = Forward(forward)
            model.a = make(layer)
            with pytest.raises(
                ConfigurationError, match=r"^a: its weight is computed, .* Call .*prune\.remove, remove_"
            ):
                compile_sparse(model)
    model = Forward(lambda m, x: m.a(x))
    weight = model.a._parameters.pop("weight")
    model.a.weight = weight.detach() * 2
    with pytest.raises(ConfigurationError, match=r"^a: its weight is computed, as by a hook"):
        compile_sparse(model)
    model.a = prune.random_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.9)
    prune.remove(model.a, "weight")
    check(model.eval(), (torch.randn(2, 3, 8, 8),), backend="sparse")
    model.a = Standardised()
    model.a.register_forward_pre_hook(lambda module, inputs: None)
    check(model, (torch.randn(2, 3, 8, 8),), backend="sparse")


TRANSFORMS = {
    "traced": lambda model, x: torch.jit.trace(model, x)(x),
    "exported": lambda model, x: torch.export.export(model, (x,), strict=False).module()(x),
    "mapped": lambda model, x: torch.func.vmap(model)(x[:, None])[:, 0],
    "differentiated": lambda model, x: torch.func.jvp(model, (x,), (x,))[0],
}


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.filterwarnings("ignore")
def test_transforms_are_for_models_without_sparse_convolutions(how, batch):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    images = torch.randn(batch, 3, 8, 8)
    dense = compile_sparse(model, backend="dense")
    same(TRANSFORMS[how](dense, images), dense(images))
    if library() is not None:
        with pytest.raises(
            ConfigurationError, match=r"^layer 0: a sparse convolution that is traced, .*the model itself"
        ):
            TRANSFORMS[how](compile_sparse(model, backend="sparse"), images)


def _counted(model, x):
    with FlopCounterMode(display=False):
        return model(x)


LINEAR_TRANSFORMS = TRANSFORMS | {
    "exported strictly": lambda model, x: torch.export.export(model, (x,), strict=True).module()(x),
    "counted": _counted,
}


@pytest.mark.parametrize("how", LINEAR_TRANSFORMS)
@pytest.mark.filterwarnings("ignore")
def test_transforms_of_sparse_linear_layers(how):
    model, x = trained(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)), 0.9), torch.randn(3, 64)
    compiled = compile_sparse(model, backend="sparse")
    same(LINEAR_TRANSFORMS[how](compiled, x), compiled(x))


class Wrapper(nn.Module):
    """A model whose part is called ``module``, as in a wrapper."""

    def __init__(self, module: nn.Module, stem: nn.Module) -> None:
        super().__init__()
        self.module, self.stem = module, stem

    def forward(self, x):
        return self.module(self.stem(x))


WRAPPERS = {
    "module": (lambda module: Wrapper(module, nn.Identity()), "module."),
    "module beside others": (lambda module: Wrapper(module, nn.Conv2d(3, 3, 3)), "module."),
    "compiled": (lambda module: nn.Sequential(torch.compile(module, backend="eager")), "0._orig_mod."),
    "compiled whole": (lambda module: torch.compile(module, backend="eager"), ""),
    "parallel": (lambda module: nn.Sequential(nn.DataParallel(module)), "0.module."),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_layers_in_wrappers(case):
    wrap, prefix = WRAPPERS[case]
    model = wrap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters()), sparsity=0.9, method="set")
    kernels = "dense" if library() is None else "sparse"
    for each in (None, topology):
        backends = check(model.eval(), (torch.randn(8, 3, 9, 9),), topology=each, backend="sparse").backends
        assert backends.keys() >= {f"{prefix}0", f"{prefix}3"}
        assert set(backends.values()) == {kernels}


def test_a_topology_says_which_layers_are_sparse():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    topology = chtconv.sparsify(
        model, torch.optim.SGD(model.parameters()), sparsity=0.9, method="set", layers=["0", "3"]
    )
    with torch.no_grad():
        model[2].weight[torch.rand(model[2].weight.shape) < 0.9] = 0
    model.eval()
    kernels = "dense" if library() is None else "sparse"
    assert check(model, (torch.randn(8, 3, 9, 9),)).backends == {"0": kernels, "2": kernels, "3": kernels}
    for each in (model, nn.DataParallel(model)):
        compiled = compile_sparse(each, topology, backend="sparse")
        assert compiled.backends == {"0": kernels, "2": "dense", "3": kernels}
    with pytest.raises(ConfigurationError, match=r"0\.weight: a mask of the topology, and no such weight"):
        compile_sparse(nn.Sequential(nn.Conv2d(3, 9, 3)), topology)
    model[3].weight.data.fill_(1)
    with pytest.raises(ConfigurationError, match=r"3\.weight: there are weights off the mask that are not 0"):
        compile_sparse(model, topology)


def test_a_model_that_was_accelerated_and_trained(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.8, method="set", interval=2)
    chtconv.accelerate(model, topology, backend="sparse")
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    kinds = [type(each) for each in model]
    inputs = [(torch.randn(batch, 3, 8, 8),) for batch in (1, 8, 33)]
    compiled = check(model.eval(), *inputs, topology=topology, path=tmp_path / "file")
    assert [each.op for each in compiled.operations] == ["conv2d", "conv2d"]
    assert kinds == [type(each) for each in model]


def test_the_backend(monkeypatch):
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32)), 0.5)
    with pytest.raises(ConfigurationError, match="unknown backend 'spars': did you mean 'sparse'"):
        compile_sparse(model, backend="spars")
    # Below 60 % zeros, only what was measured or asked for is sparse.
    kernels = "dense" if library() is None else "sparse"
    assert compile_sparse(model).backends == {"0": "dense", "3": "dense"}
    assert compile_sparse(model, backend="sparse").backends == {"0": kernels, "3": "dense"}
    seconds = {"ways": [2.0, 1.0], "models": [3.0, 1.0, 2.0]}
    monkeypatch.setattr(inference, "fastest", lambda *ways: seconds["models" if len(ways) == 3 else "ways"])
    images = torch.randn(8, 3, 8, 8)
    assert compile_sparse(model, example=images).backends == {"0": kernels, "3": "dense"}
    assert compile_sparse(model, example=(images,), backend="dense").backends == {"0": "dense", "3": "dense"}
    seconds["ways"] = [1.0, 2.0]
    assert compile_sparse(model, example=images).backends == {"0": "dense", "3": "dense"}
    seconds["models"] = [3.0, 3.0, 2.0]
    assert compile_sparse(model, example=images).backends == {"0": kernels, "3": "dense"}


def test_the_default_device_is_not_that_of_the_model(tmp_path):
    model = trained(build_model("vgg16", 10, width=0.25, seed=0), 0.95)
    inputs = [(torch.randn(batch, 3, 32, 32),) for batch in (1, 8)]
    with torch.device("meta"):
        for options in ({"backend": "sparse"}, {"example": inputs[1]}):
            check(model, *inputs, path=tmp_path / "file", **options)


@pytest.mark.parametrize("batch", [1, 16])
def test_measured_models_compute_the_same(batch):
    model = trained(resnet18(10, width=0.125), 0.9)
    images = torch.randn(batch, 3, 32, 32)
    check(model, (images,), example=images)


def test_without_kernels_everything_is_dense(tmp_path, monkeypatch):
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)), 0.9)
    images = torch.randn(8, 3, 8, 8)
    compiled = compile_sparse(model, backend="sparse")
    compiled.save(tmp_path / "file")
    with monkeypatch.context() as patch:
        for module in (execution, inference):
            patch.setattr(module, "library", lambda: None)
        loaded = load_compiled(tmp_path / "file")
        assert set(loaded.backends.values()) == {"dense"}
        same(loaded(images), compiled(images))
        same(compile_sparse(model, example=images)(images), compiled(images))
        # What it was meant for is not forgotten.
        loaded.save(tmp_path / "again")
    one, other = (safetensors.torch.load_file(tmp_path / name) for name in ("again", "file"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert load_compiled(tmp_path / "again").backends == compiled.backends


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("sparsity", "whole", "half"), [(0.7, 0.33, 0.18), (0.9, 0.12, 0.07), (0.95, 0.06, 0.04)])
def test_files_are_as_small_as_we_say(tmp_path, sparsity, whole, half):
    model = trained(build_model("vgg16", 10, width=0.25, seed=0), sparsity)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    compiled = compile_sparse(model)
    images = torch.randn(4, 3, 32, 32)
    expected = compiled(images)
    for values, share in ((None, whole), (torch.float16, half), (torch.bfloat16, half)):
        compiled.save(tmp_path / "file", values=values)
        size = (tmp_path / "file").stat().st_size
        assert size / (tmp_path / "dense.pt").stat().st_size == pytest.approx(share, abs=0.006)
        loaded = load_compiled(tmp_path / "file")
        same(loaded(images), expected, {None: 0.0, torch.float16: 4e-3, torch.bfloat16: 3e-2}[values])


def test_types_that_do_not_hold_the_weights_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    model[0].weight.data.fill_(1e5)
    compiled = compile_sparse(model)
    with pytest.raises(ConfigurationError, match=r"step 0 \(conv2d\): a weight of 1e\+05: accepted in torch\.float16"):
        compiled.save(tmp_path / "file", values=torch.float16)
    with pytest.raises(ConfigurationError, match=r"values=torch\.int8: accepted are None, torch\.float16"):
        compiled.save(tmp_path / "file", values=torch.int8)
    assert not list(tmp_path.iterdir())
    compiled.save(tmp_path / "file", values=torch.bfloat16)
    assert load_compiled(tmp_path / "file")(torch.ones(1, 1, 1, 1)).item() == pytest.approx(1e5, rel=1 / 256)


@pytest.mark.parametrize("layer", [nn.Linear(64, 4), nn.Conv2d(3, 8, 3)])
def test_a_sparse_layer_of_a_constant_is_saved(tmp_path, layer):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.query = (
                layer,
                nn.Parameter(torch.randn((2, 64) if len(layer.weight) == 4 else (9, 3, 4, 4))),
            )

        def forward(self, x):
            return self.layer(self.query) + x

    compiled, x = compile_sparse(trained(Asking(), 0.95), backend="sparse"), torch.randn(1)
    compiled.save(tmp_path / "file")
    identical(load_compiled(tmp_path / "file")(x), compiled(x))


def test_what_could_not_be_read_again_is_not_saved(tmp_path, monkeypatch):
    compiled = compile_sparse(trained(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0.97), backend="sparse")
    monkeypatch.setattr(compiled_file, "_MOST", 2 * 64 * 64)
    with pytest.raises(ConfigurationError, match=r"step 1 \(linear\): 4096 numbers: accepted are fewer than 8192"):
        compiled.save(tmp_path / "file")
    monkeypatch.setattr(compiled_file, "_MOST", 2 * 64 * 64 + 1)
    compiled.save(tmp_path / "file")
    load_compiled(tmp_path / "file")


def test_all_weights_are_saved_in_half_the_bytes(tmp_path):
    layers = nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 8)
    compile_sparse(trained(nn.Sequential(*layers), 0.0)).save(tmp_path / "file", values=torch.float16)
    with safe_open(tmp_path / "file", framework="pt") as file:
        types = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert {kind for key, kind in types.items() if key.endswith("weight")} == {torch.float16}
    assert {kind for key, kind in types.items() if key.endswith("bias")} == {torch.float32}


def test_many_sparse_tensors_may_not_ask_for_much_together(tmp_path):
    content, metadata = small_file(tmp_path / "file")
    program = json.loads(metadata["program"])
    weight = step_of(program, "conv2d", 1)["args"]["weight"]
    # One of them alone would be made.
    program["output"] = [weight | {"shape": [2**30]}] * 2
    write(tmp_path / "file", content, metadata | {"program": json.dumps(program)})
    with pytest.raises(ConfigurationError, match="product below 2147483648, those of all sparse tensors together"):
        load_compiled(tmp_path / "file")


@settings(max_examples=150)
@given(size=st.integers(1, 3000), density=st.sampled_from([0.0, 1e-3, 0.02, 0.2, 0.9, 1.0]), seed=st.integers(0, 99))
def test_positions_come_back(size, density, seed):
    where = torch.from_numpy(np.flatnonzero(np.random.default_rng(seed).random(size) < density))
    high, low, low_bits = positions.encode(where)
    assert torch.equal(positions.decode(high, low, low_bits, len(where), size), where)
    assert len(high) <= -(-size // 8)
    if len(where):
        with pytest.raises(ConfigurationError, match="accepted are positions below"):
            positions.decode(high, low, low_bits, len(where), int(where[-1]))


@settings(max_examples=150)
@given(high=st.binary(max_size=12), low=st.binary(max_size=6), low_bits=st.integers(-1, 22), links=st.integers(0, 40))
def test_any_bytes_are_positions_in_order_or_refused(high, low, low_bits, links):
    parts = [torch.tensor(list(each), dtype=torch.uint8) for each in (high, low)]
    try:
        where = positions.decode(*parts, low_bits, links, 500)
    except ConfigurationError:
        return
    assert len(where) == links
    assert all(0 <= each < 500 for each in where.tolist())
    assert (where.diff() > 0).all()


def test_random_positions_take_little_more_than_they_must():
    for density in (0.3, 0.1, 0.05):
        where = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(200_000) < density))
        high, low, _ = positions.encode(where)
        entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
        assert 8 * (len(high) + len(low)) / 200_000 < (1.15 if density > 0.2 else 1.06) * entropy


def small_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file of a small model holds: dense and sparse layers, a sum and a constant."""
    torch.manual_seed(0)
    model = Forward(lambda m, x: m.head((m.scale + m.norm(m.b(m.a(x))) + m.a(x)).mean((2, 3))))
    model.b = nn.Conv2d(4, 4, 5, padding=2)
    compile_sparse(trained(model, 0.9), backend="sparse").save(path)
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118


def write(path: Path, content: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file whose hash is right, whatever it holds."""
    metadata = metadata | {"hash": compiled_file.digest(content, metadata)}
    path.write_bytes(safetensors.torch.save(content, metadata))


def step_of(program: dict, op: str, number: int = 0) -> dict:
    return [each for each in program["steps"] if each["op"] == op][number]


def changed(op: str, **args: object):
    return lambda program: step_of(program, op, 1 if op == "conv2d" else 0)["args"].update(args)


HOSTILE = {
    "unknown word": (lambda p: p["steps"][0].update(op="system"), "unknown operation 'system'"),
    "word of ours": (lambda p: p["steps"][0].update(op="call"), "unknown operation 'call'"),
    "input as a step": (lambda p: p["steps"][0].update(op="input"), "unknown operation 'input'"),
    "later step": (changed("add", other={"step": 3}), "takes the result of step 3; accepted are earlier steps"),
    "itself": (lambda p: p["steps"][0]["args"].update(input={"step": 1}), "takes the result of step 1; accepted are"),
    "before the first": (changed("mean", input={"step": -1}), "takes the result of step -1"),
    "no number": (changed("mean", input={"step": True}), "takes the result of step True"),
    "missing argument": (lambda p: step_of(p, "mean")["args"].pop("input"), "input is missing; accepted is a tensor"),
    "unknown argument": (changed("mean", out={"step": 0}), "out; accepted are input, dim, keepdim"),
    "wrong argument": (changed("mean", dim="x"), "dim='x'; accepted is whole numbers"),
    "huge number": (changed("mean", dim=10**30), "dim=1000000"),
    "infinite number": (changed("add", other=math.inf), "other=inf; accepted is a tensor or a number"),
    "unknown object": (changed("mean", input={"file": "x"}), "accepted are steps, tensors, tuples"),
    "missing tensor": (changed("linear", weight={"tensor": "x", "type": "float32"}), "tensor 'x' is missing"),
    "unknown type": (changed("linear", weight={"tensor": "x", "type": "object"}), "tensor 'x' is missing|unknown type"),
    "stride of three": (changed("conv2d", stride=[1, 1, 1]), r"stride=\[1, 1, 1\]; accepted are one number, or 2"),
    "stride of three, as a tuple": (
        changed("conv2d", stride={"tuple": [1, 1, 2]}),
        r"stride=\(1, 1, 2\); accepted are one number, or 2",
    ),
    "stride of zero": (changed("conv2d", stride=0), "stride=0; accepted is whole numbers above 0"),
    "negative padding": (changed("conv2d", padding=[-1, 0]), r"padding=\[-1, 0\]; accepted is whole numbers from 0"),
    "groups": (changed("conv2d", groups=3), "a weight of shape .* in 3 groups; accepted are 4 axes"),
    "low bits": (lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(low_bits=63), "low_bits=63; accepted"),
    "low bits, others": (lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(low_bits=0), "low bits each"),
    "smaller shape": (
        lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(shape=[4, 1, 5, 5]),
        "accepted are positions below 100",
    ),
    "larger shape": (
        lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(shape=[8, 4, 5, 5]),
        r"a bias of shape \[4\]; accepted is \[8\]",
    ),
    "other rank": (
        lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(shape=[4, 4, 25]),
        r"a weight of shape \[4, 4, 25\]",
    ),
    "huge shape": (
        lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(shape=[2**20, 2**20, 5, 5]),
        "accepted are sizes above 0 with a product below",
    ),
    "no list": (lambda p: p.update(steps={}), "steps: accepted is a list"),
    "no names": (lambda p: p.update(inputs=[1]), "inputs: accepted is a list of names"),
    "no output": (lambda p: p.pop("output"), "accepted is an object of inputs, steps, output"),
    "output of nothing": (lambda p: p.update(output={"step": 99}), "takes the result of step 99"),
    "no step": (lambda p: p["steps"].insert(0, 7), "step 1: 7; accepted is an object of op, name, args"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_programs_are_refused(tmp_path, case):
    tamper, message = HOSTILE[case]
    content, metadata = small_file(tmp_path / "file")
    program = json.loads(metadata["program"])
    tamper(program)
    write(tmp_path / "file", content, metadata | {"program": json.dumps(program)})
    with pytest.raises(ConfigurationError, match=message) as error:
        load_compiled(tmp_path / "file")
    assert str(error.value).startswith(str(tmp_path / "file"))


def test_hostile_tensors_are_refused(tmp_path):
    path = tmp_path / "file"
    content, metadata = small_file(path)
    assert load_compiled(path)(torch.zeros(1, 3, 6, 6)).shape == (1, 5)
    name = next(key for key in content if key.endswith(".values")).removesuffix(".values")
    for changes, message in (
        ({f"{name}.values": content[f"{name}.values"][1:]}, "index lists of"),
        ({f"{name}.values": content[f"{name}.values"][None]}, "with one axis"),
        ({f"{name}.high": content[f"{name}.high"].int()}, "torch.int32; accepted are torch.uint8"),
        ({f"{name}.high": torch.zeros(50, dtype=torch.uint8)}, "index lists of 0 links"),
        ({f"{name}.low": content[f"{name}.low"][:0]}, "with 0 low bits"),
        ({name.replace("weight", "bias"): torch.zeros(3)}, r"a bias of shape \[3\]"),
    ):
        write(path, content | changes, metadata)
        with pytest.raises(ConfigurationError, match=message):
            load_compiled(path)
    for program in (
        "[" * 100_000,
        "{}",
        "7",
        "",
        '{"inputs": [], "steps": [], "output": ' + "[" * 500 + "]" * 500 + "}",
    ):
        write(path, content, metadata | {"program": program})
        try:
            assert load_compiled(path)() is not None
        except ConfigurationError:
            assert program.count("]") == 0 or program.count("[") > 400 or program in ("{}", "7")
    for other, message in (
        ({"format": "chtconv-compiled-2"}, "of another version: its format is 'chtconv-compiled-2'; accepted is"),
        ({"format": "chtconv-sparse-1"}, "no compiled model: its format is 'chtconv-sparse-1'"),
        ({"hash": "x"}, "is damaged"),
    ):
        path.write_bytes(safetensors.torch.save(content, metadata | other))
        with pytest.raises(ConfigurationError, match=message):
            load_compiled(path)
    path.unlink()
    with pytest.raises(ConfigurationError, match="is no compiled model that can be read"):
        load_compiled(path)


def test_every_damaged_byte_is_noticed(tmp_path):
    path = tmp_path / "file"
    small_file(path)
    good = path.read_bytes()
    images = torch.randn(1, 3, 6, 6)
    expected = load_compiled(path)(images)
    for index in range(0, len(good), 7):
        path.write_bytes(good[:index] + bytes([good[index] ^ (1 << index % 8)]) + good[index + 1 :])
        try:
            loaded = load_compiled(path)
        except ConfigurationError:
            continue
        # Blanks and the like, in what describes the file.
        identical(loaded(images), expected)
    for length in range(0, len(good), 61):
        path.write_bytes(good[:length])
        with pytest.raises(ConfigurationError):
            load_compiled(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_file(tmp_path_factory.mktemp("whole") / "file")


@settings(max_examples=250)
@given(data=st.data())
def test_damaged_programs_with_a_right_hash_never_crash(tmp_path_factory, whole, data):
    path = tmp_path_factory.getbasetemp() / "damaged-program"
    content, metadata = whole
    text = metadata["program"]
    place = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.sampled_from([0, 1, 1, 5]))
    instead = data.draw(st.text('0123456789-{}[]",: abcdefx.\\\ud7ff', max_size=3))
    write(path, content, metadata | {"program": text[:place] + instead + text[place + length :]})
    try:
        assert isinstance(load_compiled(path), SparseModel)
    except ConfigurationError:
        return


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_tensors_with_a_right_hash_never_crash(tmp_path_factory, whole, data):
    path = tmp_path_factory.getbasetemp() / "damaged-tensors"
    content, metadata = whole
    name = data.draw(st.sampled_from([key for key in content if re.search("high|low|values", key)]))
    raw = content[name].clone().view(torch.uint8)
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
    write(path, content | {name: raw.view(content[name].dtype)}, metadata)
    try:
        loaded = load_compiled(path)
    except ConfigurationError:
        return
    for batch in (1, 8):
        assert loaded(torch.randn(batch, 3, 6, 6)).shape == (batch, 5)


class Named(nn.Module):
    """Results with names, and a tuple of two activations."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.a(x)
        best, halves = y.max(1), self.b(y).chunk(2, 1)
        return best.values + y.topk(3, 1).values.sum(1) + halves[0].sum(1) * best.indices


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_results_with_names_keep_them(backend):
    model, images = Named().eval(), torch.randn(16, 3, 6, 6)
    with torch.no_grad():
        model.a.weight.mul_(torch.rand_like(model.a.weight) < 0.3)
        model.b.weight.mul_(torch.rand_like(model.b.weight) < 0.3)
        expected = model(images)
    torch.testing.assert_close(compile_sparse(model, backend=backend)(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_sparse_models_compute_as_always(dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)).eval()
    for layer in (model[2], model[4]):
        layer.weight.data.mul_(torch.rand_like(layer.weight) < 0.05)
    images = torch.randn(16, 3, 6, 6).to(dtype)
    compiled = compile_sparse(model)
    assert "sparse" in compiled.backends.values()
    expected = compiled(images.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(images), expected)
