"""What is legitimate and rare: gradients that hooks write into, negated views, complex numbers, empty batches."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import chtconv
from chtconv.sparse_compute.blocked import Blocked
from chtconv.sparse_compute.convolution import sparse_conv2d
from chtconv.sparse_compute.library import library
from chtconv.sparse_compute.links import Links

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels")


def twins():
    """A model with its convolutions accelerated, and a plain one with the same weights."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)]).double()
    topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters()), sparsity=0.7, method="static")
    plain = copy.deepcopy(model)
    assert chtconv.accelerate(model, topology, backend="sparse") is model
    return model, plain, topology


class Damped(torch.autograd.Function):
    """Whose backward pass writes into a part of what it was given a copy of."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[:, :3] *= 0.1
        return gradient


def hooked(layers, x):
    def write(gradient):
        gradient = gradient.clone()
        gradient[:, :3] = 0
        return gradient

    y = layers[0](x)
    y.register_hook(write)
    return layers[1](y.relu())


def damped(layers, x):
    return layers[1](Damped.apply(layers[0](x)))


def recomputed(layers, x):
    def scaled(x):
        y = layers[0](x) * 1.0
        y[:, :3] = y[:, :3] * 3
        return layers[1](y.relu())

    return checkpoint(scaled, x, use_reentrant=False)


def negated_input(layers, x):
    z = torch.complex(x, x.flip(0)).conj().imag
    assert z.is_neg()
    return layers[1](layers[0](z).relu())


def negated_gradient(layers, x):
    y = layers[1](layers[0](x).relu())
    return torch.complex(torch.ones_like(y), y).conj().imag * torch.arange(y.shape[-1])


def complex_numbers(layers, x):
    y = layers[0](x)
    return layers[1]((1j * y + y * torch.tensor(2j)).abs() + (y + 1j * y).real)


@pytest.mark.parametrize("batch", [2, 17])
@pytest.mark.parametrize(
    "function", [hooked, damped, recomputed, negated_input, negated_gradient, complex_numbers], ids=lambda f: f.__name__
)
def test_outputs_and_gradients_are_those_of_the_plain_model(function, batch):
    model, plain, topology = twins()
    images = torch.randn(batch, 3, 9, 9, dtype=torch.float64)
    found = []
    for layers in (model, plain):
        x = images.clone().requires_grad_()
        y = function(layers, x)
        y.square().sum().backward()
        gradients = [weight.grad for weight in layers.parameters()]
        found.append([y.detach() + 0.0, x.grad, *gradients])
    for name, mask in topology.masks.items():
        plain.get_parameter(name).grad[~mask] = 0
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_axes_that_are_none_are_refused_as_by_torch():
    model, _, _ = twins()
    y = model[0](torch.randn(17, 3, 9, 9, dtype=torch.float64))
    assert type(y) is Blocked
    with pytest.raises(IndexError, match="Dimension out of range"):
        y.mean((6, 7))


class Standardised(nn.Conv2d):
    """Weight standardisation as it is often written: by the method that forward calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


COMPILED = {
    "own convolution": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Standardised(8, 8, 3)),
    "in place": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.RReLU(inplace=True), nn.Conv2d(8, 8, 3)),
    "branching": lambda: Branching(),
}


class Branching(nn.Module):
    """Goes on with what a module has overwritten, by the name that it had before."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3), nn.Threshold(0.1, -1.0, inplace=True)
        self.unused = nn.RReLU(inplace=True)

    def forward(self, x):
        y = self.conv(x)
        z = self.act(y)
        self.unused(y)
        return y + z


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("batch", [2, 16])
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_models_compute_what_the_model_does(kind, batch, backend):
    torch.manual_seed(0)
    model = COMPILED[kind]().eval()
    topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters()), sparsity=0.7, method="static")
    images = torch.randn(batch, 3, 9, 9)
    compiled = chtconv.compile_sparse(model, topology, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images.clone()))


def test_a_batch_of_no_images_has_no_outputs(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5)).eval()
    topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters()), sparsity=0.7, method="static", layers=["*"])
    nothing = torch.empty(0, 3, 9, 9)
    assert chtconv.compile_sparse(model, topology, backend="sparse")(nothing).shape == (0, 5)
    chtconv.accelerate(model, topology, backend="sparse")
    assert model(nothing).shape == torch.compile(model, backend="eager")(nothing).shape == (0, 5)


@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize(
    ("window", "dilation", "padding"),
    [
        (1, (1, 1), (2**31 - 1, 2**31 - 1)),
        (2, (2**29 - 2**15 - 3, 2**29 + 2**15 - 3), (2**28 - 2**14 - 1, 2**28 + 2**14 - 1)),
    ],
    ids=["outputs", "patches"],
)
def test_sizes_beyond_all_memory_are_refused(window, dilation, padding, images):
    """Products of these would wrap around: to 0, or to a little memory for huge rows."""
    weight = torch.ones(1, 1, window, window)
    links = Links.of(weight.bool())
    with pytest.raises(RuntimeError, match=r"kernel plan: an argument is not one that it takes|allocate|overflow"):
        sparse_conv2d(torch.ones(images, 1, 4, 4), weight, None, links, padding=padding, dilation=dilation)
