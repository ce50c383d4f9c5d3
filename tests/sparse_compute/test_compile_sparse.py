"""Compiled models: the plain model in eval mode computes the same, and no file of any kind is run or crashes."""

import copy
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from compiled_models import Forward, check, identical, same, trained
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.models import build_model, resnet18
from chtconv.sparse_compute import execution, inference
from chtconv.sparse_compute.execution import SparseConvolution, SparseLinear
from chtconv.sparse_compute.inference import compile_sparse, load_compiled
from chtconv.sparse_compute.library import library

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
