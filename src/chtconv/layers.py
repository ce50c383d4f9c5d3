"""Which layers of a model are sparse, and what the topology has to know of each."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chtconv.enforcement import apply_bits, bits_of, matching
from chtconv.errors import ConfigurationError
from chtconv.geometry import Geometry
from chtconv.scores.api import by_group, disabled_scores

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_layers(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, Convolution]:
    """The convolutions of a model by name, all of them or those whose name matches a pattern.

    Args:
        model: any model.
        patterns: names of modules, with wildcards as in file names; None for every convolution.

    Raises:
        ConfigurationError: a pattern that matches no convolution, or a model without any.
    """
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}
    if not convolutions:
        raise ConfigurationError(f"{type(model).__name__} has no convolution; accepted are Conv1d, Conv2d and Conv3d.")
    if patterns is None:
        return convolutions
    if not patterns:
        raise ConfigurationError(f"layers={patterns!r} chooses no layer; accepted is a list of names, or None for all.")
    if isinstance(patterns, str):
        raise ConfigurationError(
            f"layers={patterns!r}: accepted is a list of names or patterns, such as [{patterns!r}]."
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in convolutions):
            raise ConfigurationError(
                f"layers={pattern!r} matches no convolution; those of the model are {', '.join(convolutions)}."
            )
    return {
        name: module for name, module in convolutions.items() if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def weight_of(module: Convolution, name: str) -> nn.Parameter:
    """The weight of a layer as a plain parameter that is trained.

    Raises:
        ConfigurationError: a weight that is computed from others (parametrisations, weight norm), frozen, or of a
            type without gradients.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        raise ConfigurationError(
            f"layer {name}: its weight is computed from other parameters (a parametrisation or weight norm); "
            "accepted are plain weights. Remove the parametrisation, or leave the layer out with layers=[...]."
        )
    if not weight.requires_grad:
        raise ConfigurationError(f"layer {name}: its weight is frozen; unfreeze it, or leave the layer out.")
    return weight


class SparseLayer:
    """A layer with a mask: its parameter, the mask in force, and the size of input that was last seen.

    Attributes:
        name: qualified name of the weight, such as ``"features.0.weight"``.
        module: the convolution.
        seed_name: the name that its random draws depend on, without prefixes of wrappers.
        links: number of active links of each kernel.
        bits: the mask as integers of the weight's width and layout, see :mod:`chtconv.enforcement`.
        explored: bool of the weight's shape, where a link was ever active.
        handles: the hooks that this layer registered.
    """

    def __init__(self, name: str, seed_name: str, module: Convolution, links: int, mask_OI: Tensor) -> None:
        self.name = name
        self.seed_name = seed_name
        self.module = module
        self.links = links
        mask = mask_OI.view(self.weight.shape)
        self.bits = bits_of(mask, self.weight)
        self.explored = mask.clone()
        self.handles: list[RemovableHandle] = []

    def mask_gradient(self, *_: object) -> None:
        """Sets the gradient to zero off the mask, where there is one."""
        gradient = self.weight.grad
        if gradient is not None:
            self.bits = matching(self.bits, gradient)
            apply_bits(gradient, self.bits)

    @property
    def weight(self) -> nn.Parameter:
        """The weight: an ordinary dense parameter that is zero off the mask."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def mask(self) -> Tensor:
        """Bool mask of the weight's shape; True where a link is active."""
        return self.bits != 0

    @property
    def input_size(self) -> tuple[int, ...] | None:
        """Spatial size of the last input, None before the first forward pass."""
        return getattr(self.module, "_chtconv_input_size", None)

    def observe_input_size(self) -> None:
        """Registers the hook that notes the size of each input."""
        self.handles.append(self.module.register_forward_pre_hook(_note_input_size, with_kwargs=True))

    def geometry(self) -> Geometry:
        """The geometry of the layer for the last input that it saw.

        Raises:
            ConfigurationError: the layer has not been called yet.
        """
        if self.input_size is None:
            raise ConfigurationError(
                f"layer {self.name}: its input size is unknown, because the model has not been called since sparsify; "
                "run a forward pass before the first evolution, or leave the layer out if it is never called."
            )
        m = self.module
        return Geometry.of(
            m.kernel_size,
            self.input_size,
            stride=m.stride,
            padding=m.padding,
            dilation=m.dilation,
            padding_mode=m.padding_mode,
        )

    def link_scores(self, mask_OI: Tensor, predictor: str, graph: str, exact: bool) -> Tensor:
        """Link scores of a mask of this layer, float32 of its shape [O, I]; 0 at active positions."""
        geometry = self.geometry()
        mask_GOCK = by_group(mask_OI.view(self.weight.shape), self.module.groups, geometry)
        return disabled_scores(mask_GOCK, geometry, predictor, graph, exact=exact).reshape(mask_OI.shape)


def _note_input_size(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    images = args[0] if args else kwargs["input"]
    axes = len(module.kernel_size)  # type: ignore[arg-type]
    # The last axes, because the batch may be left out. A module attribute: writing into a dict would make
    # torch.compile recompile.
    module._chtconv_input_size = images.shape[-axes:]  # type: ignore[assignment]
