"""Convolutions that run on the sparse kernels where they can, and are otherwise what they were.

The class of a module is replaced, and nothing else of it: parameters, hooks and the state dict stay.
"""

import itertools
import weakref
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from chtconv.enforcement import is_zero_off_mask, matching
from chtconv.sparse_compute.blocked import Blocked
from chtconv.sparse_compute.convolution import sparse_conv2d
from chtconv.sparse_compute.graphs import BY_NUMBER, convolution_in_graph
from chtconv.sparse_compute.layout import BLOCKED_FROM
from chtconv.sparse_compute.library import library
from chtconv.sparse_compute.links import Links
from chtconv.sparse_compute.measurement import measure
from chtconv.sparse_compute.tuning import Case, Measurement, Tuner, dense_type, in_steps

if TYPE_CHECKING:
    from chtconv.sparse_layer import SparseLayer

# Attributes of an accelerated module. Compiled graphs look only at the last two.
COMPUTATION: Final = "_chtconv_computation"
_NUMBER: Final = "_chtconv_number"
_IN_GRAPHS: Final = "_chtconv_in_graphs"
_TYPES: Final = (torch.float32, torch.float64)
# Of a class that is to be left as it is.
_OVERRIDES: Final = ("forward", "_conv_forward", "__call__", "__reduce_ex__")
_TENSORS: Final = (Tensor, nn.Parameter, Blocked)
# Batches and sizes that a layer remembers what they were measured as.
_MOST_CASES: Final = 256
_numbers = itertools.count()
# Not in every version of torch.
_is_exporting: Final[Callable[[], bool]] = getattr(torch.compiler, "is_exporting", lambda: False)


class Computation:
    """How the calls of one layer are computed: its index lists, and whether they are used.

    Attributes:
        name: of the weight.
        tuner: chooses between sparse and dense; None where all that can be sparse is.
        obstacle: why the last call was dense although sparse was wanted; empty where it was not.
        number: by which compiled graphs find it.
    """

    def __init__(self, layer: "SparseLayer", tuner: Tuner | None) -> None:
        self.name = layer.name
        self.tuner = tuner
        self.obstacle = ""
        self.number = next(_numbers)
        # Weakly: a model keeps its topology alive no more than hooks do.
        self._layer = weakref.ref(layer)
        self._shape = _shape(cast(nn.Conv2d, layer.module))
        self._version = -1
        self._links: Links | None = None
        self._cases: dict[tuple[Any, ...], Case] = {}
        BY_NUMBER[self.number] = self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Nobody evolves the links of a copy.
        return type(None), ()

    @property
    def capturing(self) -> bool:
        """Whether the gradient is asked for off the mask."""
        layer = self._layer()
        return layer is not None and layer.capturing

    def links(self, module: nn.Conv2d, input: Tensor) -> Links | None:
        """The index lists to compute a call with; None where it is to be dense."""
        layer, weight = self._layer(), module._parameters.get("weight")
        if layer is None or weight is None or weight is not layer.hooked:
            self.obstacle = "its weight is not the parameter that sparsify was given"
            return None
        self.obstacle = _obstacle(module, input, weight)
        if self.obstacle:
            return None
        if self.tuner is not None:
            training, gradients = module.training, (input.requires_grad, weight.requires_grad)
            if not torch.is_grad_enabled():
                # Reentrant checkpointing runs the forward pass of a training step without recording it.
                gradients = training, training and gradients[1]
            passes = "f" + "i" * gradients[0] + "w" * gradients[1]
            if not self._chosen(self.tuner, layer, input, passes, training, dense_type(weight.dtype)):
                return None
        return self._current(layer)

    def links_in_graph(
        self, x: Tensor, weight: Tensor, passes: str, training: bool, compute: torch.dtype
    ) -> Links | None:
        """The same where a graph calls, that gives and gets ordinary tensors.

        Args:
            x: the input.
            weight: that the graph has.
            passes: as in :class:`.tuning.Case`, like ``training``.
            training: whether the module was in training mode when the graph was made.
            compute: what the layer computes in where it is dense.
        """
        layer = self._layer()
        # The weight of a graph is the parameter under another name, or computed, or that of another call.
        if layer is None or layer.hooked is None or weight.data_ptr() != layer.hooked.data_ptr():
            self.obstacle = "its weight is not the parameter that sparsify was given"
            return None
        self.obstacle = ""
        if self.tuner is not None and not self._chosen(self.tuner, layer, x, passes, training, compute, alone=True):
            return None
        return self._current(layer)

    def settle(self, tuner: Tuner) -> None:
        """Takes the layer out of graphs, which are then compiled anew, where it was measured to be slower in them."""
        layer = self._layer()
        if layer is not None:
            kept = tuner.sparse_in_graphs(self.name, _density(layer))
            if layer.module.__dict__.get(_IN_GRAPHS) is not kept:
                layer.module.__dict__[_IN_GRAPHS] = kept

    def _current(self, layer: "SparseLayer") -> Links | None:
        if self._version != layer.version:
            # Once for every mask and after every loading: what was written off the mask counts until it is cut.
            self._version, weight = layer.version, layer.weight
            fits = is_zero_off_mask(weight, matching(layer.bits, weight))
            self._links = Links.of(layer.mask, cast(nn.Conv2d, layer.module).groups) if fits else None
        if self._links is None:
            self.obstacle = "its weight is not zero off the mask, until the next optimizer step cuts it"
        return self._links

    def _chosen(
        self,
        tuner: Tuner,
        layer: "SparseLayer",
        x: Tensor,
        passes: str,
        training: bool,
        compute: torch.dtype,
        alone: bool = False,
    ) -> bool:
        kernels = library()
        if kernels is None:
            return False
        module, threads = cast(nn.Conv2d, layer.module), torch.get_num_threads()
        signature = (x.shape, passes, training, compute, layer.links, threads, kernels.isa, alone)
        case = self._cases.get(signature)
        if case is None:
            if len(self._cases) >= _MOST_CASES:
                self._cases.clear()
            batch, _, height, width = x.shape
            case = self._cases[signature] = Case(
                training,
                alone,
                batch >= BLOCKED_FROM,
                in_steps(batch * height * width),
                _density(layer),
                passes,
                f"{layer.weight.dtype}, {compute}",
                threads,
                kernels.isa,
            )

        def take() -> Measurement | None:
            links = self._current(layer)
            return None if links is None else measure(module, x, links, passes, compute)

        return tuner.sparse(self.name, case, self._shape, not case.blocked or isinstance(x, Blocked), take)


class Capturing:
    """Whether a dense gradient is wanted, asked when it matters."""

    def __init__(self, computation: Computation) -> None:
        self._computation = computation

    def __bool__(self) -> bool:
        return self._computation.capturing


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
            stride=_pair(self.stride),
            padding=self.padding,
            dilation=_pair(self.dilation),
            groups=self.groups,
            # Asked in the backward pass: a topology may be told in between that it is wanted.
            dense_gradient=cast(bool, Capturing(computation)),
        )

    def _in_graph(self, input: Tensor) -> Tensor:
        _, left, _, top = padding = self._reversed_padding_repeated_twice
        if (
            not getattr(self, _IN_GRAPHS, False)
            or _is_exporting()
            or torch._C._are_functorch_transforms_active()
            or input.dim() != 4
            or [left, left, top, top] != list(padding)
            or not (input.dtype == self.weight.dtype or torch.is_autocast_enabled("cpu"))
            or self.weight.dtype not in _TYPES
            or input.device.type != "cpu"
            or self.weight.device.type != "cpu"
        ):
            return super().forward(input)
        return convolution_in_graph(self, input, getattr(self, _NUMBER), dense_type(self.weight.dtype))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The way of the oldest protocol: the later ones insist on the class that the module has.
        reduced: tuple[Any, ...] = super().__reduce_ex__(1)  # type: ignore[assignment]
        make, (cls, *arguments), state, *rest = reduced
        state = {key: value for key, value in state.items() if key not in (COMPUTATION, _NUMBER, _IN_GRAPHS)}
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
    module.__dict__[_IN_GRAPHS] = True


def take_back(module: nn.Module) -> None:
    """Makes a module what it was."""
    if "_plain" in type(module).__dict__:
        module.__class__ = cast(SparseForward, module)._plain
    for name in (COMPUTATION, _NUMBER, _IN_GRAPHS):
        module.__dict__.pop(name, None)


def _obstacle(module: nn.Conv2d, input: Tensor, weight: Tensor) -> str:
    """Why the kernels cannot compute a call; empty where they can."""
    if type(input) not in _TENSORS or type(weight) is not nn.Parameter:
        return f"its input is a {type(input).__name__}, its weight a {type(weight).__name__}"
    if not (weight.is_cpu and input.is_cpu) or weight.layout is not torch.strided or input.layout is not torch.strided:
        return f"its weight is {weight.layout} on {weight.device}, its input {input.layout} on {input.device}"
    if weight.dtype not in _TYPES:
        return f"its weight is {weight.dtype}"
    if input.dtype is not weight.dtype and not (
        # Autocast converts what a dense convolution is given.
        torch.is_autocast_enabled("cpu") and weight.dtype is torch.float32 and input.dtype.itemsize == 2
    ):
        return f"its weight is {weight.dtype}, its input {input.dtype}"
    if input.dim() != 4 or not input.numel() or input.shape[1] != module.in_channels or module.padding_mode != "zeros":
        return f"its input is of shape {tuple(input.shape)}"
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return "the call is traced, transformed or observed"
    return ""


def _density(layer: "SparseLayer") -> int:
    return in_steps(max(layer.total_links, 1) / layer.weight.numel())


def _shape(module: nn.Conv2d) -> tuple[Any, ...]:
    return tuple(module.weight.shape), module.stride, module.padding, module.dilation, module.groups


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    first, second = values
    return first, second
