"""Weights of which every rank holds a shard, as FSDP2 keeps them: the local part, the whole tensor, and back.

Everything here passes plain tensors through, so that the rest of the package asks no questions.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from chtconv.enforcement.optimizer_state import group_of
from chtconv.errors import ConfigurationError


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a ``DTensor``; asked without importing what makes them."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds, sharing its memory; may be empty. Outside autograd where it is sharded."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks: call it on each of them."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return gathered


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which ``part`` is this rank's, cut as ``like`` is: call it on all ranks."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    cut = DTensor.from_local(
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole(cut)


def local_state(optimizer: Optimizer, weight: Tensor) -> tuple[Optimizer, Tensor]:
    """Optimizer and weight as they are; of a sharded weight, the local part and what is remembered of it.

    These share memory with what they are taken from. The optimizer then has ``state`` and ``param_groups``, nothing
    else.
    """
    if not is_sharded(weight):
        return optimizer, weight
    part, state = local(weight), optimizer.state.get(weight, {})
    group = group_of(optimizer, weight) or {}
    view = SimpleNamespace(
        state={part: {key: local(value) if isinstance(value, Tensor) else value for key, value in state.items()}},
        param_groups=[group | {"params": [part]}],
    )
    return cast(Optimizer, view), part


def local_part(values: Tensor, like: Tensor) -> Tensor:
    """The part of this rank of values that every rank holds whole, cut as ``like`` is."""
    if not is_sharded(like):
        return values
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    for axis, placement in enumerate(placements):
        if placement.is_shard():
            parts = values.chunk(mesh.size(axis), placement.dim)
            index = mesh.get_local_rank(axis)
            values = parts[index] if index < len(parts) else values.narrow(placement.dim, 0, 0)
    return values


def check_sharding(
    model: nn.Module, modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer], ranks: int
) -> None:
    """Refuses layers whose weights are cut in a way that masks cannot follow.

    Args:
        model: as given to :func:`chtconv.sparsify`.
        modules: its layers to make sparse, by name.
        optimizers: that train them.
        ranks: number of ranks that hold the model.

    Raises:
        ConfigurationError: naming the layer and the reason.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ConfigurationError(
            "FullyShardedDataParallel keeps weights in flat pieces that cross layers; accepted is its successor, "
            "torch.distributed.fsdp.fully_shard."
        )
    for name, module in modules.items():
        weight: Any = module._parameters["weight"]
        if not is_sharded(weight):
            continue
        if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
            raise ConfigurationError(
                f"layer {name}: its weight is sharded, and LBFGS remembers all weights in long vectors that masks of "
                "shards do not fit; accepted are optimizers that remember weight by weight, such as Adam."
            )
        mesh = weight.device_mesh
        cuts = [placement for placement in weight.placements if not placement.is_replicate()]
        if not _fully_sharded(model, module):
            reason = "it is a DTensor that fully_shard did not make, as in tensor parallelism; give the whole model"
        elif len(cuts) > 1 or any(type(cut).__name__ != "Shard" for cut in cuts):
            reason = f"it is cut as {tuple(weight.placements)}, along more than one axis of ranks"
        elif mesh.size() != ranks:
            reason = f"it lies on {mesh.size()} ranks, and {ranks} hold the model; give the group with distributed="
        elif weight.device.type != mesh.device_type:
            reason = f"it lies on {weight.device.type} and its ranks talk on {mesh.device_type} (CPU offload)"
        else:
            continue
        raise ConfigurationError(
            f"layer {name}: its weight cannot have a mask, because {reason}. Accepted are weights that fully_shard "
            "keeps in one piece a rank, on all ranks. Or leave the layer out with layers=[...]."
        )


def _fully_sharded(model: nn.Module, layer: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(
        isinstance(module, FSDPModule) and any(each is layer for each in module.modules()) for module in model.modules()
    )
