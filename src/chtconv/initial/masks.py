"""Sparse initialisation: which links there are before training (paper, section 3.2.1)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError, check_name
from chtconv.initial.bipartite import receptive_field, small_world
from chtconv.selection import Count, random_integers, take_largest

# Number of outputs, inputs and links of a linear layer, and a generator -> bool mask [outputs, inputs].
LinearTopology: TypeAlias = Callable[[int, int, int, torch.Generator], Tensor]

RANDOM = "random"
# With the randomness of the CHTs paper; for another one give a function like these.
LINEAR_TOPOLOGIES: Mapping[str, LinearTopology] = MappingProxyType({
    "small_world": lambda outputs, inputs, links, generator: small_world(outputs, inputs, links, 0.25, generator),
    "receptive_field": lambda outputs, inputs, links, generator: receptive_field(
        outputs, inputs, links, 0.25, generator
    ),
})  # fmt: skip
ALLOCATIONS = ("kernel", "layer", "model")


def links_at(density: float, shape: tuple[int, int], allocation: str | None, layer: str) -> int:
    """Number of active links at a density: of each kernel, the same in all of them, or of the whole layer.

    Args:
        density: share of active positions, in (0, 1].
        shape: kernels, and positions of a kernel (input channels of the group times kernel positions).
        allocation: ``"kernel"``, or another name in :data:`ALLOCATIONS` for the whole layer.
        layer: name of the layer, for the error.

    Raises:
        ConfigurationError: so sparse that a kernel, or the layer, would hold no link.

    >>> links_at(0.05, (64, 27), "kernel", "features.0"), links_at(0.05, (64, 27), "layer", "features.0")
    (1, 86)
    """
    kernels, positions = shape
    part, size = ("kernel", positions) if allocation == "kernel" else ("layer", kernels * positions)
    links = round(density * size)
    if links < 1:
        raise ConfigurationError(
            f"layer {layer}: at sparsity {1 - density:.6g} a {part} of {size} positions would hold no link; "
            f"accepted is less than {1 - 0.5 / size:.6g}, or leave the layer out."
        )
    return links


def initial_mask(
    initial: str | LinearTopology,
    shape: tuple[int, int],
    links: int,
    allocation: str | None,
    generator: torch.Generator,
    layer: str,
    linear: bool,
) -> Tensor:
    """The mask of a layer before training, bool [kernels, positions].

    Args:
        initial: ``"random"``, a name in :data:`LINEAR_TOPOLOGIES`, or a function like those.
        shape: kernels and positions of a kernel.
        links: of each kernel or of the layer, as ``allocation`` says.
        allocation: a name in :data:`ALLOCATIONS`.
        generator: draws the links.
        layer: name of the layer, for errors.
        linear: whether it has a single kernel position and one group, as these topologies need.

    Raises:
        ConfigurationError: neither a known name nor a function, a topology that is not defined for this layer or
            allocation, or a function that gives no such mask.
    """
    if initial == RANDOM:
        return random_mask(*shape, links, generator, allocation)
    if isinstance(initial, str):
        check_name("initial topology", initial, (RANDOM, *LINEAR_TOPOLOGIES))
    elif not callable(initial):
        names = ", ".join(map(repr, (RANDOM, *LINEAR_TOPOLOGIES)))
        raise ConfigurationError(f"layer {layer}: initial={initial!r}: accepted are {names}, and functions like these.")
    if not linear:
        raise ConfigurationError(
            f"layer {layer}: initial={initial!r} is defined for linear layers and ungrouped 1x1 convolutions; "
            "accepted is 'random' here."
        )
    make = LINEAR_TOPOLOGIES[initial] if isinstance(initial, str) else initial
    total = links * (shape[0] if allocation == "kernel" else 1)
    mask_OI = make(*shape, total, generator)
    if not isinstance(mask_OI, Tensor):
        raise ConfigurationError(
            f"layer {layer}: initial={initial!r} gave {type(mask_OI).__name__}; accepted is a tensor, torch.bool of "
            f"shape {list(shape)} with {total} links."
        )
    if mask_OI.shape != shape or mask_OI.dtype != torch.bool or int(mask_OI.sum()) != total:
        raise ConfigurationError(
            f"layer {layer}: initial={initial!r} gave {mask_OI.dtype} of shape {list(mask_OI.shape)} with "
            f"{int(mask_OI.sum())} links; accepted is torch.bool of shape {list(shape)} with {total}."
        )
    if allocation == "kernel" and not bool((mask_OI.sum(1) == links).all()):
        raise ConfigurationError(
            f"layer {layer}: initial={initial!r} does not give every kernel the same number of links; "
            "accepted is allocation='layer' with it."
        )
    return mask_OI


def random_mask(
    kernels: int, positions: int, links: int, generator: torch.Generator, allocation: str | None = "kernel"
) -> Tensor:
    """A random mask, with the same number of links in all kernels, or with so many in the whole layer.

    Returns:
        bool of shape [kernels, positions] on the device of the generator.

    >>> random_mask(2, 6, 3, torch.Generator().manual_seed(0)).sum(1)
    tensor([3, 3])
    """
    rows = (kernels, positions) if allocation == "kernel" else (1, kernels * positions)
    everywhere = torch.ones(rows, dtype=torch.bool, device=generator.device)
    count = Count(links, torch.zeros(rows[0], 1, dtype=torch.bool, device=generator.device))
    return take_largest(random_integers(everywhere, generator), everywhere, count).view(kernels, positions)
