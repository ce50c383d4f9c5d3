"""Small but faithful networks of every family that people make sparse, in plain PyTorch.

Each has the structure of its original (blocks, shortcuts, normalisation, order of axes), with widths and depths cut
down so that a training step takes milliseconds. ``ZOO`` is the table that tests run over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and 34)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50 and up; the stride sits in the 3x3)."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = projection(channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        return functional.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def projection(channels: int, out_channels: int, stride: int) -> nn.Module:
    """The shortcut of a residual block: a 1x1 convolution where the shape changes."""
    if stride == 1 and channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """Residual network: 7x7 stem with pooling, stages of doubling width, mean, linear head."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: Sequence[int], width: int = 64, classes: int = 10
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels, stages = width, []
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                blocks.append(block(channels, width << stage, 2 if stage and not index else 1))
                channels = (width << stage) * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(functional.relu(self.bn1(self.conv1(images))))
        return self.fc(self.layers(x).mean((2, 3)))


def conv_bn_relu6(channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expansion (pointwise), depthwise, projection (pointwise, linear); a shortcut where the shape stays."""

    def __init__(self, channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.shortcut = stride == 1 and channels == out_channels
        self.conv = nn.Sequential(
            *([conv_bn_relu6(channels, hidden, 1)] if expansion > 1 else []),
            conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """Inverted residuals by a plan of (expansion, channels, depth, stride)."""

    def __init__(
        self,
        plan: Sequence[tuple[int, int, int, int]] = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        stem: int = 32,
        last: int = 1280,
        classes: int = 10,
    ) -> None:
        super().__init__()
        features, channels = [conv_bn_relu6(3, stem, 3, 2)], stem
        for expansion, out_channels, depth, stride in plan:
            for index in range(depth):
                features.append(InvertedResidual(channels, out_channels, stride if not index else 1, expansion))
                channels = out_channels
        features.append(conv_bn_relu6(channels, last, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of images [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise; then, with the channels last, layer norm and two pointwise layers that are nn.Linear."""

    def __init__(self, channels: int, layer_scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dwconv(x).permute(0, 2, 3, 1)
        out = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(self.norm(out))))
        return x + out.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patches of 4x4 pixels, then stages of blocks with 2x2 convolutions of stride 2 between them."""

    def __init__(
        self, depths: Sequence[int], widths: Sequence[int], classes: int = 10, layer_scale: float = 1e-6
    ) -> None:
        super().__init__()
        downsample, stages = [nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), LayerNorm2d(widths[0], eps=1e-6))], []
        for before, after in pairwise(widths):
            downsample.append(nn.Sequential(LayerNorm2d(before, eps=1e-6), nn.Conv2d(before, after, 2, 2)))
        for depth, width in zip(depths, widths, strict=True):
            stages.append(nn.Sequential(*(ConvNeXtBlock(width, layer_scale) for _ in range(depth))))
        self.downsample_layers = nn.ModuleList(downsample)
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean((2, 3))))


def double_conv(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Down with poolings, up with transposed convolutions, concatenated at each resolution; logits by pixel."""

    def __init__(self, depth: int = 4, width: int = 64, channels: int = 3, classes: int = 2) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(map(double_conv, [channels, *widths], widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(double_conv(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        passed = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            passed.append(x)
        for up, merge, beside in zip(self.up, self.merge, reversed(passed[:-1]), strict=True):
            x = merge(torch.cat([beside, up(x)], 1))
        return self.head(x)


class VideoNet(nn.Module):
    """3-D convolutions for clips [B, 3, T, H, W], one of them split in space and time as in R(2+1)D."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), padding=(1, 3, 3), bias=False)
        self.norm = nn.BatchNorm3d(width)
        self.spatial = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.temporal = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.down = nn.Conv3d(width, 2 * width, 3, 2, padding=1, bias=False)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, clips: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(clips)))
        x = functional.relu(x + self.temporal(functional.relu(self.spatial(x))))
        return self.fc(functional.relu(self.down(x)).mean((2, 3, 4)))


class AudioNet(nn.Module):
    """Waveforms [B, 1, T]: the long first kernel of M5, then causal dilated convolutions with gates as in WaveNet."""

    def __init__(
        self, width: int = 64, stem: int = 80, dilations: Sequence[int] = (1, 2, 4), classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, stem, 4)
        self.norm = nn.BatchNorm1d(width)
        self.gated = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=d) for d in dilations)
        self.mix = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations)
        self.fc = nn.Linear(width, classes)

    def forward(self, waves: Tensor) -> Tensor:
        x = functional.max_pool1d(functional.relu(self.norm(self.stem(waves))), 4)
        for gated, mix in zip(self.gated, self.mix, strict=True):
            signal, gate = gated(functional.pad(x, (gated.dilation[0], 0))).chunk(2, 1)
            x = x + mix(signal.tanh() * gate.sigmoid())
        return self.fc(x.mean(2))


class Attention(nn.Module):
    """Self-attention with queries, keys and values in one linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class TorchAttention(nn.MultiheadAttention):
    """Self-attention by torch's own module, whose first projection is a bare parameter and no layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, attention: type[Attention | TorchAttention]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer: patches by a convolution, a class token, positions, blocks, linear head."""

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        classes: int = 10,
        attention: type[Attention | TorchAttention] = Attention,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, attention) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


@dataclass(frozen=True)
class Case:
    """A network of the table, small enough for tests.

    Attributes:
        build: makes it anew.
        inputs: random inputs for a batch size.
        layers: what to pass to ``sparsify``; None for its default, the convolutions, transposed ones too.
        linear: whether its linear layers are to be sparse, apart from the head.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    layers: tuple[str, ...] | None = None
    linear: bool = False


def inputs(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape)


def small_convnext() -> nn.Module:
    # The layer scale of the original, 1e-6, is for hundreds of epochs; here gradients must be seen in three steps.
    return ConvNeXt((1, 2), (16, 24), layer_scale=0.1)


def small_vit(attention: type[Attention | TorchAttention]) -> nn.Module:
    return ViT(image=16, patch=4, width=24, depth=2, heads=3, attention=attention)


ZOO: dict[str, Case] = {
    "resnet_basic": Case(lambda: ResNet(BasicBlock, (1, 2), width=8), inputs(3, 32, 32)),
    "resnet_bottleneck": Case(lambda: ResNet(Bottleneck, (1, 2), width=8), inputs(3, 32, 32)),
    "mobilenet_v2": Case(
        lambda: MobileNetV2(((1, 8, 1, 1), (3, 16, 2, 2)), stem=8, last=32),
        inputs(3, 32, 32),
    ),
    "convnext": Case(small_convnext, inputs(3, 32, 32)),
    "convnext_linear": Case(small_convnext, inputs(3, 32, 32), ("downsample_layers.*", "stages.*"), linear=True),
    "unet": Case(lambda: UNet(depth=2, width=8), inputs(3, 16, 16)),
    "video": Case(lambda: VideoNet(width=8), inputs(3, 4, 16, 16)),
    "audio": Case(lambda: AudioNet(width=12, stem=20), inputs(1, 400)),
    "vit": Case(lambda: small_vit(Attention), inputs(3, 16, 16), ("patch_embed", "blocks.*"), linear=True),
    "vit_torch": Case(lambda: small_vit(TorchAttention), inputs(3, 16, 16), ("patch_embed", "blocks.*"), linear=True),
}
