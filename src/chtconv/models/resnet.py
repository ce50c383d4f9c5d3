"""Residual networks for small images: ResNet-18 and wide ones, with a 3x3 stem and no pooling before the last.

References: He et al., Deep Residual Learning, CVPR 2016 (ResNet-18, here in its usual form for CIFAR); Zagoruyko and
Komodakis, Wide Residual Networks, BMVC 2016 (section 3).
"""

import math
from collections.abc import Iterator
from typing import Final

from torch import Tensor, nn
from torch.nn import functional

from chtconv.errors import ConfigurationError

_RESNET18: Final = (2, 2, 2, 2)
_WIDE: Final = (16, 32, 64)


class Basic(nn.Module):
    """Two 3x3 convolutions, each before its batch norm, and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wider)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != wider:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, wider, 1, stride, bias=False), nn.BatchNorm2d(wider))

    def forward(self, x: Tensor) -> Tensor:
        """Features [batch, wider, height / stride, width / stride] of ``x`` [batch, channels, height, width]."""
        out: Tensor = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(out + self.shortcut(x))


class Preactivated(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU; the shortcut is taken after the first of these."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        changes = stride > 1 or channels != wider
        self.shortcut = nn.Conv2d(channels, wider, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Features [batch, wider, height / stride, width / stride] of ``x`` [batch, channels, height, width]."""
        begun = functional.relu(self.norm1(x))
        out: Tensor = self.conv2(functional.relu(self.norm2(self.conv1(begun))))
        return out + (x if self.shortcut is None else self.shortcut(begun))


class ResNet(nn.Module):
    """A stem, stages of blocks of which each halves the image but the first, the mean over what is left, a classifier.

    ``features`` maps images [batch, in_channels, height, width] to [batch, channels, height', width'].

    Args:
        features: all layers before the mean.
        channels: that they end with.
        num_classes: logits per image.
    """

    def __init__(self, features: nn.Sequential, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(channels, num_classes)
        for module in features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


def resnet18(
    num_classes: int, *, width: float = 1.0, head: int | None = None, dropout: float = 0.0, in_channels: int = 3
) -> ResNet:
    """ResNet-18 for small images: 20 convolutions in four stages of 64, 128, 256 and 512 channels.

    Args:
        num_classes: logits per image, at least 1.
        width: multiplies the channels of every convolution (rounded, at least 1).
        head: accepted is None, since there is no perceptron.
        dropout: not used.
        in_channels: channels of an image.

    Raises:
        ConfigurationError: naming the argument that cannot be used.

    >>> network = resnet18(10, width=1 / 16)
    >>> sum(isinstance(module, nn.Conv2d) for module in network.modules()), network.classifier.weight.shape
    (20, torch.Size([10, 32]))
    """
    _check(num_classes, width, head, in_channels)
    stem = _scaled(64, width)
    plan = [_scaled(64 * 2**stage, width) for stage in range(4)]
    layers = [nn.Conv2d(in_channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)]
    return ResNet(nn.Sequential(*layers, *_stages(Basic, stem, plan, _RESNET18)), plan[-1], num_classes)


def wrn22_2(
    num_classes: int, *, width: float = 1.0, head: int | None = None, dropout: float = 0.0, in_channels: int = 3
) -> ResNet:
    """The wide residual network of depth 22 and widening factor 2: three stages of 32, 64 and 128 channels.

    Args and errors are those of :func:`resnet18`.

    >>> network = wrn22_2(10)
    >>> sum(isinstance(module, nn.Conv2d) for module in network.modules())  # 19 of 3x3, 3 shortcuts
    22
    """
    _check(num_classes, width, head, in_channels)
    stem, plan = _scaled(16, width), [_scaled(2 * channels, width) for channels in _WIDE]
    layers = [nn.Conv2d(in_channels, stem, 3, padding=1, bias=False), *_stages(Preactivated, stem, plan, (3, 3, 3))]
    return ResNet(nn.Sequential(*layers, nn.BatchNorm2d(plan[-1]), nn.ReLU(inplace=True)), plan[-1], num_classes)


def _stages(
    block: type[Basic] | type[Preactivated], channels: int, plan: list[int], blocks: tuple[int, ...]
) -> Iterator[nn.Module]:
    for stage, (wider, count) in enumerate(zip(plan, blocks, strict=True)):
        for index in range(count):
            yield block(channels, wider, 2 if stage and not index else 1)
            channels = wider


def _scaled(count: int, width: float) -> int:
    return max(1, round(count * width))


def _check(num_classes: int, width: float, head: int | None, in_channels: int) -> None:
    if not (math.isfinite(width) and width > 0):
        raise ConfigurationError(f"width={width!r}: accepted is a finite number above 0.")
    if head is not None:
        raise ConfigurationError(f"head={head!r}: accepted is none, since a residual network has no perceptron.")
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ConfigurationError(f"{name}={value!r}: accepted is at least 1.")
