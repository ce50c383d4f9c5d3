"""Floating point operations: of a layer, of a model, of a step and of a whole training.

Conventions, those of Evci et al., Rigging the Lottery (ICML 2020, appendix on the calculation of FLOPs):

* A multiplication with its addition counts as 2. Convolutions (transposed ones too), linear layers, products of
  matrices and attention count, by the formulas of :mod:`torch.utils.flop_counter`. Biases, normalisation,
  activations, pooling and everything else elementwise do not, nor do fused recurrent kernels, bilinear layers and
  embeddings. Products with padding count like any other; a causal mask saves nothing.
* Every link of a layer is used equally often, so that a layer of density d does the share d of its dense FLOPs.
* The backward pass is two products as large as the forward pass: the gradient of the input and that of the weights;
  the first layer is no exception. With f_d dense and f_s sparse forward FLOPs, a step costs 3 f_d dense and 3 f_s
  sparse, or 2 f_s + f_d where a method wants the gradient of all weights, active or not: RigL every interval
  of ΔT steps, on average (3 f_s ΔT + 2 f_s + f_d) / (ΔT + 1); SNFS at every step.

This is the arithmetic that sparse kernels would have to do. The optimizer and the evolution itself are not in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, mm_flop

from chtconv.errors import ConfigurationError
from chtconv.flops.attribution import Attribution, left_as_it_was
from chtconv.layers.geometry import Geometry
from chtconv.layers.matrix import CONVOLUTIONS, TRANSPOSED
from chtconv.randomness import unwrapped

# Of compiled models: the layers that hold links instead of a weight.
_UNCOUNTED = ("SparseConvolution", "SparseLinear")


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs of one layer.

    Attributes:
        dense: with all links.
        sparse: with the active ones only.
    """

    dense: int
    sparse: float


@dataclass(frozen=True)
class Flops:
    """FLOPs of a model for the whole batch that it was given; see :mod:`chtconv.flops.counting` for what counts.

    Attributes:
        layers: forward FLOPs in the order of the first use, by the name of the parameter that an operation multiplies
            with (``"features.0.weight"``); where there is none, as in attention, by the name of the module that does
            it (``""`` for the model itself).
    """

    layers: dict[str, LayerFlops]

    @property
    def dense(self) -> int:
        """Forward FLOPs with all links."""
        return sum(layer.dense for layer in self.layers.values())

    @property
    def sparse(self) -> float:
        """Forward FLOPs with the active links only."""
        return sum(layer.sparse for layer in self.layers.values())

    @property
    def dense_step(self) -> int:
        """A training step with all links: three times the forward pass."""
        return 3 * self.dense

    @property
    def sparse_step(self) -> float:
        """A training step with the active links only: three times the forward pass."""
        return 3 * self.sparse

    @property
    def dense_gradient_step(self) -> float:
        """A training step with the active links only that still wants the gradient of all weights."""
        return 2 * self.sparse + self.dense


def count_flops(model: nn.Module, *inputs: Any, densities: Mapping[str, float] | None = None, **kwargs: Any) -> Flops:
    """FLOPs of a model, measured in one forward pass without gradients and in evaluation mode.

    The model is left as it was: training flags, statistics of batch norm, sizes that a topology has observed, and
    torch's random generators. A part that is used several times counts as often. A compiled model runs uncompiled.

    Args:
        model: any model, whose lazy layers have been initialised.
        inputs: what it is called with, a whole batch.
        densities: share of active links by qualified name of the parameter, such as ``"features.0.weight"``, with or
            without the prefixes of wrappers; parameters that are not named are dense.
        kwargs: keyword arguments of the call.

    Raises:
        ConfigurationError: a density outside [0, 1] or of no parameter of the model, a lazy layer, or sparse layers of
            a model that :func:`chtconv.compile_sparse` made, which hold links and no parameters.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
        >>> flops = count_flops(model, torch.zeros(1, 3, 4, 4), densities={"0.weight": 0.25})
        >>> flops.layers
        {'0.weight': LayerFlops(dense=6912, sparse=1728.0), '3.weight': LayerFlops(dense=2560, sparse=2560)}
        >>> flops.dense, flops.sparse, flops.dense_step, flops.sparse_step, flops.dense_gradient_step
        (9472, 4288.0, 28416, 12864.0, 18048.0)
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise ConfigurationError(f"layer {name} has no size yet; call the model once before its FLOPs are counted.")
    _check_dense(model)
    attribution = Attribution(model, parameters)
    share = {attribution.owner(parameters[name]): d for name, d in _checked(densities or {}, parameters).items()}
    with left_as_it_was(model), attribution.following(), FlopCounterMode(
        display=False, custom_mapping=attribution.formulas()
    ):  # fmt: skip
        # The shell of torch.compile warns of the counter's hooks.
        getattr(model, "_orig_mod", model)(*inputs, **kwargs)
    return Flops({name: LayerFlops(flops, flops * share.get(name, 1)) for name, flops in attribution.flops.items()})


def training_flops(
    forward: Mapping[str, float], steps: int, densities: Mapping[str, float], *, dense_gradient_steps: int = 0
) -> float:
    """FLOPs of a training so far: the sum over layers of f_d · (3 d · steps + (1 - d) · dense_gradient_steps).

    Exact where the density of a layer is always the same; else the steps with dense gradients are taken to be those
    of mean density.

    Args:
        forward: dense forward FLOPs of each layer, f_d, for the batch of a step.
        steps: number of training steps.
        densities: mean density d of a layer over all steps; layers that are not named are dense.
        dense_gradient_steps: how many of the steps wanted the gradient of all weights.

    Raises:
        ConfigurationError: a density outside [0, 1] or of no layer, or a number of steps that cannot be.

    Example:
        RigL with an interval of 99 steps, and a dense training:

        >>> forward = {"features.0.weight": 1000, "classifier.weight": 100}
        >>> training_flops(forward, 100, {"features.0.weight": 0.25}, dense_gradient_steps=1)
        105750.0
        >>> training_flops(forward, 100, {})
        330000
    """
    if not 0 <= dense_gradient_steps <= steps:
        raise ConfigurationError(
            f"steps={steps!r}, dense_gradient_steps={dense_gradient_steps!r}: accepted are numbers of steps from 0, "
            "the second no larger than the first."
        )
    share = _checked(densities, forward)
    return sum(
        dense * (3 * share.get(name, 1) * steps + (1 - share.get(name, 1)) * dense_gradient_steps)
        for name, dense in forward.items()
    )


def layer_flops(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Dense forward FLOPs of one layer, without running it.

    Args:
        module: a Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear.
        input_shape: [batch, channels, *size] of its input; [..., features] for a linear layer.

    Raises:
        ConfigurationError: another module, a shape that it does not accept, or one that leaves no output.

    Example:
        >>> layer_flops(nn.Conv2d(3, 64, 3, padding=1), (1, 3, 32, 32))  # 2 · 32² · 3² · 3 · 64
        3538944
        >>> layer_flops(nn.Linear(512, 10), (128, 512))
        1310720
    """
    shape = [int(size) for size in input_shape]
    if isinstance(module, nn.Linear):
        _check_shape(module, shape, shape[-1:] == [module.in_features], f"[..., {module.in_features}]")
        return int(mm_flop([prod(shape[:-1]), module.in_features], [module.in_features, module.out_features]))
    if not isinstance(module, CONVOLUTIONS):
        raise ConfigurationError(
            f"{type(module).__name__}: accepted are Conv1d, Conv2d, Conv3d, their transposed forms, and Linear."
        )
    channels, transposed = module.in_channels, isinstance(module, TRANSPOSED)
    fits = len(shape) == 2 + len(module.kernel_size) and shape[1] == channels
    _check_shape(module, shape, fits, f"[batch, {channels}] and {len(module.kernel_size)} spatial sizes")
    geometry = Geometry.of(
        module.kernel_size,
        shape[2:],
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        transposed=transposed,
        output_padding=module.output_padding,
    )
    output_shape = [shape[0], module.out_channels, *geometry.output_size]
    return conv_flop_count(shape, list(module.weight.shape), output_shape, transposed)


def _check_dense(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = type(module)
        # By name: that package lies above this one.
        if kind.__module__.startswith("chtconv.sparse_compute.") and kind.__name__ in _UNCOUNTED:
            raise ConfigurationError(
                f"layer {name}: it is a {kind.__name__} of a compiled model, whose products nothing counts; accepted "
                "is the model that compile_sparse was given, with the densities of its layers."
            )


def _check_shape(module: nn.Module, shape: list[int], fits: bool, accepted: str) -> None:
    if not fits or min(shape) < 1:
        raise ConfigurationError(f"input_shape={shape}: {module} accepts {accepted}, each at least 1.")


def _checked(densities: Mapping[str, float], layers: Mapping[str, object]) -> dict[str, float]:
    """Densities by the names of these layers, which may have prefixes of wrappers."""
    names = {short: name for name in layers for short in reversed(unwrapped(name))} | {name: name for name in layers}
    for name, density in densities.items():
        if name not in names:
            raise ConfigurationError(f"densities name the layer {name!r}; accepted are {', '.join(layers)}.")
        if not 0 <= density <= 1:
            raise ConfigurationError(f"layer {name}: density {density!r}; accepted are numbers from 0 to 1.")
    return {names[name]: density for name, density in densities.items()}
