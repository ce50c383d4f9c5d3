"""From a model to a list of steps, by ``torch.fx``."""

import copy
import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from chtconv.errors import ConfigurationError
from chtconv.layers.tracing import unwrapped_model
from chtconv.sparse_compute.program import (
    CONVOLUTIONS,
    INPUT,
    OPAQUE,
    PARAMETERS,
    WEIGHTED,
    Step,
    accepts,
    mapped,
    steps_in,
)
from chtconv.sparse_compute.traced import IN_PLACE, Traced, name_of, traced, writes

_ALIASES: Final = {"view": "reshape", "truediv": "div", "true_divide": "div", "concat": "cat", "clip": "clamp"}
# Those whose result may share memory with their input.
_VIEWS: Final = {"reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "getitem", "contiguous"}
# Words that are their modules in lower case; then the others.
_SAME: Final = (
    *("ReLU", "ReLU6", "SELU", "Sigmoid", "Tanh", "SiLU", "Mish", "ELU", "CELU", "GELU", "Hardtanh", "Hardswish"),
    *("Hardsigmoid", "Softsign", "LogSigmoid", "Tanhshrink", "Softplus", "Softmax", "PReLU", "Flatten", "Linear"),
)
_MODE_OF_PADDING: Final[dict[type[nn.Module], str]] = {
    getattr(nn, f"{kind}Pad{n}d"): mode
    for kind, mode in (
        *(("Zero", "constant"), ("Constant", "constant")),
        *(("Reflection", "reflect"), ("Replication", "replicate"), ("Circular", "circular")),
    )
    for n in (1, 2, 3)
    if hasattr(nn, f"{kind}Pad{n}d")
}
_OTHERS: Final = {
    **{f"MaxPool{n}d": f"max_pool{n}d" for n in (1, 2, 3)},
    **{f"AvgPool{n}d": f"avg_pool{n}d" for n in (1, 2, 3)},
    **{f"AdaptiveAvgPool{n}d": f"adaptive_avg_pool{n}d" for n in (1, 2, 3)},
    **{f"AdaptiveMaxPool{n}d": f"adaptive_max_pool{n}d" for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": "batch_norm" for n in (1, 2, 3)},
    **{f"Conv{n}d": f"conv{n}d" for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": f"conv_transpose{n}d" for n in (1, 2, 3)},
    "SyncBatchNorm": "batch_norm",
    "LeakyReLU": "leaky_relu",
    "LogSoftmax": "log_softmax",
    "LayerNorm": "layer_norm",
    "GroupNorm": "group_norm",
    "PixelShuffle": "pixel_shuffle",
    "Upsample": "interpolate",
}
_WORD_OF_MODULE: Final[dict[type[nn.Module], str]] = {
    getattr(nn, name): word for name, word in ({name: name.lower() for name in _SAME} | _OTHERS).items()
} | dict.fromkeys(_MODE_OF_PADDING, "pad")
# Of modules and functions, with any other value of which they are no word of the vocabulary.
_USUAL: Final = {
    "return_indices": False,
    "recompute_scale_factor": None,
    "antialias": False,
    "track_running_stats": True,
    "padding_mode": "zeros",
}
_NOTHING: Final = tuple(
    getattr(nn, name)
    for name in ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
)
_DROPOUTS: Final = tuple(
    getattr(functional, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
)
# What tracing puts in for optional arguments.
_CHECKS: Final = (torch._assert, getattr(fx._symbolic_trace, "_assert_is_none", None))
_WORD_OF_FUNCTION: Final[dict[Any, str]] = {
    getattr(space, name + ending): _ALIASES.get(name, name)
    for name in sorted((PARAMETERS.keys() | _ALIASES.keys()) - {"size", "contiguous"})
    for ending in ("", "_")
    for space in (functional, torch, operator)
    if hasattr(space, name + ending)
} | {function: _ALIASES.get(name, name) for function, name in IN_PLACE.items()}


def lowered(model: nn.Module) -> tuple[list[Step], Any]:
    """A model in eval mode as steps, those of its inputs first, and what it returns: steps in lists, tuples and dicts.

    Optional arguments of ``forward`` are at their defaults; hooks are not called; the model stays as it is. What is
    done in place is done to a new tensor instead.

    Raises:
        ConfigurationError: a model that cannot be traced, with the reason, one with a weight that a hook computes, or
            one that changes a tensor in place in a way that cannot be followed.
    """
    model, _ = unwrapped_model(model)
    for name, module in model.named_modules():
        _refuse_computed(name, module)
    output: Any = None
    # Weights are read in eval mode too: in training mode, to read one may change it, as with spectral norm.
    with _in_eval_mode(model):
        lowering = _Lowering(model, traced(model))
        for node in lowering.nodes:
            if node.op == "output":
                output = lowering.value(node.args[0])
            else:
                lowering.add(node)
    inputs = [step for step in lowering.steps if step.op == INPUT]
    return [*inputs, *(step for step in lowering.steps if step.op != INPUT)], output


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and each module back into its own at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # What a model does besides when it is put into a mode, such as to merge weights, is undone so.
        model.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


class _Lowering:
    """Steps so far, and which value each node of the graph has now."""

    def __init__(self, model: nn.Module, found: Traced) -> None:
        self.model, self.traced = model, found
        live = set(found.live)
        self.nodes = [node for node in found.graph.nodes if node in live or node.op in ("placeholder", "output")]
        self.places = {node: place for place, node in enumerate(self.nodes)}
        self.modules = dict(model.named_modules())
        self.steps: list[Step] = []
        self.values: dict[fx.Node, Any] = {}
        # Of constants: what they are now, and their names by identity.
        self.constants: dict[str, Any] = {}
        self.names: dict[int, str] = {}

    def value(self, argument: Any) -> Any:
        """An argument in the graph, with values instead of nodes."""
        return mapped(argument, lambda each: self.values[each] if isinstance(each, fx.Node) else each)

    def add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.values[node] = self._input(node)
        elif node.op == "get_attr":
            self.values[node] = self._constant(str(node.target))
        elif node.op == "call_module":
            self.values[node] = self._module(node)
        elif node.target not in _CHECKS:
            self.values[node] = self._call(node)

    def _input(self, node: fx.Node) -> Any:
        name = str(node.target)
        if name in self.traced.required:
            return self._step(INPUT, {}, name)
        if not node.args and any(user.target not in _CHECKS for user in node.users):
            raise ConfigurationError(f"{type(self.model).__name__}: accepted is a forward without {name}.")
        return node.args[0] if node.args else None

    def _constant(self, name: str) -> Any:
        if name not in self.constants:
            self.constants[name] = value = _own(self.traced.constants[name])
            self.names[id(value)] = name
        return self.constants[name]

    def _module(self, node: fx.Node) -> Any:
        name = str(node.target)
        module = self.modules[name]
        source = self.value(node.args[0]) if len(node.args) == 1 and not node.kwargs else None
        if isinstance(module, _NOTHING) and source is not None:
            return source
        op = _word(module)
        _refuse_computed(name, module, PARAMETERS.get(op, ()))
        if source is not None and op in CONVOLUTIONS and module.padding_mode != "zeros":
            pad = list(module._reversed_padding_repeated_twice)
            source = self._step("pad", {"input": source, "pad": pad, "mode": module.padding_mode})
            args = _attributes(module, op) | {"input": source, "padding": 0}
        elif any(getattr(module, key, usual) != usual for key, usual in _USUAL.items()):
            op, args = "", {}
        else:
            args = _attributes(module, op) | {"input": source}
        if source is None or not op or accepts(op, args):
            # A module of its own, since the model may go on training.
            own = copy.deepcopy(module).eval().requires_grad_(False)
            in_place = getattr(own, "inplace", False)
            if in_place:
                # What it writes is told, not done.
                own.inplace = False
            result = self._opaque(own, node, name)
            if in_place:
                self._overwrite(node, source, result)
            return result
        result = self._step(op, args, name)
        if getattr(module, "inplace", False):
            self._overwrite(node, source, result)
        return result

    def _call(self, node: fx.Node) -> Any:
        """The value of a function or method."""
        positional, named = self.value(tuple(node.args)), self.value(dict(node.kwargs))
        in_place = bool(named.pop("inplace", False)) or named.get("out") is not None or writes(node)
        # Where warnings are to point.
        named.pop("_stacklevel", None)
        if node.target in _DROPOUTS and named.get("training", positional[2] if len(positional) > 2 else True) is False:
            return positional[0]
        if node.target is getattr and positional[1] == "shape":
            return self._step("size", {"input": positional[0]})
        if node.op == "call_method":
            spelled = str(node.target)
            word = _ALIASES.get(spelled.removesuffix("_"), spelled.removesuffix("_"))
            if word in ("reshape", "permute") and len(positional) > 2:
                positional = (positional[0], list(positional[1:]))
        else:
            word = _WORD_OF_FUNCTION.get(node.target, "")
        # A list is no tuple in an index: it gathers.
        gathers = word == "getitem" and isinstance(positional[1], list)
        parameters = {} if gathers else PARAMETERS.get(word, {})
        named = {key: each for key, each in named.items() if key in parameters or key not in _USUAL or each}
        args = {key: _own(each) for key, each in (dict(zip(parameters, positional, strict=False)) | named).items()}
        args = {key: each for key, each in args.items() if each is not None}
        if word == "reshape" and isinstance(args.get("shape"), int):
            args["shape"] = [args["shape"]]
        if not parameters or len(positional) > len(parameters) or accepts(word, args):
            if in_place:
                raise ConfigurationError(
                    f"{name_of(node)}: accepted in place are usual activations and arithmetic, without out=; do this "
                    "one to a new tensor."
                )
            return self._opaque(_callable(node), node, "")
        weight = named.get("weight", positional[1] if word in WEIGHTED and len(positional) > 1 else None)
        result = self._step(word, args, self.names.get(id(weight), "").rpartition(".")[0])
        if in_place:
            self._overwrite(node, positional[0], result)
        return result

    def _step(self, op: str, args: dict[str, Any], name: str = "") -> Step:
        self.steps.append(Step(op, args, name))
        return self.steps[-1]

    def _opaque(self, function: Callable[..., Any], node: fx.Node, name: str) -> Step:
        args = {"args": self.value(tuple(node.args)), "kwargs": self.value(dict(node.kwargs))}
        step = self._step(OPAQUE, args, name or getattr(function, "__name__", str(function)))
        step.function = function
        return step

    def _overwrite(self, node: fx.Node, before: Any, after: Step) -> None:
        """From this node on, what had a value that was changed in place has the new one."""
        if isinstance(before, Tensor):
            # One that is new in every call: what forward changes of the model, and computes with, was refused.
            self.values |= {each: after for each, value in self.values.items() if value is before}
            self.constants |= {name: after for name, value in self.constants.items() if value is before}
            return
        if not isinstance(before, Step):
            return
        root, place = _root(before), self.places[node]
        for each, value in self.values.items():
            used_later = any(self.places.get(user, -1) > place for user in each.users)
            if value is before:
                self.values[each] = after
            elif used_later and isinstance(value, Step) and value is not after and _root(value) is root:
                raise ConfigurationError(
                    f"{after}: changes in place what other operations see through a view; accepted are models that do "
                    "not, such as with inplace=False."
                )


def _word(module: nn.Module) -> str:
    """What a module of torch is in the vocabulary; "" for others."""
    return next((_WORD_OF_MODULE[kind] for kind in type(module).__mro__ if kind in _WORD_OF_MODULE), "")


def _own(value: Any) -> Any:
    """A setting that shares nothing with the model."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, tuple) else value


def _refuse_computed(name: str, module: nn.Module, used: Collection[str] = ()) -> None:
    """Refuses tensors that hooks compute, since hooks are not called, and ones used that are no parameter or buffer."""
    for attribute, value in vars(module).items():
        # What pruning, spectral and weight norm by hooks call the parameters that they compute it from.
        hooked = any(f"{attribute}_{ending}" in module._parameters for ending in ("orig", "g"))
        if isinstance(value, Tensor) and (hooked or attribute in used):
            raise ConfigurationError(
                f"{name or type(module).__name__}: its {attribute} is computed, as by a hook, and hooks are not "
                "called; accepted are parameters, buffers and parametrisations. Call torch.nn.utils.prune.remove, "
                "remove_weight_norm or remove_spectral_norm first."
            )


def _attributes(module: nn.Module, op: str) -> dict[str, Any]:
    """The arguments of a word that are attributes of a module."""
    names = PARAMETERS.get(op, {}).keys() - {"training", "momentum"}
    args = {name: _own(getattr(module, name, None)) for name in names}
    if op == "pad":
        args["pad"] = _own(module.padding)
        args["mode"] = next(_MODE_OF_PADDING[kind] for kind in type(module).__mro__ if kind in _MODE_OF_PADDING)
    return {name: each for name, each in args.items() if each is not None}


def _root(step: Step) -> Step:
    """The step whose memory a step may share."""
    while step.op in _VIEWS or step.op == OPAQUE:
        source = next(steps_in(step.args), None)
        if source is None:
            break
        step = source
    return step


def _callable(node: fx.Node) -> Callable[..., Any]:
    """What a node calls, as a function."""
    return _Method(str(node.target)) if node.op == "call_method" else cast(Callable[..., Any], node.target)


class _Method:
    """A method of whatever comes first, which can be pickled."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, self.__name__)(*args, **kwargs)
