"""Which layers of a model can be sparse, and how they are chosen."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.parameter import UninitializedParameter

from chtconv.errors import ConfigurationError
from chtconv.layers.matrix import CONVOLUTIONS, LAYERS, Layer

# What chooses layers: names with wildcards, types of modules, or a predicate of name and module.
Choice: TypeAlias = Sequence[str | type[nn.Module]] | Callable[[str, nn.Module], bool]


def find_layers(model: nn.Module, choice: Choice | None) -> dict[str, Layer]:
    """The layers of a model to make sparse, by name.

    Args:
        model: any model.
        choice: names of modules with wildcards as in file names, types of modules, or a function of name and module,
            which is asked about linear layers, too; None for every convolution. Whatever is chosen must be a
            convolution (1 to 3 axes, transposed or not) or a linear layer.

    Raises:
        ConfigurationError: a pattern or type that matches no layer, or a model without any.
    """
    layers: dict[str, Layer] = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    if choice is None:
        convolutions: dict[str, Layer] = {
            name: module for name, module in layers.items() if isinstance(module, CONVOLUTIONS)
        }
        if not convolutions:
            raise ConfigurationError(
                f"{type(model).__name__} has no convolution; for its linear layers give layers=[torch.nn.Linear]."
            )
        return convolutions
    if isinstance(choice, str | type):
        raise ConfigurationError(f"layers={choice!r}: accepted is a list, such as [{choice!r}].")
    if callable(choice):
        chosen = {name: module for name, module in layers.items() if choice(name, module)}
        if not chosen:
            raise ConfigurationError(f"layers={choice!r} chooses none of {', '.join(layers)}.")
        return chosen
    if not choice:
        raise ConfigurationError(f"layers={choice!r} chooses no layer; accepted is a list of names, or None for all.")
    for each in choice:
        if not isinstance(each, str | type):
            raise ConfigurationError(
                f"layers=[..., {each!r}, ...]: accepted are names with wildcards and types of modules."
            )
        if not any(_matches(each, name, module) for name, module in layers.items()):
            raise ConfigurationError(f"layers={each!r} matches no layer; those of the model are {', '.join(layers)}.")
    return {name: module for name, module in layers.items() if any(_matches(each, name, module) for each in choice)}


def _matches(each: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, each) if isinstance(each, str) else isinstance(module, each)


def weight_of(module: Layer, name: str) -> nn.Parameter:
    """The weight of a layer as a plain parameter that is trained.

    Raises:
        ConfigurationError: a weight that is computed from others (parametrisations, weight norm), frozen, not there
            yet, without values, or of a type without gradients.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        raise ConfigurationError(
            f"layer {name}: its weight is computed from other parameters (a parametrisation or weight norm); "
            "accepted are plain weights. Remove the parametrisation, or leave the layer out with layers=[...]."
        )
    if isinstance(weight, UninitializedParameter):
        raise ConfigurationError(
            f"layer {name}: its weight has no shape yet; run a forward pass before the optimizer is made and sparsify "
            "is called."
        )
    if weight.is_meta:
        raise ConfigurationError(
            f"layer {name}: its weight is on the meta device and has no values; accepted are weights that have: call "
            "model.to_empty(device=...) and initialise them before the optimizer is made."
        )
    if not weight.is_floating_point():
        raise ConfigurationError(
            f"layer {name}: its weight is {weight.dtype}; accepted are real floating point types. Leave the layer out."
        )
    if not weight.requires_grad:
        raise ConfigurationError(f"layer {name}: its weight is frozen; unfreeze it, or leave the layer out.")
    return weight
