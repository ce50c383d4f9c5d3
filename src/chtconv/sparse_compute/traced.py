"""The graph of a model, by ``torch.fx``; refused where it computes with what it changes itself.

A compiled model is the same in every call, and forgets what ``forward`` leaves behind in the model. That is fine for
counters, caches and what is kept for others to see, and wrong where the next call would compute with it. So a model is
traced a second time, as the first call leaves it behind; what changes after more calls than that, nobody sees.
"""

import inspect
import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
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
# What gives the same in every call, from its own result as well.
_CONVERTING: Final = _SHARING | {"to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"}
_PLAIN: Final = (bool, int, float, str)
# Stands for a result of the first call in the second one: nothing can be computed with it.
_RESULT: Final = object()
# What names of tensors that are no attributes of the model begin with, in graphs.
_FRESH: Final = "_tensor_constant"
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
        writers: the nodes that write into a tensor.
        objects: what stands behind constants, which holds other numbers where it was written into.
        stale: names of constants that were really written into after they were read.
    """

    graph: fx.Graph
    required: frozenset[str]
    constants: Mapping[str, Any]
    changes: frozenset[str]
    left: Mapping[nn.Module, _Attributes]
    writers: frozenset[fx.Node]
    objects: Mapping[str, Any]
    stale: frozenset[str]

    @cached_property
    def live(self) -> list[fx.Node]:
        """The nodes that results may depend on: of those that write, all but what writes into the model."""
        beside = {node for node in self.writers if (_constant_behind(node) or _FRESH).startswith(_FRESH)}
        found: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node.op == "output" or node in found or node in beside:
                found.update((node, *node.all_input_nodes))
        return [node for node in self.graph.nodes if node in found]

    @cached_property
    def read(self) -> set[str]:
        """Names of constants that results may depend on, those that modules of torch read among them."""
        leaves = tuple(f"{node.target}." for node in self.live if node.op == "call_module")
        inside = {name for name in self.changes if name.startswith(leaves)}
        return inside | {str(node.target) for node in self.live if node.op == "get_attr"}


def traced(model: nn.Module) -> Traced:
    """Traces a model in the mode that it is in, with optional arguments at their defaults; it stays as it was.

    Raises:
        ConfigurationError: a model that cannot be traced, with the reason, or that computes with what it changes.
    """
    try:
        first = _trace(model, {})
    except Exception as error:
        reason = str(error).partition(". ")[0]
        raise ConfigurationError(
            f"{type(model).__name__} cannot be traced by torch.fx ({reason}), and so not compiled. Accepted are models "
            "whose forward does not branch or loop on values or sizes of tensors (a check of these can stand in a "
            "function with @torch.fx.wrap); of others, compile a part that is a module of its own."
        ) from error
    changed = ["a tensor that is no attribute" if name.startswith(_FRESH) else name for name in _changed(model, first)]
    if changed:
        raise ConfigurationError(
            f"{', '.join(changed)}: forward computes with it and changes it in eval mode, and a compiled model is the "
            "same in every call; accepted are models that do so in training mode only, or compute a new tensor."
        )
    return first


def _changed(model: nn.Module, first: Traced) -> list[str]:
    """Names of what a model computes with and changes, as far as two calls show it."""
    found = sorted(first.read & (first.changes | first.stale))
    fresh = {name for name in first.objects if name.startswith(_FRESH)}
    if found or not (first.left or fresh):
        return found
    names = {module: name for name, module in model.named_modules()}
    left = [_joined(names[module], key) for module, values in first.left.items() for key in values]
    try:
        # What it would do in the next call.
        second = _trace(model, first.left)
    except Exception:  # it uses what it left
        return left or sorted(fresh)
    for name in sorted(_written(first.writers) & fresh):
        own = first.objects[name]
        # Of a list or a module of Python, or seen by another one as well.
        kept = own is second.objects.get(name)
        shared = any(_share(own, each) for other, each in first.objects.items() if other != name)
        if kept or shared:
            found.append(name)
    return found or ([] if _are_same(first, second) else left or sorted(fresh))


def _share(one: Any, other: Any) -> bool:
    """Whether two tensors have memory in common."""
    try:
        return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())
    except (AttributeError, NotImplementedError, RuntimeError):  # of kinds without such memory
        return False


def writes(node: fx.Node) -> bool:
    """Whether what a node calls has the name of what changes a tensor in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    # Of an overload of an operator of torch, the name of that is behind a dot.
    name = name_of(node).partition(".")[0]
    if name in ("setitem", "__setitem__"):
        return True
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
        tracer = _Tracer()
        graph = tracer.trace(model, concrete_args=optional)
        names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        objects = {name: held[name] if name in held else operator.attrgetter(name)(model) for name in names}
        # Of what is written into, the numbers of now: they are set back.
        constants = {
            name: value.clone() if versions.get(id(value)) not in (None, value._version) else value
            for name, value in objects.items()
        }
        in_place = {name for name, module in model.named_modules() if getattr(module, "inplace", False)}
        writers = frozenset(
            node
            for node in graph.nodes
            if writes(node)
            or any(node.kwargs.get(key) not in (None, False) for key in ("inplace", "out"))
            or (node.op == "call_module" and node.target in in_place)
        )
        now = dict(_tensors(model, everything=True))
        replaced = {name for name, value in held.items() if _is_replaced(name, value, now.get(name))}
        clones: dict[int, Tensor] = {}
        return Traced(
            graph,
            frozenset(required),
            constants,
            frozenset(replaced | (_written(writers) & held.keys())),
            {module: some for module, each in before.items() if (some := dict(_left(module, each, versions, clones)))},
            writers,
            objects,
            frozenset(name for name, value in objects.items() if tracer.was_written_since(value)),
        )


def _is_replaced(name: str, value: Any, now: Any) -> bool:
    """Whether a result stands where a tensor was, other than that tensor itself in another form."""
    if now is value or isinstance(now, Tensor):
        return False
    return not isinstance(now, fx.Proxy) or _constant_from(now.node, _CONVERTING) != name


def _attributes(module: nn.Module) -> _Attributes:
    """Attributes and buffers."""
    return {**vars(module), **dict(module._buffers.items())}


def _tensors(model: nn.Module, everything: bool = False) -> Iterator[tuple[str, Any]]:
    """Parameters, buffers and attributes of modules that are tensors, or whatever they are, under all their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, value in (*module._parameters.items(), *_attributes(module).items()):
            if everything or isinstance(value, Tensor):
                yield _joined(prefix, key), value


def _left(
    module: nn.Module, before: _Attributes, versions: Mapping[int, int], clones: dict[int, Tensor]
) -> Iterator[tuple[str, Any]]:
    """Tensors, numbers and words of a module that are new or changed since, and a mark where there is a result now."""
    for key, value in _attributes(module).items():
        if key.startswith(_FRESH):
            continue  # of the tracer
        old = before.get(key)
        if isinstance(value, Tensor):
            if value is not old or (is_watched(value) and versions[id(value)] != value._version):
                yield key, clones.setdefault(id(value), value.detach().clone())
        elif isinstance(value, fx.Proxy):
            if not isinstance(old, Tensor):
                yield key, _RESULT
        elif type(value) in _PLAIN and (type(value) is not type(old) or value != old):
            yield key, value


def _written(writers: Collection[fx.Node]) -> set[str]:
    """Names of the constants that nodes write into, through whatever shares their memory."""
    return {name for name in map(_constant_behind, writers) if name is not None}


def _constant_behind(node: fx.Node) -> str | None:
    """The constant that a node writes into; None where it is none."""
    inner = node.kwargs.get("out", next(iter(node.args), None))
    return _constant_from(inner, _SHARING) if isinstance(inner, fx.Node) else None


def _constant_from(node: fx.Node, through: Collection[str]) -> str | None:
    """The constant that a result comes from by nothing else than these functions and methods."""
    inner: Any = node
    while isinstance(inner, fx.Node) and inner.op in ("call_function", "call_method") and name_of(inner) in through:
        inner = next(iter(inner.args), None)
    return str(inner.target) if isinstance(inner, fx.Node) and inner.op == "get_attr" else None


def _are_same(first: Traced, second: Traced) -> bool:
    """Whether two graphs compute the same."""
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


def _numbered(node: fx.Node, places: Mapping[fx.Node, int]) -> str:
    """The arguments of a node, with numbers instead of nodes, as text, in which what is not a number is one too."""
    return repr(
        mapped(
            (tuple(node.args), dict(node.kwargs)),
            lambda leaf: ("node", places.get(leaf)) if isinstance(leaf, fx.Node) else leaf,
        )
    )


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


class _Tracer(Tracer):
    """Traces down to the modules of torch, and notes which tensors are written into after they were read."""

    def __init__(self) -> None:
        super().__init__()
        self._versions: dict[int, tuple[Tensor, int]] = {}

    def create_arg(self, a: Any) -> Any:
        """What stands for an argument in the graph."""
        if is_watched(a):
            self._versions.setdefault(id(a), (a, a._version))
        return super().create_arg(a)

    def was_written_since(self, value: Any) -> bool:
        """Whether the numbers of a tensor are others now than where it was read first."""
        read, version = self._versions.get(id(value), (None, 0))
        return read is not None and read._version != version

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # An accelerated convolution is one.
        if isinstance(m, SparseForward):
            return True
        # Weights that are standardised, say, are computed in the latter alone.
        methods: Collection[Any] = [getattr(type(m), name, None) for name in ("forward", "_conv_forward")]
        own = all(each is None or each.__module__.startswith("torch.nn.") for each in methods)
        return own and not isinstance(m, nn.Sequential)
