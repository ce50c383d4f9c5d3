"""VGG16: its layers, its sizes, and initial weights that depend on the seed alone."""

import math

import pytest
import torch
from torch import nn

from chtconv.errors import ConfigurationError
from chtconv.models import build_model, vgg16

# Simonyan and Zisserman (2015), table 1, column D.
CHANNELS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_full_width_is_column_d_with_batch_norm() -> None:
    with torch.device("meta"):
        model = vgg16(10)
    found = convolutions(model)
    assert [one.out_channels for one in found] == CHANNELS
    assert [one.in_channels for one in found] == [3, *CHANNELS[:-1]]
    assert all(one.kernel_size == (3, 3) and one.padding == (1, 1) and one.bias is None for one in found)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 13
    linear = [(one.in_features, one.out_features) for one in model.modules() if isinstance(one, nn.Linear)]
    assert linear == [(512, 4096), (4096, 4096), (4096, 10)]
    # The usual count, with a bias in each convolution, less those biases.
    assert sum(parameter.numel() for parameter in model.parameters()) == 33_646_666 - sum(CHANNELS)


def test_pooling_stands_where_the_paper_has_it() -> None:
    sizes: list[int] = []
    model = vgg16(10, width=1 / 64).eval()
    for module in convolutions(model):
        module.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert sizes == [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]


@pytest.mark.parametrize(("width", "first", "last"), [(0.25, 16, 128), (0.001, 1, 1), (1.5, 96, 768), (0.11, 7, 56)])
def test_width_multiplies_the_channels_and_rounds(width: float, first: int, last: int) -> None:
    model = vgg16(10, width=width, head=3)
    assert [convolutions(model)[0].out_channels, convolutions(model)[-1].out_channels] == [first, last]


def test_head_follows_width_unless_it_is_given() -> None:
    assert vgg16(10, width=0.125).classifier[0].out_features == 512
    assert vgg16(10, width=0.125, head=7).classifier[3].out_features == 7


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
def test_impossible_width_is_named(width: float) -> None:
    with pytest.raises(ConfigurationError, match=f"width={width}"):
        vgg16(10, width=width)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"head": 0}, "head=0"), ({"dropout": 1.0}, "dropout=1.0"), ({"in_channels": 0}, "in_channels=0")],
)
def test_other_impossible_values_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        vgg16(10, width=1 / 16, **arguments)


def test_images_below_32_pixels_are_refused_and_larger_ones_taken() -> None:
    model = vgg16(10, width=1 / 64).eval()
    with pytest.raises(ConfigurationError, match="images of 32x31 pixels: accepted are 32x32"):
        model(torch.zeros(1, 3, 32, 31))
    assert model(torch.zeros(1, 3, 64, 70)).shape == (1, 10)


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_generator() -> None:
    torch.manual_seed(1)
    one = build_model("vgg16", 10, seed=14, width=1 / 16).state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    torch.rand(17)
    two = build_model("vgg16", 10, seed=14, width=1 / 16).state_dict()
    other = build_model("vgg16", 10, seed=15, width=1 / 16).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["features.0.weight"], other["features.0.weight"])


def test_convolutions_start_from_kaiming_normal_fan_out() -> None:
    model = build_model("vgg16", 10, seed=0, width=0.5)
    for module in convolutions(model)[3:]:
        assert module.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * module.out_channels)), rel=0.05)


def test_unknown_model_gives_the_nearest_match() -> None:
    with pytest.raises(ConfigurationError, match="unknown model 'vgg_16': did you mean 'vgg16'"):
        build_model("vgg_16", 10, seed=0)
