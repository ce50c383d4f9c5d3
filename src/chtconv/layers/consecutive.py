"""Which layers of a model feed each other and nothing else, read from the graph that ``torch.fx`` traces."""

import inspect
import operator
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from chtconv.errors import ConfigurationError
from chtconv.layers.chains import Link
from chtconv.layers.matrix import LAYERS, Layer
from chtconv.layers.tracing import Tracer, unchanged, unwrapped_model


def consecutive_layers(model: nn.Module, names: Collection[str]) -> list[Link]:
    """Which of the named layers feed each other and nothing else, in the order of the forward pass.

    Read from the graph that ``torch.fx`` traces in the mode (training or not) that the model is in, with optional
    arguments at their defaults. The model is not run, hooks are not called, and attributes that ``forward`` sets are
    set back. Between two consecutive layers are only operations that keep channels apart: batch and instance norm,
    activations, pooling, padding, dropout, upsampling, means over space, arithmetic with a number, and a flatten of
    all but the batch. Layers are no neighbours if anything else is between them, such as a residual sum, a
    concatenation or a softmax; if an output is used twice or returned; or if one is called twice or shares parameters.
    Tensors are taken to have a batch axis, and those at linear layers to be [batch, features].

    Args:
        model: any model that ``torch.fx`` can trace; wrappers for compilation and data parallelism are looked through.
        names: of convolutions, transposed convolutions and linear layers, as in ``model.named_modules()``.

    Raises:
        ConfigurationError: a name that is no such layer, or a model that cannot be traced, with the reason.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 10))
        >>> consecutive_layers(model, ["0", "3"])
        [Link(producer='0', consumer='3', spread=9)]
    """
    model, prefix = unwrapped_model(model)
    modules = dict(model.named_modules())
    layers: dict[str, Layer] = {}
    for name in names:
        layer = modules.get(name.removeprefix(prefix))
        if not isinstance(layer, LAYERS):
            raise ConfigurationError(
                f"layer {name}: accepted are names of convolutions and linear layers of the model."
            )
        layers[name.removeprefix(prefix)] = layer
    graph = _traced(model, layers)
    uses = Counter(map(_module_used, graph.nodes))
    owners = Counter(id(parameter) for module in modules.values() for parameter in module.parameters(recurse=False))
    alone = {
        name: layer
        for name, layer in layers.items()
        if uses[name] == 1 and all(owners[id(parameter)] == 1 for parameter in layer.parameters())
    }
    found = (_link_from(node, modules, alone) for node in graph.nodes if _called(node) in alone)
    return [Link(prefix + link.producer, prefix + link.consumer, link.spread) for link in found if link]


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_POINTWISE_MODULES = _names(
    "Identity ReLU ReLU6 LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU Mish Sigmoid Tanh Hardtanh Hardswish",
    "Hardsigmoid Hardshrink Softshrink Tanhshrink Softplus Softsign LogSigmoid Threshold Dropout Dropout1d Dropout2d",
    "Dropout3d AlphaDropout FeatureAlphaDropout BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm Upsample",
    "UpsamplingNearest2d UpsamplingBilinear2d",
)
_POINTWISE_FUNCTIONS = _names(
    "relu relu6 leaky_relu rrelu elu selu celu gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid hardshrink",
    "softshrink tanhshrink softplus softsign logsigmoid threshold dropout dropout1d dropout2d dropout3d alpha_dropout",
    "feature_alpha_dropout interpolate add sub mul div truediv iadd isub imul itruediv pow square sqrt exp log abs neg",
    "clamp clip contiguous clone float half double bfloat16 to",
)
# With their number of spatial axes: on tensors of fewer axes, they would take the batch for the channels.
_SPATIAL = {
    f"{name}{axes}d": axes
    for name in _names(
        "MaxPool AvgPool LPPool FractionalMaxPool AdaptiveMaxPool AdaptiveAvgPool InstanceNorm ConstantPad ZeroPad",
        "ReflectionPad ReplicationPad CircularPad max_pool avg_pool lp_pool adaptive_max_pool adaptive_avg_pool",
    )
    for axes in (1, 2, 3)
}
_REDUCTIONS = _names("mean sum amax amin")
_METADATA = _names("size dim shape ndim dtype device")
_KIND_OF_FUNCTION: dict[Any, str] = {
    getattr(space, spelling): name
    for name in (*_POINTWISE_FUNCTIONS, *_SPATIAL, *_REDUCTIONS, "flatten", "reshape")
    for spelling in (name, f"{name}_")
    for space in (functional, torch, operator)
    if hasattr(space, spelling)
}


def _link_from(node: fx.Node, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer]) -> Link | None:
    """The link to the layer that the output of a layer ends in, if nothing mixes its channels before."""
    producer = _called(node)
    _, outputs, first = _channels(layers[producer])
    axes: int | None = first
    while axes is not None:
        users = [user for user in node.users if not _is_metadata(user)]
        if len(users) != 1 or [each for each in users[0].all_input_nodes if not _is_metadata(each)] != [node]:
            return None
        node = users[0]
        if _called(node) in layers:
            inputs, _, expected = _channels(layers[_called(node)])
            spread = inputs // outputs
            # A flatten of what a linear layer puts out is no spread of its outputs.
            fits = axes == expected and spread * outputs == inputs > 0 and (first > 0 or spread == 1)
            return Link(producer, _called(node), spread) if fits else None
        axes = _axes_after(node, modules, axes)
    return None


def _axes_after(node: fx.Node, modules: Mapping[str, nn.Module], axes: int) -> int | None:
    """Spatial axes behind the channels after an operation on ``axes`` of them; None if it mixes channels."""
    module = modules.get(_called(node))
    kind = _kind(node, module)
    if kind in (_POINTWISE_FUNCTIONS if module is None else _POINTWISE_MODULES) or axes == _SPATIAL.get(kind):
        return axes
    if isinstance(module, nn.GroupNorm):
        return axes if module.num_groups == module.num_channels else None
    if isinstance(module, nn.Flatten):
        return _flattened(axes, module.start_dim, module.end_dim)
    if module is not None:
        return None
    if kind == "flatten":
        return _flattened(axes, *_arguments(node, start_dim=0, end_dim=-1))
    if kind in ("view", "reshape"):
        return 0 if _keeps_batch_only(node) else None
    if kind in _REDUCTIONS:
        return _reduced(axes, *_arguments(node, dim=None, keepdim=False))
    return None


def _flattened(axes: int, start: Any, end: Any) -> int | None:
    return 0 if start in (1, -1 - axes) and end in (-1, 1 + axes) else None


def _reduced(axes: int, dims: Any, keep: Any) -> int | None:
    reduced = [dims] if isinstance(dims, int) else list(dims or ())
    over_space = reduced and all(isinstance(dim, int) and dim % (axes + 2) >= 2 for dim in reduced)
    return (axes if keep else axes - len(reduced)) if over_space else None


def _keeps_batch_only(node: fx.Node) -> bool:
    """Whether a view is that of ``x.view(x.size(0), -1)`` or ``x.reshape(x.shape[0], 512)``."""
    x, *shape = node.args
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = list(shape[0])
    if len(shape) != 2 or not isinstance(shape[0], fx.Node):
        return False
    batch = shape[0]
    if batch.target is operator.getitem and batch.args[1] == 0:
        (batch,) = batch.all_input_nodes
        return batch.args in ((x,), (x, "shape")) and _is_metadata(batch)
    return batch.target == "size" and batch.args == (x, 0)


def _arguments(node: fx.Node, **defaults: Any) -> list[Any]:
    """The arguments of a call behind its tensor, by position or name."""
    given = dict(zip(defaults, node.args[1:], strict=False)) | node.kwargs
    return [given.get(name, default) for name, default in defaults.items()]


def _kind(node: fx.Node, module: nn.Module | None) -> str:
    """What torch calls the operation: a class of module, or a function whether in place, as a method or not."""
    if module is not None:
        return next(each.__name__ for each in type(module).__mro__ if each.__module__.startswith("torch.nn."))
    if node.op == "call_method":
        return str(node.target).removesuffix("_")
    return _KIND_OF_FUNCTION.get(node.target, "") if node.op == "call_function" else node.op


def _channels(layer: Layer) -> tuple[int, int, int]:
    """Inputs, outputs and spatial axes of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, 0
    return layer.in_channels, layer.out_channels, len(layer.kernel_size)


def _called(node: fx.Node) -> str:
    """The name of the module that a node calls; else a name that no module has."""
    return str(node.target) if node.op == "call_module" else "no module"


def _module_used(node: fx.Node) -> str:
    """The name of the module that a node calls, or takes a parameter of."""
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else _called(node)


def _is_metadata(node: fx.Node) -> bool:
    """Whether a node knows of a tensor what does not depend on its values, such as ``x.shape[0]``."""
    if node.target is operator.getitem:
        return _is_metadata(node.all_input_nodes[0])
    return (node.target is getattr and node.args[1] in _METADATA) or (
        node.op == "call_method" and node.target in _METADATA
    )


class _Tracer(Tracer):
    """Traces down to the modules of torch and the named layers."""

    def __init__(self, layers: Collection[str]) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).forward.__module__.startswith("torch.nn.") and not isinstance(m, nn.Sequential)
        return own or module_qualified_name in self.layers


def _traced(model: nn.Module, layers: Collection[str]) -> fx.Graph:
    """The graph of a model.

    Raises:
        ConfigurationError: naming the model and why it cannot be traced.
    """
    try:
        parameters = inspect.signature(type(model).forward).parameters.values()
        optional = {each.name: each.default for each in parameters if each.default is not each.empty}
        # A forward may draw while it is traced, as for stochastic depth: to look at a model changes no training.
        with unchanged(model), torch.random.fork_rng(devices=[]):
            return _Tracer(layers).trace(model, concrete_args=optional)
    except Exception as error:
        reason = str(error).partition(". ")[0]
        raise ConfigurationError(
            f"prune_dead: {type(model).__name__} cannot be traced by torch.fx, so that its consecutive layers are "
            f"unknown ({reason}). Accepted are models whose forward does not branch or loop on values or sizes of "
            "tensors (a check of these can stand in a function with @torch.fx.wrap); for others, leave prune_dead off."
        ) from error
