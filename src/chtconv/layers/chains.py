"""Chain removal: a neuron with links on one side only is dead, and its other links go with it.

The neurons between two consecutive layers are the channels that one puts out and the other takes in. Masks here are
bool [O, C, K] per layer: output channels, the input channels of a group, kernel positions. That is a weight with its
kernel flattened, outputs first also where transposed; the number of groups follows from the layer before. Axes of
other tensors: B batch, S inputs of a channel, G groups.

Source: Zhang et al., Epitopological learning and Cannistraci-Hebb network shape intelligence brain-inspired theory
for ultra-sparse advantage in deep learning, ICLR 2024.
"""

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import NamedTuple

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError


class Link(NamedTuple):
    """Two layers, the second of which takes the outputs of the first and nothing else.

    Attributes:
        producer: name of the module that comes first.
        consumer: name of the module that comes second.
        spread: inputs of the consumer for each output of the producer, in a row; above 1 after a flatten.
    """

    producer: str
    consumer: str
    spread: int = 1


def remove_dead(kept: Mapping[str, Tensor], links: Sequence[Link]) -> dict[str, Tensor]:
    """Removes the links of dead channels, and of those that die of it, until none is left.

    A channel between two layers is dead if its row in the producer is empty, or all of its inputs in the consumer
    are. The links that stay are those on a path from the inputs of the first layer of a chain to the outputs of its
    last: inputs of the first and outputs of the last never die from the side that nothing is known of. A chain without
    any such path would lose all of its links; its layers stay as they were.

    One pass along the chains and one back reach the fixed point; nothing waits for the device. The function of the
    network stays the same where channels without links are silent: without biases, batch norm and the like.

    Args:
        kept: bool [O, C, K] for each name in ``links``; others are passed on.
        links: in any order, see :func:`chtconv.layers.consecutive.consecutive_layers`.

    Returns:
        New masks by name, of the same shapes, dtypes and devices.

    Raises:
        ConfigurationError: a mask that is missing, not bool [O, C, K] or does not fit its neighbour, or links that
            branch or form a circle.

    Example:
        >>> first = torch.tensor([[1, 0], [0, 0], [1, 1]]).bool()[..., None]
        >>> second = torch.tensor([[0, 1, 1], [0, 1, 0]]).bool()[..., None]
        >>> masks = remove_dead({"first": first, "second": second}, [Link("first", "second")])
        >>> [mask[..., 0].int().tolist() for mask in masks.values()]
        [[[0, 0], [0, 0], [1, 1]], [[0, 0, 1], [0, 0, 0]]]
    """
    ordered = _in_order(links)
    masks = dict(kept)
    for link in (*ordered, *reversed(ordered)):
        active_O = _active(masks, link)
        masks[link.producer] = masks[link.producer] & active_O[:, None, None]
        consumer_GOCK = _by_group(masks, link)
        active_GOCK = active_O.repeat_interleave(link.spread).view(len(consumer_GOCK), 1, -1, 1)
        masks[link.consumer] = (consumer_GOCK & active_GOCK).flatten(0, 1)
    return {name: torch.where(masks[name].any(), masks[name], mask) for name, mask in kept.items()}


def active_channels(masks: Mapping[str, Tensor], links: Sequence[Link]) -> dict[Link, Tensor]:
    """Which channels between consecutive layers have links on both sides: bool [O], by link.

    Args:
        masks: bool [O, C, K] for each name in ``links``.
        links: see :func:`chtconv.layers.consecutive.consecutive_layers`.

    Raises:
        ConfigurationError: as :func:`remove_dead`.

    Example:
        >>> masks = {"one": torch.ones(2, 1, 1).bool(), "two": torch.tensor([[[True], [False]]])}
        >>> active_channels(masks, [Link("one", "two")])
        {Link(producer='one', consumer='two', spread=1): tensor([ True, False])}
    """
    return {link: _active(masks, link) for link in _in_order(links)}


def active_rate(masks: Mapping[str, Tensor], links: Sequence[Link]) -> float:
    """Active neuron rate: channels between consecutive layers with links on both sides / all of those.

    The masks are taken as they are. The rate post-percolation (ANP) is this rate of masks after :func:`remove_dead`, in
    which every active channel lies on a path, except in chains without any path, which are left as they were.

    Args:
        masks: bool [O, C, K] for each name in ``links``.
        links: see :func:`chtconv.layers.consecutive.consecutive_layers`.

    Returns:
        From 0 to 1; nan where there are no links. For the rate of one link, give that link alone.

    Raises:
        ConfigurationError: as :func:`remove_dead`.

    Example:
        >>> masks = {"one": torch.ones(4, 1, 1).bool(), "two": torch.tensor([[1, 0, 0, 1]]).bool()[..., None]}
        >>> active_rate(masks, [Link("one", "two")])
        0.5
    """
    active = active_channels(masks, links)
    return torch.cat(list(active.values())).double().mean().item() if active else float("nan")


def _in_order(links: Sequence[Link]) -> list[Link]:
    """The links along their chains, producers first."""
    before = {link.consumer: [link.producer] for link in links}
    producers = {link.producer for link in links}
    if not len(before) == len(producers) == len(links):
        raise ConfigurationError(f"links={links!r} branch: accepted are links with each producer and consumer once.")
    try:
        position = {name: index for index, name in enumerate(TopologicalSorter(before).static_order())}
    except ValueError as error:
        raise ConfigurationError(f"links={links!r} form a circle: accepted are chains.") from error
    return sorted(links, key=lambda link: position[link.producer])


def _active(masks: Mapping[str, Tensor], link: Link) -> Tensor:
    """Bool [O] of the channels between two layers: those with links on both sides."""
    in_use_GC = _by_group(masks, link).any(3).any(1)
    active_O: Tensor = masks[link.producer].flatten(1).any(1) & in_use_GC.reshape(-1, link.spread).any(1)
    return active_O


def _by_group(masks: Mapping[str, Tensor], link: Link) -> Tensor:
    """The mask of the consumer as [G, O, C, K], once producer and consumer are known to fit."""
    for name in link[:2]:
        if name not in masks or masks[name].dtype != torch.bool or masks[name].ndim != 3:
            raise ConfigurationError(f"layer {name}: accepted is a mask of type bool and shape [O, C, K].")
    producer, consumer = (masks[name] for name in link[:2])
    inputs = len(producer) * link.spread
    groups = inputs // max(1, consumer.shape[1])
    if groups * consumer.shape[1] != inputs or groups < 1 or len(consumer) % groups:
        raise ConfigurationError(
            f"layer {link.consumer}: a mask of shape {list(consumer.shape)} cannot take the {len(producer)} x "
            f"{link.spread} outputs of {link.producer}; accepted is [O, outputs / groups, K] with O divided by groups."
        )
    return consumer.reshape(groups, len(consumer) // groups, *consumer.shape[1:])
