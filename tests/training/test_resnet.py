"""Residual networks: their layers and sizes beside the published ones, and that they train sparsely."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from chtconv.errors import ConfigurationError
from chtconv.models import build_model, resnet18, vgg19, wrn22_2
from chtconv.training import Config, train


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def test_sizes_are_the_published_ones() -> None:
    """ResNet-18 for CIFAR has 11.17 million parameters; WRN-22-2 and VGG19 are counted by hand from their plans."""
    with torch.device("meta"):
        assert parameters(resnet18(10)) == 11_173_962
        stages = [(16, 32), (32, 64), (64, 128)]
        convolutions = sum(9 * c * w + 5 * 9 * w * w + c * w for c, w in stages) + 9 * 3 * 16
        norms = sum(2 * (c + 5 * w) for c, w in stages) + 2 * 128
        assert parameters(wrn22_2(10)) == convolutions + norms + 128 * 10 + 10
        plan = [3, 64, 64, 128, 128, *[256] * 4, *[512] * 8]
        convolutions = sum(9 * before * after for before, after in itertools.pairwise(plan))
        linear = 512 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 10 + 10
        assert parameters(vgg19(10)) == convolutions + 2 * sum(plan[1:]) + linear


@pytest.mark.parametrize(("name", "sizes"), [("resnet18", [32, 16, 8, 4]), ("wrn22_2", [32, 16, 8])])
def test_each_stage_but_the_first_halves_the_image(name: str, sizes: list[int]) -> None:
    model = build_model(name, 10, seed=0, width=1 / 16).eval()
    seen: list[int] = []
    for module in model.modules():
        if hasattr(module, "conv2"):
            module.register_forward_hook(lambda _, __, output: seen.append(output.shape[-1]))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert list(dict.fromkeys(seen)) == sizes


@pytest.mark.parametrize("name", ["resnet18", "wrn22_2"])
def test_a_perceptron_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="head=16: accepted is none"):
        build_model(name, 10, seed=0, head=16)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 1 / 16), ("wrn22_2", 1 / 4)])
def test_they_train_sparsely(name: str, width: float, tmp_path: Path) -> None:
    config = Config().replace(model=name, width=width, epochs=2, batch_size=256, sparsity=0.8, threads=1, device="cpu")
    summary = train(config, tmp_path)
    assert summary["sparsity"] == pytest.approx(0.8, abs=0.02)
    assert summary["evolutions"] == 1
    assert 0 < summary["flops"]["training"] < summary["flops"]["dense_training"]
