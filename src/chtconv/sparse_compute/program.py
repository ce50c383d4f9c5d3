"""A network as a list of steps of a fixed vocabulary: what is compiled, executed, saved and loaded.

A step calls one function of torch with named arguments: numbers, words, tensors, or results of earlier steps. The
vocabulary says which functions there are and which arguments each takes, so that a list that comes from a file can be
checked before anything is run.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from chtconv.errors import ConfigurationError, unknown

INPUT: Final = "input"
# Anything that is no word of the vocabulary: a function or module as it is, which cannot be saved.
OPAQUE: Final = "call"


@dataclass(eq=False)
class Step:
    """One operation.

    Attributes:
        op: a word of the vocabulary, ``"input"`` or ``"call"``.
        args: by name; a result of an earlier step is that step.
        name: of its module or weight in the model, or "".
        function: what an opaque step calls, with ``args["args"]`` and ``args["kwargs"]``.
    """

    op: str
    args: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    function: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.op})" if self.name else self.op


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A tensor without its zeros.

    Attributes:
        values: [links], in the order of memory.
        positions: int64 [links], in the flattened tensor, strictly ascending.
        shape: of the tensor.
    """

    values: Tensor
    positions: Tensor
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "SparseTensor":
        """What a tensor has that is not 0."""
        flat = tensor.reshape(-1)
        positions = flat.nonzero().flatten()
        return SparseTensor(flat[positions], positions, tuple(tensor.shape))

    def dense(self) -> Tensor:
        """The tensor, with zeros."""
        flat = torch.zeros(math.prod(self.shape), dtype=self.values.dtype, device=self.values.device)
        return flat.index_put_((self.positions,), self.values).view(self.shape)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Lists, tuples, dicts and slices rebuilt, with everything else in them changed.

    >>> mapped({"a": [1, (2, slice(3, None))]}, lambda each: each and -each)
    {'a': [-1, (-2, slice(-3, None, None))]}
    """
    if isinstance(value, dict):
        return {key: mapped(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [mapped(each, change) for each in value]
    if isinstance(value, tuple):
        return tuple(mapped(each, change) for each in value)
    if isinstance(value, slice):
        return slice(*(mapped(each, change) for each in (value.start, value.stop, value.step)))
    return change(value)


def steps_in(value: Any) -> Iterator[Step]:
    """The steps in a value, in order, with repetitions."""
    found: list[Step] = []
    mapped(value, lambda each: found.append(each) if isinstance(each, Step) else None)
    yield from found


# ---------------------------------------------------------------------------------------------- kinds of arguments


def _is_whole(value: Any, least: int = -(2**31)) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_list(value: Any, fits: Callable[[Any], bool], most: int = 8) -> bool:
    return isinstance(value, (list, tuple)) and 0 < len(value) <= most and all(map(fits, value))


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, SparseTensor, Step))


def _is_index(value: Any) -> bool:
    if isinstance(value, slice):
        return all(each is None or _is_whole(each) for each in (value.start, value.stop, value.step))
    return _is_whole(value) or value is None or value is Ellipsis


_WORDS: Final = (
    *("same", "valid", "tanh", "none", "constant", "reflect", "replicate", "circular", "nearest", "nearest-exact"),
    *("linear", "bilinear", "bicubic", "trilinear", "area", "sparse", "dense"),
)
_KINDS: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "tensor": ("a tensor", _is_tensor),
    "term": ("a tensor or a number", lambda value: _is_tensor(value) or _is_number(value)),
    "tensors": ("a list of tensors", lambda value: _is_list(value, _is_tensor, 4096)),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "off": ("false", lambda value: value is False),
    "number": ("a finite number", _is_number),
    "numbers": ("finite numbers", lambda value: _is_number(value) or _is_list(value, _is_number)),
    "int": ("a whole number", _is_whole),
    "ints": ("whole numbers", lambda value: _is_whole(value) or _is_list(value, _is_whole)),
    "size": ("a whole number above 0", lambda value: _is_whole(value, 1)),
    "sizes": (
        "whole numbers above 0",
        lambda value: _is_whole(value, 1) or _is_list(value, lambda each: _is_whole(each, 1)),
    ),
    "counts": (
        "whole numbers from 0",
        lambda value: _is_whole(value, 0) or _is_list(value, lambda each: _is_whole(each, 0)),
    ),
    "extents": (
        "whole numbers above 0, or null",
        lambda value: _is_whole(value, 1) or _is_list(value, lambda each: each is None or _is_whole(each, 1)),
    ),
    "padding": (
        "whole numbers from 0, 'same' or 'valid'",
        lambda value: value in ("same", "valid") if isinstance(value, str) else _KINDS["counts"][1](value),
    ),
    "shape": (
        "whole numbers, or results of steps",
        lambda value: (
            isinstance(value, Step) or _is_list(value, lambda each: isinstance(each, Step) or _is_whole(each))
        ),
    ),
    "index": ("an index, or several", lambda value: _is_index(value) or _is_list(value, _is_index)),
    "word": (f"one of {', '.join(_WORDS)}", lambda value: isinstance(value, str) and value in _WORDS),
}

# ------------------------------------------------------------------------------------------------- the vocabulary

# Arguments in the order of the function in torch; those with "?" may be absent.
_FUNCTIONS: Final = """
relu relu6 selu sigmoid tanh silu mish hardswish hardsigmoid softsign logsigmoid tanhshrink: input=tensor
exp sqrt square abs neg: input=tensor
leaky_relu: input=tensor negative_slope=number?
elu celu: input=tensor alpha=number?
gelu: input=tensor approximate=word?
hardtanh: input=tensor min_val=number? max_val=number?
softplus: input=tensor beta=number? threshold=number?
softmax log_softmax: input=tensor dim=int
prelu: input=tensor weight=tensor
clamp: input=tensor min=number? max=number?
pow: input=tensor exponent=number
add sub mul div floordiv: input=term other=term
cat stack: tensors=tensors dim=int?
chunk: input=tensor chunks=size dim=int?
getitem: input=tensor index=index
size: input=tensor dim=int?
mean sum: input=tensor dim=ints? keepdim=flag?
amax amin: input=tensor dim=ints keepdim=flag?
flatten: input=tensor start_dim=int? end_dim=int?
reshape: input=tensor shape=shape
permute: input=tensor dims=ints
transpose: input=tensor dim0=int dim1=int
squeeze: input=tensor dim=ints?
unsqueeze: input=tensor dim=int
contiguous: input=tensor
pad: input=tensor pad=ints mode=word? value=number?
pixel_shuffle: input=tensor upscale_factor=size
interpolate: input=tensor size=extents? scale_factor=numbers? mode=word? align_corners=flag?
max_pool1d max_pool2d max_pool3d: input=tensor kernel_size=sizes stride=sizes? padding=counts? dilation=sizes? \
ceil_mode=flag?
avg_pool1d: input=tensor kernel_size=sizes stride=sizes? padding=counts? ceil_mode=flag? count_include_pad=flag?
avg_pool2d avg_pool3d: input=tensor kernel_size=sizes stride=sizes? padding=counts? ceil_mode=flag? \
count_include_pad=flag? divisor_override=size?
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d: input=tensor output_size=extents
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d: input=tensor output_size=extents
batch_norm: input=tensor running_mean=tensor running_var=tensor weight=tensor? bias=tensor? training=off? \
momentum=number? eps=number?
layer_norm: input=tensor normalized_shape=sizes weight=tensor? bias=tensor? eps=number?
group_norm: input=tensor num_groups=size weight=tensor? bias=tensor? eps=number?
conv1d conv2d conv3d: input=tensor weight=tensor bias=tensor? stride=sizes? padding=padding? dilation=sizes? \
groups=size? rectify=flag? backend=word?
conv_transpose1d conv_transpose2d conv_transpose3d: input=tensor weight=tensor bias=tensor? stride=sizes? \
padding=counts? output_padding=counts? groups=size? dilation=sizes?
linear: input=tensor weight=tensor bias=tensor? backend=word?
"""
PARAMETERS: Final[dict[str, dict[str, str]]] = {
    word: dict(each.split("=") for each in arguments.split())
    for words, _, arguments in (line.partition(":") for line in _FUNCTIONS.strip().splitlines())
    for word in words.split()
}
CONVOLUTIONS: Final = ("conv1d", "conv2d", "conv3d")
WEIGHTED: Final = (*CONVOLUTIONS, "linear")
TRANSPOSED: Final = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def _contiguous(input: Tensor) -> Tensor:
    return input.contiguous()


def _size(input: Tensor, dim: int | None = None) -> Any:
    return input.shape if dim is None else input.shape[dim]


def _getitem(input: Any, index: Any) -> Any:
    return input[tuple(index) if isinstance(index, list) else index]


def _reshape(input: Tensor, shape: Sequence[int] | int) -> Tensor:
    return input.reshape((shape,) if isinstance(shape, int) else tuple(shape))


def _of_two(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def named(input: Any, other: Any) -> Any:
        return function(input, other)

    return named


_OWN: Final[dict[str, Callable[..., Any]]] = {
    "contiguous": _contiguous,
    "size": _size,
    "getitem": _getitem,
    "reshape": _reshape,
    # Those of torch take no number first.
    **{
        name: _of_two(function)
        for name, function in (
            ("add", operator.add),
            ("sub", operator.sub),
            ("mul", operator.mul),
            ("div", operator.truediv),
            ("floordiv", operator.floordiv),
        )
    },
}


def function_of(word: str) -> Callable[..., Any]:
    """What a word of the vocabulary calls."""
    own = _OWN.get(word) or getattr(functional, word, None) or getattr(torch, word)
    result: Callable[..., Any] = own
    return result


def accepts(op: str, args: dict[str, Any]) -> str:
    """Why a word of the vocabulary cannot take these arguments; "" if it can.

    >>> accepts("flatten", {"input": torch.zeros(2), "start_dim": 1})
    ''
    >>> accepts("flatten", {"input": torch.zeros(2), "start_dim": True})
    'start_dim=True; accepted is a whole number'
    """
    parameters = PARAMETERS[op]
    for name, kind in parameters.items():
        optional, (meaning, fits) = kind.endswith("?"), _KINDS[kind.removesuffix("?")]
        if name not in args:
            if not optional:
                return f"{name} is missing; accepted is {meaning}"
        elif not fits(args[name]):
            shown = "a tensor" if _is_tensor(args[name]) else repr(args[name])[:80]
            return f"{name}={shown}; accepted is {meaning}"
    excess = sorted(args.keys() - parameters.keys())
    return f"{', '.join(excess)[:80]}; accepted are {', '.join(parameters)}" if excess else ""


def check(step: Step) -> None:
    """Checks a step of a list that may come from anywhere.

    Raises:
        ConfigurationError: naming the step and its word, argument or shape.
    """
    if step.op not in PARAMETERS:
        raise unknown("operation", step.op, PARAMETERS)
    reason = accepts(step.op, step.args) or _wrong_shape(step)
    if reason:
        raise ConfigurationError(f"step {step}: {reason}.")


def _wrong_shape(step: Step) -> str:
    """What is wrong with constant weights; "" if nothing is."""
    constant = (Tensor, SparseTensor)
    weight, bias = (step.args.get(name) for name in ("weight", "bias"))
    shape = None if weight is None or isinstance(weight, Step) else list(weight.shape)
    if step.op == "batch_norm":
        vectors = {tuple(each.shape) for each in step.args.values() if isinstance(each, constant)}
        if len(vectors) > 1 or any(len(each) != 1 for each in vectors):
            return f"tensors of shapes {sorted(vectors)}; accepted are vectors of one length"
    if shape is None or step.op not in (*WEIGHTED, *TRANSPOSED):
        return ""
    axes = 2 if step.op == "linear" else 2 + int(step.op[-2])
    groups = step.args.get("groups", 1)
    for name in ("stride", "padding", "output_padding", "dilation"):
        value = step.args.get(name)
        if isinstance(value, (list, tuple)) and len(value) not in (1, axes - 2):
            return f"{name}={value}; accepted are one number, or {axes - 2}"
    # Of a transposed convolution, the first axis has the inputs.
    if len(shape) != axes or 0 in shape or shape[0] % groups:
        return f"a weight of shape {shape} in {groups} groups; accepted are {axes} axes, the first a multiple of these"
    outputs = shape[1] * groups if step.op in TRANSPOSED else shape[0]
    if isinstance(bias, constant) and list(bias.shape) != [outputs]:
        return f"a bias of shape {list(bias.shape)}; accepted is [{outputs}]"
    return ""
