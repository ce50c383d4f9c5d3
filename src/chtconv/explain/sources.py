"""Where the command line takes masks from: the folder of a run, or a generator."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from chtconv.errors import ConfigurationError, unknown
from chtconv.explain.layers import MaskedLayer, masked_layers
from chtconv.initial import links_at, random_mask
from chtconv.layers.find import find_layers
from chtconv.models import build_model
from chtconv.randomness import generator
from chtconv.training import Config, RunFolder
from chtconv.training.run_folder import MASKS, MODEL


def layers_of_run(path: Path, wanted: Sequence[str]) -> tuple[Config, dict[str, MaskedLayer]]:
    """Configuration and masked layers of a complete run.

    Input sizes come from the network on an image of the run's size, without arithmetic and without the data set.

    Args:
        path: folder of the run.
        wanted: names of layers, or wildcards; all if empty.

    Raises:
        ConfigurationError: no complete run, a dense one, files that do not fit together, or an unknown layer.
    """
    config = RunFolder(path).stored_config()
    masks = _stored_masks(path)
    if not masks:
        raise ConfigurationError(f"{path} is a dense run: it has no masks; accepted is a run of a sparse method.")
    chosen = _chosen(masks, wanted)
    channels = _image_channels(config, path)
    size = config.data.image_size
    with torch.device("meta"):
        layers = masked_layers(_network(config, channels), chosen, torch.empty(1, channels, size, size))
    return config, layers


def random_layer(
    shape: tuple[int, ...], input_size: tuple[int, ...], sparsity: float, seed: int, arguments: dict[str, Any]
) -> MaskedLayer:
    """A layer with the random mask that a run starts with: the same number of links in every kernel.

    Args:
        shape: of the weight, [out channels, in channels / groups, *kernel].
        input_size: spatial size of the input, a number for each axis of the kernel.
        sparsity: share of the links that is absent.
        seed: of the mask.
        arguments: stride and so on, as :func:`chtconv.link_scores` takes them.

    Raises:
        ConfigurationError: so sparse that a kernel would hold no link.
    """
    positions = math.prod(shape[1:])
    draw = generator(seed, "mask", "explain")
    mask_OI = random_mask(shape[0], positions, links_at(1 - sparsity, (shape[0], positions), "kernel", "--shape"), draw)
    return MaskedLayer(mask_OI.view(shape), input_size, arguments)


def _chosen(masks: dict[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    """The masks of the layers that match; names with or without their ".weight"."""
    names = {name.removesuffix(".weight"): name for name in masks}
    patterns = [pattern.removesuffix(".weight") for pattern in wanted]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unknown("layer", pattern, names)
    return {
        name: masks[name]
        for short, name in names.items()
        if not patterns or any(fnmatchcase(short, pattern) for pattern in patterns)
    }


def _stored_masks(path: Path) -> dict[str, Tensor]:
    file = path / MASKS
    if not file.exists():
        raise ConfigurationError(
            f"{path} holds no {MASKS}: accepted is a complete run; chtconv train --resume goes on with another."
        )
    try:
        masks = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigurationError(f"cannot read {file}: {error}") from error
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ConfigurationError(f"{file}: {name} is {mask.dtype}; accepted is torch.bool.")
    return masks


def _image_channels(config: Config, path: Path) -> int:
    """Channels of the run's images: input channels of the first convolution, as its weights were stored."""
    with torch.device("meta"):
        first = next(iter(find_layers(_network(config, 3), None)))
    try:
        with safetensors.safe_open(path / MODEL, "pt") as file:
            shape: list[int] = file.get_slice(f"{first}.weight").get_shape()
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigurationError(f"cannot read {first}.weight in {path / MODEL}: {error}") from error
    return shape[1]


def _network(config: Config, channels: int) -> nn.Module:
    # The number of classes is unknown here, and no convolution depends on it.
    network = config.network
    return build_model(
        network.model, 1, seed=config.machine.seed, width=network.width, head=network.head, in_channels=channels
    )
