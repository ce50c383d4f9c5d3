"""The layers of a model that have masks, and the size of input that each of them sees."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from chtconv.errors import ConfigurationError, unknown
from chtconv.explain.statistics import ScoreStatistics, score_statistics
from chtconv.layers.input_size import of_call
from chtconv.randomness import canonical_names


@dataclass(frozen=True, eq=False)
class MaskedLayer:
    """A layer as link prediction sees it.

    Attributes:
        mask: active links, bool of the weight's shape.
        input_size: spatial size of its input; empty for a linear layer.
        arguments: stride, padding and so on, as :func:`chtconv.link_scores` takes them.
    """

    mask: Tensor
    input_size: tuple[int, ...]
    arguments: dict[str, Any]


def explain(
    model: nn.Module, masks: Mapping[str, Tensor], images: Tensor, **options: Any
) -> dict[str, ScoreStatistics]:
    """The statistics of the link scores of every layer that has a mask.

    Args:
        model: any model; it is called once, in evaluation mode and without gradients, to see the layers' input sizes.
        masks: bool masks by parameter name, such as ``topology.masks``.
        images: an input of the model; its values do not matter.
        **options: predictor, graph, zeta, tau and versus, as in :func:`chtconv.explain.score_statistics`.

    Returns:
        Statistics by parameter name; layers without any disabled position are left out.

    Raises:
        ConfigurationError: a mask of no layer or of another shape, a layer that the model does not call, or what
            :func:`chtconv.explain.score_statistics` refuses.

    Example:
        >>> from chtconv import sparsify
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        >>> topology = sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.9)
        >>> for name, found in explain(model, topology.masks, torch.zeros(1, 3, 16, 16), graph="layer").items():
        ...     print(name, found.links, "of", found.links + found.candidates)
        0.weight 24 of 216
        1.weight 56 of 576
    """
    return statistics(masked_layers(model, masks, images), **options)


def statistics(layers: Mapping[str, MaskedLayer], **options: Any) -> dict[str, ScoreStatistics]:
    """The statistics of layers, without those that have no disabled position.

    Raises:
        ConfigurationError: naming the layer.
    """
    found = {}
    for name, layer in layers.items():
        if bool(layer.mask.all()):
            continue
        try:
            found[name] = score_statistics(layer.mask, layer.input_size, **layer.arguments, **options)
        except ConfigurationError as error:
            raise ConfigurationError(f"layer {name.removesuffix('.weight')}: {error}") from error
    return found


def masked_layers(model: nn.Module, masks: Mapping[str, Tensor], images: Tensor) -> dict[str, MaskedLayer]:
    """The layers with masks, after one forward pass to see the sizes of their inputs.

    Raises:
        ConfigurationError: as :func:`explain`.
    """
    owners = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear))
    }
    # A model that is compiled or distributed has prefixes before its names, which masks need not have, or have alone.
    short, full = canonical_names(masks), {short: name for name, short in canonical_names(owners).items()}
    masks = {name if name in owners else full.get(short[name], name): mask for name, mask in masks.items()}
    for name, mask in masks.items():
        if name not in owners:
            raise unknown("layer", name, owners)
        if mask.shape != owners[name].weight.shape:
            raise ConfigurationError(
                f"layer {name}: the mask has shape {list(mask.shape)}; accepted is {list(owners[name].weight.shape)}."
            )
    with _observed({name: owners[name] for name in masks}) as sizes, _evaluating(model), torch.no_grad():
        model(images)
    for name in masks:
        if name not in sizes:
            raise ConfigurationError(f"layer {name}: the model does not call it, so the size of its input is unknown.")
    # In the order of the network, which a file of masks does not keep.
    return {
        name: MaskedLayer(masks[name], sizes[name], _arguments(module))
        for name, module in owners.items()
        if name in masks
    }


@contextmanager
def _observed(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The spatial sizes of the inputs of modules by name, filled in as they are called."""
    sizes: dict[str, tuple[int, ...]] = {}

    def note(name: str, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        size = of_call(module, args, kwargs)
        if size is not None:
            sizes[name] = tuple(size)

    handles = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and after it the mode that each module was in: running averages must not move."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _arguments(module: nn.Module) -> dict[str, Any]:
    if not isinstance(module, _ConvNd):
        return {}
    names = ["stride", "padding", "dilation", "groups", "padding_mode"]
    arguments = {name: getattr(module, name) for name in names}
    if isinstance(module, _ConvTransposeNd):
        arguments |= {"transposed": True, "output_padding": module.output_padding}
    return arguments
