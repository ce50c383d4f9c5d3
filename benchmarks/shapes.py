"""The convolutions of well-known networks at 224x224: weight shape, size of the input, arguments of the layer."""

from typing import Any, TypeAlias

Layers: TypeAlias = list[tuple[tuple[int, ...], int, dict[str, Any]]]


def resnet50() -> Layers:
    """Weight shape, input size and arguments of each convolution of ResNet-50 at 224x224."""
    layers: Layers = [((64, 3, 7, 7), 224, {"stride": 2, "padding": 3})]
    channels, size = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            step = stride if block == 0 else 1
            layers.append(((width, channels, 1, 1), size, {}))
            layers.append(((width, width, 3, 3), size, {"stride": step, "padding": 1}))
            if block == 0:
                layers.append(((4 * width, channels, 1, 1), size, {"stride": step}))
            size //= step
            layers.append(((4 * width, width, 1, 1), size, {}))
            channels = 4 * width
    return layers


def convnext_tiny() -> Layers:
    """Weight shape, input size and arguments of each convolution of ConvNeXt-T at 224x224."""
    layers: Layers = [((96, 3, 4, 4), 224, {"stride": 4})]
    size, channels = 56, 96
    for width, blocks in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if width != 96:
            layers.append(((width, channels, 2, 2), size, {"stride": 2}))
            size, channels = size // 2, width
        for _ in range(blocks):
            layers.append(((width, 1, 7, 7), size, {"padding": 3, "groups": width}))
            layers += [((4 * width, width, 1, 1), size, {}), ((width, 4 * width, 1, 1), size, {})]
    return layers
