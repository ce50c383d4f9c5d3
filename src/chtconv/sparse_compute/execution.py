"""Steps as modules that run them: in general, and convolutions and linear layers that have no dense weight."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from chtconv.errors import ConfigurationError
from chtconv.sparse_compute.blocked import Blocked, to_dense
from chtconv.sparse_compute.computation import observed
from chtconv.sparse_compute.convolution import sparse_outputs
from chtconv.sparse_compute.library import library
from chtconv.sparse_compute.links import Links
from chtconv.sparse_compute.problem import pair
from chtconv.sparse_compute.program import OPAQUE, SparseTensor, Step, function_of, mapped

# Of a sparse matrix in rows.
_PARTS: Final = ("starts", "columns", "values")
# torch 2.6 does not tell exporting from compiling.
_is_exporting: Final[Callable[[], bool]] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


@dataclass(frozen=True)
class Result:
    """The result of an earlier step, by its number; inputs are the first ones."""

    number: int


def operation(step: Step, args: dict[str, Any]) -> "Operation":
    """The module of a step.

    A convolution or linear layer whose ``backend`` is "sparse" has no dense weight, if this machine can compute it
    without.

    Args:
        step: not an input.
        args: its arguments, with :class:`Result` instead of steps.
    """
    weight = args.get("weight")
    if isinstance(weight, Tensor) and args.get("backend") == "sparse":
        weight = SparseTensor.of(weight)
    others = {key: mapped(each, _whole) for key, each in args.items() if key != "weight"}
    if isinstance(weight, SparseTensor) and _is_sparse(step.op, args):
        kind = SparseConvolution if step.op == "conv2d" else SparseLinear
        return kind(step, others | {"weight": weight})
    return Operation(step, others if weight is None else others | {"weight": _whole(weight)})


def _is_sparse(op: str, args: dict[str, Any]) -> bool:
    """Whether a layer is to be computed from its links, and can be on this machine."""
    if args.get("backend") != "sparse" or isinstance(args.get("bias"), Result):
        return False
    return library() is not None if op == "conv2d" else op == "linear" and torch.backends.mkl.is_available()


def _whole(value: Any) -> Any:
    return value.dense() if isinstance(value, SparseTensor) else value


class Operation(nn.Module):
    """One step. It is called with the results so far; its tensors are buffers."""

    def __init__(self, step: Step, args: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.name = step.op, step.name
        self._function = step.function
        self._results = {key: each.number for key, each in args.items() if isinstance(each, Result)}
        self._settings: dict[str, Any] = {}
        self._nested: dict[str, Any] = {}
        for key, each in args.items():
            if isinstance(each, Tensor):
                if key == "weight" and self.op == "conv2d":
                    each = each.contiguous(memory_format=torch.channels_last)
                self.register_buffer(key, each)
            elif isinstance(each, (list, tuple, dict, slice)):
                self._nested[key] = each
            elif key not in self._results:
                self._settings[key] = each
        # What the function takes: of a convolution not what is done besides.
        self._called_with = {key: each for key, each in self._settings.items() if key not in ("backend", "rectify")}
        self._called_with |= {key: each for key, each in self._nested.items() if not _has_results(each)}
        self._changing = {key: each for key, each in self._nested.items() if _has_results(each)}

    @property
    def function(self) -> Callable[..., Any]:
        """What it calls. That of a word is not held: many of torch cannot be pickled."""
        return self._function or function_of(self.op)

    @property
    def args(self) -> dict[str, Any]:
        """The arguments that it was made with."""
        results = {key: Result(number) for key, number in self._results.items()}
        return results | self._settings | self._nested | self._tensors()

    def _tensors(self) -> dict[str, Any]:
        return {key: each for key, each in self._buffers.items() if each is not None}

    def first(self, values: list[Any]) -> Any:
        """What it works on: its argument ``input``."""
        number = self._results.get("input")
        return self._buffers.get("input") if number is None else values[number]

    def forward(self, values: list[Any]) -> Any:
        """The result.

        Args:
            values: results of the inputs and all steps before, by number.
        """
        given = {**self._called_with, **self._buffers}  # torch 2.6 does not trace the union of dictionaries
        for key, number in self._results.items():
            given[key] = values[number]
        opaque = self.op == OPAQUE
        for key, each in self._changing.items():
            given[key] = mapped(each, lambda leaf: _given(leaf, values, opaque))
        if opaque:
            return self.function(*given["args"], **given["kwargs"])
        result = self.function(**given)
        return result.relu_() if self._settings.get("rectify") else result

    def extra_repr(self) -> str:
        """What :func:`print` shows: the word, the name and the shape of the weight."""
        weight = self._buffers.get("weight")
        shape = f", weight {list(weight.shape)}" if weight is not None else ""
        return f"{self.op}{f' of {self.name}' if self.name else ''}{shape}"


def _has_results(value: Any) -> bool:
    found: list[Any] = []
    mapped(value, lambda each: found.append(each) if isinstance(each, Result) else None)
    return bool(found)


def _given(leaf: Any, values: list[Any], opaque: bool) -> Any:
    """What stands for a leaf of an argument; functions that nobody here knows are given ordinary tensors."""
    if not isinstance(leaf, Result):
        return leaf
    return _ordinary(values[leaf.number]) if opaque else values[leaf.number]


def _ordinary(value: Any) -> Any:
    # Tuples with names, as torch.max returns them, are of ordinary tensors already, and stay what they are.
    if type(value) in (tuple, list):
        return type(value)(map(_ordinary, value))
    return to_dense(value) if isinstance(value, Blocked) else value


class SparseConvolution(Operation):
    """A convolution that holds the values of its links, and their index lists, and no dense weight."""

    def __init__(self, step: Step, args: dict[str, Any]) -> None:
        super().__init__(step, {key: each for key, each in args.items() if key != "weight"})
        weight: SparseTensor = args["weight"]
        self.shape = weight.shape
        self.groups: int = args.get("groups", 1)
        self.links = Links.of_lists(*_lists(weight, self.groups), weight.shape, self.groups)
        self.register_buffer("values", weight.values)
        self.stride, self.dilation = (pair(args.get(key, 1)) for key in ("stride", "dilation"))
        padding = args.get("padding", 0)
        self.padding = padding if isinstance(padding, str) else pair(padding)

    def _tensors(self) -> dict[str, Any]:
        """Those that it was made with: the weight from its index lists."""
        outputs, size = self.shape[0], math.prod(self.shape[1:])
        kernels = torch.arange(outputs, device=self.links.starts.device).repeat_interleave(self.links.starts.diff())
        groups = kernels // (outputs // self.groups)
        positions = self.links.codes.long() + (kernels - groups) * size
        weight = SparseTensor(self._buffers["values"], positions, self.shape)  # type: ignore[arg-type]
        return _without(super()._tensors(), "values") | {"weight": weight}

    def forward(self, values: list[Any]) -> Any:
        """The outputs: blocked for batches of 8 and more."""
        if observed():
            raise ConfigurationError(
                f"layer {self.name}: a sparse convolution that is traced, exported, transformed or observed by a mode; "
                'accepted are the model itself, and one that is compiled with backend="dense".'
            )
        x = self.first(values)
        batched = x.dim() != 3
        if batched and not len(x):
            # Nothing to compute: the shape alone.
            weight = self._buffers["values"].new_zeros(self.shape)  # type: ignore[union-attr]
            return functional.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)
        try:
            out = sparse_outputs(
                x if batched else x[None],
                self._buffers["values"],  # type: ignore[arg-type]
                self._buffers.get("bias"),
                self.links,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                rectify=self._settings.get("rectify", False),
            )
        except ConfigurationError as error:
            raise ConfigurationError(f"layer {self.name}: {error}") from error
        return out if batched else out[0]

    def extra_repr(self) -> str:
        """What :func:`print` shows: the name, the shape and the number of links."""
        links = len(self.links.codes)
        return f"{self.name}, weight {list(self.shape)}, {links} links of {math.prod(self.shape)}"


def _lists(weight: SparseTensor, groups: int) -> tuple[Tensor, Tensor]:
    """Where the links of each kernel start, int64 [O + 1], and their codes, int32: channel times taps plus tap."""
    outputs, size = weight.shape[0], math.prod(weight.shape[1:])
    kernels = weight.positions.div(size, rounding_mode="floor")
    starts = torch.zeros(outputs + 1, dtype=torch.int64, device=kernels.device)
    starts[1:] = torch.bincount(kernels, minlength=outputs).cumsum(0)
    groups_of = kernels.div(outputs // groups, rounding_mode="floor")
    return starts, (weight.positions - (kernels - groups_of) * size).int()


class SparseLinear(Operation):
    """A linear layer that holds the values of its links and their columns, and computes with a sparse matrix of torch.

    Its buffers are ordinary tensors, since those of a sparse matrix can neither be copied nor shared.
    """

    def __init__(self, step: Step, args: dict[str, Any]) -> None:
        super().__init__(step, {key: each for key, each in args.items() if key != "weight"})
        weight: SparseTensor = args["weight"]
        self.shape = weight.shape
        starts, columns = _lists(weight, 1)
        # As MKL takes them, which would convert others in every call.
        self.register_buffer("starts", starts.int())
        self.register_buffer("columns", columns)
        self.register_buffer("values", weight.values)
        _matrix(*self._parts, self.shape, check=True)

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self._buffers[name] for name in _PARTS)  # type: ignore[return-value]

    def _tensors(self) -> dict[str, Any]:
        """Those that it was made with: the weight from its index lists."""
        starts, columns, values = self._parts
        rows = torch.arange(self.shape[0], device=starts.device).repeat_interleave(starts.diff())
        weight = SparseTensor(values, rows * self.shape[1] + columns, self.shape)
        return _without(super()._tensors(), *_PARTS) | {"weight": weight}

    def forward(self, values: list[Any]) -> Any:
        """The outputs [..., O] of inputs [..., I]."""
        x, bias = _ordinary(self.first(values)), self._buffers.get("bias")
        if _is_exporting() or observed():
            # These know no sparse matrices.
            return functional.linear(x, self._dense(), bias)
        weight = _matrix(*self._parts, self.shape)
        rows = x.reshape(-1, x.shape[-1]).T
        out = weight @ rows if bias is None else torch.addmm(bias[:, None], weight, rows)
        return out.T.reshape(*x.shape[:-1], self.shape[0])

    def _dense(self) -> Tensor:
        starts, columns, values = self._parts
        rows = torch.arange(self.shape[0], device=starts.device)
        rows = torch.repeat_interleave(rows, starts.diff(), output_size=columns.shape[0])
        return values.new_zeros(self.shape).index_put((rows, columns), values)

    def extra_repr(self) -> str:
        """What :func:`print` shows: the name, the shape and the number of links."""
        return f"{self.name}, weight {list(self.shape)}, {len(self._parts[2])} links of {math.prod(self.shape)}"


def _matrix(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...], check: bool = False) -> Tensor:
    """A sparse matrix in rows of the tensors given, which are not copied."""
    _silence()
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=check, device=values.device)


@cache
def _silence() -> None:
    """Has torch say now, unheard, what it says once: that the interface of sparse matrices may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), device="cpu")


def _without(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: each for key, each in tensors.items() if key not in names}
