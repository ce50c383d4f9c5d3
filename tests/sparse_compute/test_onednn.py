"""Layers whose weight torch's own kernels must not be given: the process would die, so each case has one of its own."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from chtconv.onednn import any_overruns, overruns, plain
from chtconv.sparse_compute.library import library
from chtconv.training.config import Config
from chtconv.training.run import prepare

CHANNELS = [2, 4, 7, 8, 15, 16]
OURS = """
import torch
from torch import nn
from chtconv.sparse_compute.convolution import gradients
from chtconv.sparse_compute.graphs import convolution_in_graph
from chtconv.sparse_compute.links import Links
from chtconv.sparse_compute.measurement import measure
from chtconv.sparse_compute.problem import Geometry

torch.set_num_threads(1)
for images in (64, 5):
    layer = nn.Conv2d({channels}, 8, 1, stride=2).to(memory_format=torch.channels_last)
    weight = layer.weight.detach().copy_(torch.randint(-3, 4, layer.weight.shape))
    x = torch.randint(-3, 4, (images, {channels}, 16, 16)).float().contiguous(memory_format=torch.channels_last)
    grad = torch.randint(-3, 4, (images, 8, 8, 8)).float().contiguous(memory_format=torch.channels_last)
    links = Links.of(torch.ones(weight.shape, dtype=torch.bool))
    geometry = Geometry.of(x, (1, 1), (2, 2), (0, 0), (1, 1))
    reference = torch.einsum("nohw,nihw->oi", grad, x[:, :, ::2, ::2])[:, :, None, None]
    for _ in range(10):
        found = gradients(x, weight, grad, links, geometry, (False, True, False), dense_gradient=True)[1]
        assert torch.equal(found, reference)
        layer.zero_grad()
        # No layer has this number: dense.
        convolution_in_graph(layer, x, -1, torch.float32).backward(grad)
        assert torch.equal(layer.weight.grad, reference)
        assert min(measure(layer, x, links, "fiw", torch.float32)[:2]) > 0
"""


@pytest.mark.skipif(library() is None, reason="no compiled kernels")
@pytest.mark.parametrize("channels", CHANNELS)
def test_dense_gradients_graphs_and_measuring_survive(channels: int) -> None:
    code = OURS.format(channels=channels)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("channels", CHANNELS)
def test_plain_strides_are_those_of_no_other_layout(channels: int) -> None:
    layer = nn.Conv2d(channels, 8, 1, stride=2).to(memory_format=torch.channels_last)
    assert layer.weight.stride() == (channels, 1, channels, channels)
    assert plain(layer.weight).stride() == (channels, 1, 1, 1)
    assert torch.equal(plain(layer.weight), layer.weight)
    cut = torch.rand(5, channels + 1, 3, 3)[:, :channels].contiguous(memory_format=torch.channels_last)
    assert plain(cut).stride() == (9 * channels, 9, 3, 1)
    assert torch.equal(plain(cut), cut)


def test_what_overruns() -> None:
    assert overruns(4, (1, 1), (1, 2))
    assert overruns(15, (1, 1), (3, 3))
    assert not overruns(16, (1, 1), (2, 2))
    assert not overruns(4, (1, 1), (1, 1))
    assert not overruns(4, (1, 3), (2, 2))
    assert any_overruns(nn.Sequential(nn.ReLU(), nn.Conv2d(32, 32, 1, stride=2, groups=4)))
    assert not any_overruns(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 1), nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("model", "width", "form"),
    [
        ("resnet18", 1 / 8, torch.contiguous_format),
        ("resnet18", 1 / 4, torch.channels_last),
        ("wrn22_2", 1 / 4, torch.contiguous_format),
        ("vgg16", 1 / 16, torch.channels_last),
    ],
)
def test_runs_choose_the_layout_that_their_model_may_have(model: str, width: float, form: torch.memory_format) -> None:
    run = prepare(Config().replace(model=model, width=width, sparsity=0.8, device="cpu"))
    images, _ = next(iter(run.batches.epoch(0)))
    assert images.is_contiguous(memory_format=form)
    weights = [module.weight for module in run.model.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=form) for weight in weights)
    if form is torch.contiguous_format:
        assert all(weight.stride()[2:] == (weight.shape[3], 1) for weight in weights)
