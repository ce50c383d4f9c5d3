"""The graph of a model, by ``torch.fx``; refused where it computes with what it changes itself.

A compiled model is the same in every call, and forgets what ``forward`` leaves behind in the model. That is fine for
counters, caches and what is kept for others to see, and wrong where the next call would compute with it.
"""

import inspect
import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from torch import Tensor, fx, nn

from chtconv.errors import ConfigurationError
from chtconv.layers.tracing import Tracer, is_watched, unchanged
from chtconv.sparse_compute.layers import SparseForward
from chtconv.sparse_compute.program import mapped

IN_PLACE: Final[dict[Callable[..., Any], str]] = {
    getattr(operator, f"i{name}"): name for name in ("add", "sub", "mul", "truediv")
}
# What gives a tensor that shares memory with the first argument, as it is called in a graph; "getattr" gives ``data``.
_SHARING: Final = {
    *(
        "getattr",
        "getitem",
        "detach",
        "alias",
        "view",
        "view_as",
        "reshape",
        "flatten",
        "unflatten",
        "ravel",
        "permute",
    ),
    *(
        "transpose",
        "movedim",
        "t",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "narrow",
        "select",
        "unbind",
        "chunk",
    ),
    *("split", "contiguous"),
}
_PLAIN: Final = (bool, int, float, str)
# Attributes of a module by name.
_Attributes = dict[str, Any]


@dataclass(frozen=True)
class Traced:
    """What ``forward`` does.

    Attributes:
        graph: its nodes.
        required: the arguments without a default.
        constants: parameters, buffers and other tensors that it reads, by name.
        changes: names of those of the model that it writes into or replaces, as the graph shows it.
        left: attributes that it left behind in modules and that the graph does not show, with their values.
    """

    graph: fx.Graph
    required: frozenset[str]
    constants: Mapping[str, Any]
    changes: frozenset[str]
    left: Mapping[nn.Module, _Attributes]

    @cached_property
    def live(self) -> list[fx.Node]:
        """The nodes that results may depend on, among them all that write into something else than a constant."""
        found: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node.op == "output" or node in found or (writes(node) and _constant_behind(node) is None):
                found.update((node, *node.all_input_nodes))
        return [node for node in self.graph.nodes if node in found]


def traced(model: nn.Module) -> Traced:
    """Traces a model in the mode that it is in, with optional arguments at their defaults; it stays as it was.

    Raises:
        ConfigurationError: a model that cannot be traced, with the reason, or that computes with what it changes.
    """
    try:
        first = _trace(model, {})
        # What it would do in the next call.
        second = _trace(model, first.left) if first.left else first
    except Exception as error:
        reason = str(error).partition(". ")[0]
        raise ConfigurationError(
            f"{type(model).__name__} cannot be traced by torch.fx ({reason}), and so not compiled. Accepted are models "
            "whose forward does not branch or loop on values or sizes of tensors (a check of these can stand in a "
            "function with @torch.fx.wrap); of others, compile a part that is a module of its own."
        ) from error
    read = {str(node.target) for node in first.live if node.op == "get_attr"}
    changed = sorted(read & first.changes)
    if not changed and not _are_same(first, second):
        names = {module: name for name, module in model.named_modules()}
        changed = [_joined(names[module], key) for module, values in first.left.items() for key in values]
    if changed:
        raise ConfigurationError(
            f"{', '.join(changed)}: forward computes with it and changes it in eval mode, and a compiled model is the "
            "same in every call; accepted are models that do so in training mode only, or compute a new tensor."
        )
    return first


def writes(node: fx.Node) -> bool:
    """Whether what a node calls has the name of what changes a tensor in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    # Of an overload of an operator of torch, the name of that is behind a dot.
    name = name_of(node).partition(".")[0]
    # "and_" is called so lest it be the keyword.
    ends = name.endswith("_") and not name.endswith("__") and not hasattr(operator, name)
    return ends or node.target in IN_PLACE


def name_of(node: fx.Node) -> str:
    """Of what a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def _trace(model: nn.Module, left: Mapping[nn.Module, _Attributes]) -> Traced:
    """The graph, with attributes that an earlier call left behind."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    optional = {each.name: each.default for each in parameters if each.default is not each.empty}
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = {each.name for each in parameters if each.kind not in several} - optional.keys()
    with unchanged(model):
        for module, attributes in left.items():
            for key, value in attributes.items():
                (module._buffers if key in module._buffers else vars(module))[key] = value
        before = {module: _attributes(module) for module in model.modules()}
        versions = {
            id(value): value._version for each in before.values() for value in each.values() if is_watched(value)
        }
        held = dict(_tensors(model))
        graph = _Tracer().trace(model, concrete_args=optional)
        names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        # Of what is written into, the numbers of now: they are set back.
        values = {name: held[name] if name in held else operator.attrgetter(name)(model) for name in names}
        constants = {
            name: value.clone() if versions.get(id(value)) not in (None, value._version) else value
            for name, value in values.items()
        }
        now = dict(_tensors(model, everything=True))
        replaced = {
            name for name, value in held.items() if now.get(name) is not value and not isinstance(now.get(name), Tensor)
        }
        return Traced(
            graph,
            frozenset(required),
            constants,
            frozenset(replaced | (_written(graph) & held.keys())),
            {module: found for module, each in before.items() if (found := dict(_left(module, each, versions)))},
        )


def _attributes(module: nn.Module) -> _Attributes:
    """Attributes and buffers."""
    return {**vars(module), **dict(module._buffers.items())}


def _tensors(model: nn.Module, everything: bool = False) -> Iterator[tuple[str, Any]]:
    """Parameters, buffers and attributes of modules that are tensors, or whatever they are, under all their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, value in (*module._parameters.items(), *_attributes(module).items()):
            if everything or isinstance(value, Tensor):
                yield _joined(prefix, key), value


def _left(module: nn.Module, before: _Attributes, versions: Mapping[int, int]) -> Iterator[tuple[str, Any]]:
    """Tensors, numbers and words of a module that are new or changed since."""
    for key, value in _attributes(module).items():
        if key.startswith("_tensor_constant"):
            continue  # of the tracer
        old = before.get(key)
        if isinstance(value, Tensor):
            if value is not old or (is_watched(value) and versions[id(value)] != value._version):
                yield key, value.detach().clone()
        elif type(value) in _PLAIN and (type(value) is not type(old) or value != old):
            yield key, value


def _written(graph: fx.Graph) -> set[str]:
    """Names of constants that a graph writes into, through whatever shares their memory."""
    behind = (_constant_behind(node) for node in graph.nodes if writes(node))
    return {name for name in behind if name is not None}


def _constant_behind(node: fx.Node) -> str | None:
    """The constant that a node writes into; None where it is none."""
    inner: Any = next(iter(node.args), None)
    while isinstance(inner, fx.Node) and inner.op in ("call_function", "call_method") and name_of(inner) in _SHARING:
        inner = next(iter(inner.args), None)
    return str(inner.target) if isinstance(inner, fx.Node) and inner.op == "get_attr" else None


def _are_same(first: Traced, second: Traced) -> bool:
    """Whether two graphs compute the same."""
    if first is second:
        return True
    places = [{node: place for place, node in enumerate(each.live)} for each in (first, second)]
    for one, other in itertools.zip_longest(first.live, second.live):
        if one is None or other is None or one.op != other.op:
            return False
        if one.op == "get_attr":
            if not _equal(first.constants[str(one.target)], second.constants[str(other.target)]):
                return False
        elif one.target != other.target or _numbered(one, places[0]) != _numbered(other, places[1]):
            return False
    return True


def _numbered(node: fx.Node, places: Mapping[fx.Node, int]) -> Any:
    """The arguments of a node, with numbers instead of nodes."""
    return mapped(
        (tuple(node.args), dict(node.kwargs)),
        lambda leaf: ("node", places.get(leaf)) if isinstance(leaf, fx.Node) else leaf,
    )


def _equal(one: Any, other: Any) -> bool:
    if one is other or not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


class _Tracer(Tracer):
    """Traces down to the modules of torch."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # An accelerated convolution is one.
        if isinstance(m, SparseForward):
            return True
        # Weights that are standardised, say, are computed in the latter alone.
        methods: Collection[Any] = [getattr(type(m), name, None) for name in ("forward", "_conv_forward")]
        own = all(each is None or each.__module__.startswith("torch.nn.") for each in methods)
        return own and not isinstance(m, nn.Sequential)
