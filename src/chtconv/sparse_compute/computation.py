"""How the calls of one layer are computed: with its index lists, or dense."""

import itertools
import weakref
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from chtconv.enforcement.bits import is_zero_off_mask, matching
from chtconv.enforcement.sparse_layer import SparseLayer
from chtconv.sparse_compute.blocked import Blocked
from chtconv.sparse_compute.layout import BLOCKED_FROM
from chtconv.sparse_compute.library import library
from chtconv.sparse_compute.links import Links
from chtconv.sparse_compute.measurement import measure
from chtconv.sparse_compute.tuning import Case, Measurement, Tuner, dense_type, in_steps

# Of an accelerated module: whether it is sparse in compiled graphs, which look at this attribute.
IN_GRAPHS: Final = "_chtconv_in_graphs"
TYPES: Final = (torch.float32, torch.float64)
BY_NUMBER: Final["weakref.WeakValueDictionary[int, Computation]"] = weakref.WeakValueDictionary()
_TENSORS: Final = (Tensor, nn.Parameter, Blocked)
# Batches and sizes that a layer remembers what they were measured as.
_MOST_CASES: Final = 256
_numbers = itertools.count()


class Computation:
    """How the calls of one layer are computed: its index lists, and whether they are used.

    Attributes:
        name: of the weight.
        tuner: chooses between sparse and dense; None where all that can be sparse is.
        obstacle: why the last call was dense although sparse was wanted; empty where it was not.
        number: by which compiled graphs find it.
    """

    def __init__(self, layer: SparseLayer, tuner: Tuner | None) -> None:
        self.name = layer.name
        self.tuner = tuner
        self.obstacle = ""
        self.number = next(_numbers)
        # Weakly: a model keeps its topology alive no more than hooks do.
        self._layer = weakref.ref(layer)
        self._shape = _shape(cast(nn.Conv2d, layer.module))
        self._seen: tuple[int, int | None] = -1, None
        self._of_mask: Links | None = None
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
        return layer is not None and layer.dense_gradient.capturing

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
        if not x.numel():
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
            if layer.module.__dict__.get(IN_GRAPHS) is not kept:
                layer.module.__dict__[IN_GRAPHS] = kept

    def _current(self, layer: SparseLayer) -> Links | None:
        # Once for every mask and after every write: what was written off the mask counts until it is cut.
        seen = layer.version, layer.written
        if self._seen != seen:
            weight = layer.weight
            if self._of_mask is None or self._seen[0] != seen[0]:
                self._of_mask = Links.of(layer.mask, cast(nn.Conv2d, layer.module).groups)
            self._links = self._of_mask if is_zero_off_mask(weight, matching(layer.bits, weight)) else None
            # Last, lest another thread takes the old links for those of this version.
            self._seen = seen
        if self._links is None:
            self.obstacle = "its weight is not zero off the mask, until the next optimizer step cuts it"
        return self._links

    def _chosen(
        self,
        tuner: Tuner,
        layer: SparseLayer,
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


def _obstacle(module: nn.Conv2d, input: Tensor, weight: Tensor) -> str:
    """Why the kernels cannot compute a call; empty where they can."""
    if type(input) not in _TENSORS or type(weight) is not nn.Parameter:
        return f"its input is a {type(input).__name__}, its weight a {type(weight).__name__}"
    if not (weight.is_cpu and input.is_cpu) or weight.layout is not torch.strided or input.layout is not torch.strided:
        return f"its weight is {weight.layout} on {weight.device}, its input {input.layout} on {input.device}"
    if weight.dtype not in TYPES:
        return f"its weight is {weight.dtype}"
    if input.dtype is not weight.dtype and not (
        # Autocast converts what a dense convolution is given.
        torch.is_autocast_enabled("cpu") and weight.dtype is torch.float32 and input.dtype.itemsize == 2
    ):
        return f"its weight is {weight.dtype}, its input {input.dtype}"
    bias = module.bias
    if bias is not None and (bias.dtype, bias.device, *bias.shape) != (weight.dtype, weight.device, len(weight)):
        return f"its bias is {bias.dtype} of shape {tuple(bias.shape)}"
    if input.dim() != 4 or not input.numel() or input.shape[1] != module.in_channels or module.padding_mode != "zeros":
        return f"its input is of shape {tuple(input.shape)}"
    return "the call is traced, transformed or observed" if observed() else ""


def observed() -> bool:
    """Whether more is wanted of calls now than their results: they are traced, transformed or observed by a mode."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _density(layer: SparseLayer) -> int:
    return in_steps(max(layer.total_links, 1) / layer.weight.numel())


def _shape(module: nn.Conv2d) -> tuple[Any, ...]:
    return tuple(module.weight.shape), module.stride, module.padding, module.dilation, module.groups
