"""Convolutions that run on the sparse kernels where they can, and are otherwise what they were.

The class of a module is replaced, and nothing else of it: parameters, hooks and the state dict stay.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from chtconv.sparse_compute.computation import IN_GRAPHS, TYPES, Capturing, Computation
from chtconv.sparse_compute.convolution import sparse_conv2d
from chtconv.sparse_compute.graphs import convolution_in_graph
from chtconv.sparse_compute.problem import pair
from chtconv.sparse_compute.tuning import dense_type

# Attributes of an accelerated module. Compiled graphs look only at the second, and at IN_GRAPHS.
COMPUTATION: Final = "_chtconv_computation"
_NUMBER: Final = "_chtconv_number"
# Not in every version of torch.
_is_exporting: Final[Callable[[], bool]] = getattr(torch.compiler, "is_exporting", lambda: False)


class SparseForward(nn.Conv2d):
    """What accelerated classes put before the class of the module: a forward pass that may be sparse.

    A copy of a module, by ``copy``, ``deepcopy`` or pickle, is of the class that it was.
    """

    _plain: type[nn.Conv2d]

    def forward(self, input: Tensor) -> Tensor:
        """The convolution: input [N, C, H, W], a :class:`Blocked` or not; the same kind of thing out."""
        if torch.compiler.is_compiling():
            return self._in_graph(input)
        computation: Computation | None = self.__dict__.get(COMPUTATION)
        links = None if computation is None else computation.links(self, input)
        if computation is None or links is None:
            return super().forward(input)
        weight = self.weight
        return sparse_conv2d(
            input if input.dtype is weight.dtype else input.to(weight.dtype),
            weight,
            self.bias,
            links,
            stride=pair(self.stride),
            padding=self.padding,
            dilation=pair(self.dilation),
            groups=self.groups,
            # Asked in the backward pass: a topology may be told in between that it is wanted.
            dense_gradient=cast(bool, Capturing(computation)),
        )

    def _in_graph(self, input: Tensor) -> Tensor:
        _, left, _, top = padding = self._reversed_padding_repeated_twice
        if (
            not getattr(self, IN_GRAPHS, False)
            or _is_exporting()
            or torch._C._are_functorch_transforms_active()
            # Of a functional call: it may share the memory of the parameter, which is all that a graph tells.
            or not isinstance(self.weight, nn.Parameter)
            or input.dim() != 4
            or [left, left, top, top] != list(padding)
            or not (input.dtype == self.weight.dtype or torch.is_autocast_enabled("cpu"))
            or self.weight.dtype not in TYPES
            or input.device.type != "cpu"
            or self.weight.device.type != "cpu"
        ):
            return super().forward(input)
        return convolution_in_graph(self, input, getattr(self, _NUMBER), dense_type(self.weight.dtype))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The way of the oldest protocol: the later ones insist on the class that the module has.
        reduced: tuple[Any, ...] = super().__reduce_ex__(1)  # type: ignore[assignment]
        make, (cls, *arguments), state, *rest = reduced
        state = {key: value for key, value in state.items() if key not in (COMPUTATION, _NUMBER, IN_GRAPHS)}
        return make, (cls.__dict__.get("_plain", cls), *arguments), state, *rest


@cache
def accelerated(cls: type[nn.Conv2d]) -> type[SparseForward]:
    """The accelerated class for a class of convolutions, whose name it has."""
    # Also its module, by which torch.fx recognises what it is not to look into.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_plain": cls}
    return type(cls.__name__, (SparseForward, cls), names)


def refusal(module: nn.Module) -> str:
    """Why a module can never run on the sparse kernels; empty where it may."""
    cls = type(module)
    if not isinstance(module, nn.Conv2d):
        return f"a {cls.__name__} is no 2-D convolution"
    theirs = [
        name for name in ("forward", "_conv_forward", "__call__") if getattr(cls, name) != getattr(nn.Conv2d, name)
    ]
    if theirs and not issubclass(cls, SparseForward):
        return f"its class {cls.__name__} has a {theirs[0]} of its own"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    return ""


def put(module: nn.Module, computation: Computation) -> None:
    """Accelerates a module that is not refused."""
    if not isinstance(module, SparseForward):
        module.__class__ = accelerated(cast(Any, type(module)))
    module.__dict__[COMPUTATION] = computation
    module.__dict__[_NUMBER] = computation.number
    module.__dict__[IN_GRAPHS] = True


def take_back(module: nn.Module) -> None:
    """Makes a module what it was."""
    if "_plain" in type(module).__dict__:
        module.__class__ = cast(SparseForward, module)._plain
    for name in (COMPUTATION, _NUMBER, IN_GRAPHS):
        module.__dict__.pop(name, None)
