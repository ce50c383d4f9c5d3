"""What is loaded: whether it is the state of this topology, and whether weights and optimizer state fit its masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from chtconv.enforcement import optimizer_state
from chtconv.enforcement.bits import is_zero_off_mask, matching
from chtconv.enforcement.sharding import is_sharded, local, local_state
from chtconv.enforcement.sparse_layer import SparseLayer
from chtconv.errors import ConfigurationError
from chtconv.randomness import canonical_names

# Some entries may have become 0 since, in a type of less range.
_TOLERATED = 0.99
# What the states of a topology and of a layer must hold.
_STATE = {"step_count", "evolutions", "masks", "layers", "records"}
_LAYER = {"links", "explored", "newest", "stopped", "link_steps", "dense_steps", "momentum"}


@dataclass(frozen=True)
class Checked:
    """The state of a topology; masks, layers and counts by the :attr:`SparseLayer.seed_name` of their layers.

    Attributes:
        step_count: optimizer steps.
        evolutions: evolutions.
        masks: bool, of the shapes of the weights.
        layers: what :meth:`SparseLayer.state_dict` returned.
        counts: what :func:`count_set` said; without layers that nobody counted.
        records: rows of the record, under the names that the layers have here.
    """

    step_count: int
    evolutions: int
    masks: Mapping[str, Tensor]
    layers: Mapping[str, dict[str, Any]]
    counts: dict[str, dict[str, int]]
    records: list[dict[str, Any]]


def check_state(state: Any, layers: Sequence[SparseLayer]) -> Checked:
    """A state, as far as it is that of these layers, whatever wrappers of the model have put before their names.

    Raises:
        ConfigurationError: something else, masks of other layers, shapes or numbers of links, or a part that is
            missing.
    """
    parts = isinstance(state, dict) and state.keys() >= _STATE
    if not parts or not all(_is_table(state[part], kind) for part, kind in (("masks", Tensor), ("layers", dict))):
        raise ConfigurationError(
            f"state={type(state).__name__}: accepted is what topology.state_dict() returned, with {sorted(_STATE)}."
        )
    names = canonical_names(state["masks"])
    masks, of_layers = (
        {names.get(key, key): value for key, value in state[part].items()} for part in ("masks", "layers")
    )
    by_name = {layer.seed_name: layer for layer in layers}
    if set(masks) != set(by_name):
        raise ConfigurationError(f"the state holds masks of {sorted(masks)}; the sparse layers are {sorted(by_name)}.")
    for name, layer in by_name.items():
        _check_layer(layer, masks[name], of_layers.get(name, {}))
    own = {name: by_name[short].name for name, short in names.items()}
    return Checked(
        int(state["step_count"]),
        int(state["evolutions"]),
        masks,
        of_layers,
        {names[key]: dict(value) for key, value in state.get("set", {}).items()},
        [row | {"layer": own.get(row["layer"], row["layer"])} for row in state["records"]],
    )


def _is_table(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(each, kind) for each in value.values())


def _check_layer(layer: SparseLayer, mask: Tensor, state: Mapping[str, Any]) -> None:
    if missing := sorted(_LAYER - state.keys()):
        raise ConfigurationError(
            f"layer {layer.name}: the state to load lacks {', '.join(missing)}; accepted is what "
            "topology.state_dict() returned."
        )
    _check_mask(layer, mask, state["links"])
    shape = layer.weight.shape
    for part, accepted in (("explored", shape), ("newest", layer.newest.shape), ("momentum", shape)):
        value = state[part]
        if part == "momentum" and value is None:
            continue
        found = getattr(value, "shape", None)
        if found != accepted:
            given = type(value).__name__ if found is None else f"of shape {list(found)}"
            raise ConfigurationError(
                f"layer {layer.name}: {part} of the state to load is {given}; accepted is a tensor of {list(accepted)}."
            )


def _check_mask(layer: SparseLayer, mask: Tensor, links: int) -> None:
    if mask.shape != layer.weight.shape or mask.dtype != torch.bool:
        raise ConfigurationError(
            f"layer {layer.name}: the mask to load is {mask.dtype} of shape {list(mask.shape)}; "
            f"accepted is torch.bool of shape {list(layer.weight.shape)}."
        )
    kernel = layer.settings.allocation == "kernel"
    found = layer.matrix(mask).sum(1) if kernel else mask.sum().view(1)
    low, high = sorted(layer.links_at(density) for density in layer.densities)
    if layer.settings.method.redistribute or layer.settings.allocation == "model":
        low, high = 1, mask.numel()
    if not bool((found == links).all()) or not low <= links <= high:
        raise ConfigurationError(
            f"layer {layer.name}: the mask to load has {int(found.min())} to {int(found.max())} links a "
            f"{'kernel' if kernel else 'layer'}; accepted are {low}{f' to {high}' if high > low else ''}, "
            "as sparsify was told."
        )


def check_fits(layers: Sequence[SparseLayer], topology_loaded: bool) -> None:
    """Refuses weights that are not zero off the masks, or that no hook masks.

    Args:
        layers: of the model.
        topology_loaded: whether the masks were loaded, so that it is the model that was not.

    Raises:
        ConfigurationError: naming the layer and what to load.
    """
    for layer in layers:
        if layer.hooked is not None and layer.weight is not layer.hooked and not is_sharded(layer.weight):
            raise ConfigurationError(
                f"layer {layer.name}: its weight is another parameter than before, as after "
                "load_state_dict(assign=True), and its optimizer has the old one; load without assign, or detach the "
                "topology, make the optimizer anew and call sparsify again with state=topology.state_dict()."
            )
        part = local(layer.weight.detach())
        layer.bits = matching(layer.bits, part)
        if not is_zero_off_mask(part, layer.bits):
            other = "model too (model" if topology_loaded else "their topology too (topology"
            raise ConfigurationError(
                f"layer {layer.name}: the weights that were loaded are not zero off the mask; load the state of "
                f"{other}.load_state_dict), or call topology.enforce() to cut them to this one."
            )


def count_set(layer: SparseLayer, optimizers: Sequence[Optimizer]) -> dict[str, int]:
    """How many weights are not 0, and how many entries of optimizer state that starts at 0."""
    count = {"weight": int(local(layer.weight.detach()).count_nonzero())}
    for optimizer in optimizers:
        count |= optimizer_state.count_set(*local_state(optimizer, layer.weight))
    return count


def check_uncut(
    layers: Sequence[SparseLayer], optimizers: Sequence[Optimizer], saved: Mapping[str, Mapping[str, int]]
) -> None:
    """Refuses weights and optimizer state that were loaded before ``sparsify``, and cut to masks that it drew.

    Args:
        layers: of the model; sharded ones are passed over, because the counts are of whole layers.
        optimizers: that train it.
        saved: what :func:`count_set` said of each layer when its topology was saved.

    Raises:
        ConfigurationError: naming the layer, what was cut and what to do.
    """
    for layer in layers:
        if layer.seed_name not in saved or is_sharded(layer.weight):
            continue
        before, found = saved[layer.seed_name], count_set(layer, optimizers)
        for name in before.keys() & found.keys():
            if found[name] < _TOLERATED * before[name]:
                raise ConfigurationError(
                    f"layer {layer.name}: of its {name}, {before[name]} entries were not 0 "
                    f"when the topology was saved, and {found[name]} are now, as when model or optimizer are loaded "
                    "before sparsify, which cuts them to masks of its own. Give sparsify the state of the topology "
                    "(state=...), or call it first and load all three states after it, in any order; or call "
                    "topology.enforce() to go on with what is there."
                )
