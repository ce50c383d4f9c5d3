"""VGG16 for small images: the network of the paper's experiments (section 4.1)."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

from torch import Tensor, fx, nn

from chtconv.errors import ConfigurationError

_POOL: Final = 0
_VGG16: Final = (64, 64, _POOL, 128, 128, _POOL, *(256,) * 3, _POOL, *(512,) * 3, _POOL, *(512,) * 3, _POOL)
_VGG19: Final = (64, 64, _POOL, 128, 128, _POOL, *(256,) * 4, _POOL, *(512,) * 4, _POOL, *(512,) * 4, _POOL)
_HEAD: Final = 4096


# Wrapped, because torch.fx traces no branch on sizes.
@fx.wrap
def _check_size(images: Tensor, minimum: int) -> None:
    if min(images.shape[-2:]) < minimum:
        shape = "x".join(map(str, images.shape[-2:]))
        raise ConfigurationError(
            f"images of {shape} pixels: accepted are {minimum}x{minimum} and more, for the poolings."
        )


class VGG(nn.Module):
    """3x3 convolutions with batch norm in blocks of one size, then a perceptron with two hidden layers.

    ``features`` maps images [batch, in_channels, height, width] to [batch, channels, height/32, width/32], the
    mean over what is left of the image goes through ``classifier`` to logits [batch, classes]. The
    convolutions have no bias, because the batch norm after each has one.

    Initial weights are the usual ones of VGG on CIFAR for the convolutions (normal, Kaiming, fan-out). The
    perceptron keeps torch's default, whose scale follows the number of inputs: the 0.01 of the original
    would starve a narrow head.

    Args:
        plan: channels of each convolution, 0 for a pooling layer.
        num_classes: logits per image.
        head: neurons of each of the two hidden layers.
        dropout: share of the hidden neurons that is dropped while training.
        in_channels: channels of an image.
    """

    def __init__(self, plan: Sequence[int], num_classes: int, *, head: int, dropout: float, in_channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*_blocks(plan, in_channels))
        last = [channels for channels in plan if channels != _POOL][-1]
        self.classifier = nn.Sequential(
            *(nn.Linear(last, head), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            *(nn.Linear(head, head), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            nn.Linear(head, num_classes),
        )
        self.minimum_size: Final = 2 ** list(plan).count(_POOL)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width].

        Raises:
            ConfigurationError: if an image is too small for the poolings.
        """
        _check_size(images, self.minimum_size)
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


def vgg16(
    num_classes: int, *, width: float = 1.0, head: int | None = None, dropout: float = 0.5, in_channels: int = 3
) -> VGG:
    """VGG16 with batch norm: 13 convolutions, five poolings, features -> head -> head -> classes.

    Args:
        num_classes: logits per image, at least 1.
        width: multiplies the channels of every convolution (rounded, at least 1).
        head: neurons of each hidden layer of the perceptron; 4096 times ``width`` if not given.
        dropout: share of the hidden neurons dropped while training, in [0, 1).
        in_channels: channels of an image.

    Raises:
        ConfigurationError: naming the argument that cannot be used.

    >>> network = vgg16(10, width=1 / 16)
    >>> network.features[0].weight.shape, network.classifier[-1].weight.shape
    (torch.Size([4, 3, 3, 3]), torch.Size([10, 256]))
    """
    return _vgg(_VGG16, num_classes, width, head, dropout, in_channels)


def vgg19(
    num_classes: int, *, width: float = 1.0, head: int | None = None, dropout: float = 0.5, in_channels: int = 3
) -> VGG:
    """VGG19 with batch norm: 16 convolutions, else as :func:`vgg16`.

    >>> sum(isinstance(module, nn.Conv2d) for module in vgg19(10, width=1 / 16).modules())
    16
    """
    return _vgg(_VGG19, num_classes, width, head, dropout, in_channels)


def _vgg(
    channels: Sequence[int], num_classes: int, width: float, head: int | None, dropout: float, in_channels: int
) -> VGG:
    if not (math.isfinite(width) and width > 0):
        raise ConfigurationError(f"width={width!r}: accepted is a finite number above 0.")
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"dropout={dropout!r}: accepted are numbers from 0 up to, but not including, 1.")
    neurons = _scaled(_HEAD, width) if head is None else head
    for name, value in (("num_classes", num_classes), ("head", neurons), ("in_channels", in_channels)):
        if value < 1:
            raise ConfigurationError(f"{name}={value!r}: accepted is at least 1.")
    plan = [each and _scaled(each, width) for each in channels]
    return VGG(plan, num_classes, head=neurons, dropout=dropout, in_channels=in_channels)


def _scaled(count: int, width: float) -> int:
    return max(1, round(count * width))


def _blocks(plan: Sequence[int], channels: int) -> Iterator[nn.Module]:
    for out_channels in plan:
        if out_channels == _POOL:
            yield nn.MaxPool2d(2)
            continue
        yield nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        yield nn.BatchNorm2d(out_channels)
        yield nn.ReLU(inplace=True)
        channels = out_channels
