"""What the topology has to know of each sparse layer: its weight, its mask, its gradients and its input size."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chtconv.enforcement.bits import apply_bits, bits_of, matching
from chtconv.enforcement.dense_gradient import DenseGradient
from chtconv.enforcement.sharding import gathered, is_sharded, local, local_part
from chtconv.errors import ConfigurationError
from chtconv.initial import RANDOM, LinearTopology, links_at
from chtconv.layers import input_size
from chtconv.layers.geometry import Geometry
from chtconv.layers.matrix import (
    TRANSPOSED,
    Layer,
    by_channel,
    from_channels,
    from_matrix,
    groups_of,
    matrix_shape,
    to_matrix,
)
from chtconv.methods import Method
from chtconv.scores.api import disabled_scores


@dataclass(frozen=True)
class Settings:
    """How a layer is made sparse and evolves; see :func:`chtconv.sparsify` for the meaning of each.

    Attributes:
        sparsity: share of disabled links at the end.
        method: removal, regrowth and density schedule.
        predictor: how links are scored.
        graph: on which graph.
        exact: whether scores do not depend on the number of threads.
        allocation: ``"kernel"`` where every kernel has the same number of links, ``"layer"`` where links compete
            within the whole layer, ``"model"`` where layers are pruned together besides; None until the method has
            decided.
        initial: the initial topology, see :mod:`chtconv.initial.masks`.
        windows: which windows scores are averaged over.
    """

    sparsity: float
    method: Method
    predictor: str
    graph: str
    exact: bool = False
    allocation: str | None = "kernel"
    initial: str | LinearTopology = RANDOM
    windows: str = "in_bounds"


class SparseLayer:
    """A layer with a mask: its parameter, the mask in force, and the size of input that evolution goes by.

    Rows are the kernels, as a matrix [O, I] of output channels and what each of them sees (input channels of its
    group times kernel positions), whatever the layout of the weight.

    Attributes:
        name: qualified name of the weight, such as ``"features.0.weight"``.
        module: the layer.
        seed_name: the name that its random draws depend on, without prefixes of wrappers.
        settings: how it evolves.
        densities: share of active links before training and at the end.
        links: number of active links, of each kernel or of the layer, as the allocation says.
        link_steps: active links of the layer, summed over the optimizer steps so far.
        bits: the mask as integers of the weight's width and layout, see :mod:`chtconv.enforcement.bits`.
        explored: bool of the weight's shape, where a link was ever active.
        newest: bool [O, I], links that the last evolution brought.
        stopped: whether it stopped evolving, see :attr:`chtconv.Method.early_stop`.
        dense_gradient: its gradient with that of disabled links, kept when somebody asks for it.
        trained: whether its optimizer has stepped, with the weight not frozen, since the last step that was counted.
        handles: the hooks that this layer registered.
        hooked: the parameter that they belong to.
        version: changes whenever the mask may have changed, or somebody may have written weights off the mask.
    """

    def __init__(
        self,
        name: str,
        seed_name: str,
        module: Layer,
        settings: Settings,
        densities: tuple[float, float],
        mask_OI: Tensor,
    ) -> None:
        self.name = name
        self.seed_name = seed_name
        self.module = module
        self.settings = settings
        self.densities = densities
        self.version = 0
        mask = from_matrix(mask_OI, module)
        self.links = self.links_at(densities[0])
        self._sharded: nn.Parameter | None = None
        self._shown: Tensor | None = None
        self.put_mask(mask)
        self.explored = mask.clone()
        self.newest = torch.zeros_like(mask_OI)
        self.stopped = False
        self.link_steps = 0
        self.trained = False
        self.dense_gradient = DenseGradient()
        self.handles: list[RemovableHandle] = []
        self.hooked: nn.Parameter | None = None
        self._left_at: int | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The weight: an ordinary dense parameter that is zero off the mask.

        Raises:
            ConfigurationError: it is computed from others since it was made sparse.
        """
        weight = self.module._parameters.get("weight")
        if weight is None:
            raise ConfigurationError(
                f"layer {self.name}: its weight is computed from other parameters since sparsify (a parametrisation, "
                "weight norm or pruning); accepted are plain weights. Call detach() on the topology first."
            )
        # While a sharded module computes, its parameter is not the one that its optimizer has.
        if self._sharded is not None and not is_sharded(weight):
            return self._sharded
        if is_sharded(weight):
            self._sharded = weight
        return weight

    @property
    def mask(self) -> Tensor:
        """Bool mask of the weight's shape, the whole of it on every rank; True where a link is active."""
        return self.bits != 0 if self._shown is None else self._shown.clone()

    def put_mask(self, mask: Tensor) -> None:
        """Makes this the mask; :class:`chtconv.Topology` puts it into force."""
        bits, known = bits_of(local_part(mask, self.weight), local(self.weight)), self.__dict__.get("bits")
        if known is not None and (known.shape, known.dtype, known.device) == (bits.shape, bits.dtype, bits.device):
            # In place: a CUDA graph reads the masks where they were when it was captured.
            known.copy_(bits)
        else:
            self.bits: Tensor = bits
        self._shown = mask.clone() if is_sharded(self.weight) else None
        self.version += 1

    @property
    def module_name(self) -> str:
        """Qualified name of the module; empty where the model is the layer."""
        return self.name.removesuffix("weight").removesuffix(".")

    @property
    def total_links(self) -> int:
        """Number of active links of the whole layer."""
        return self.links * (matrix_shape(self.module)[0] if self.settings.allocation == "kernel" else 1)

    def links_at(self, density: float) -> int:
        """Number of links at a density: of each kernel, or of the whole layer."""
        return links_at(density, matrix_shape(self.module), self.settings.allocation, self.name)

    def matrix(self, values: Tensor) -> Tensor:
        """Anything of the weight's shape as [O, I]."""
        return to_matrix(values, self.module)

    def mask_gradient(self, *_: object) -> None:
        """Sets the gradient to zero off the mask, where there is one."""
        gradient = self.weight.grad
        if gradient is not None:
            part = local(gradient)
            self.bits = matching(self.bits, part)
            apply_bits(part, self.bits)

    def mask_weight(self) -> None:
        """Sets the weight to zero off the mask."""
        part = local(self.weight.detach())
        self.bits = matching(self.bits, part)
        apply_bits(part, self.bits)

    @property
    def written(self) -> int | None:
        """The version of the weight where somebody has written into it since its optimizer has stepped, else None."""
        version = self.weight._version
        return None if version == self._left_at else version

    @property
    def took_part(self) -> bool:
        """Whether its optimizer has stepped since the last step that was counted, so that its gradient is whole.

        One of several may have skipped its step, when gradients are scaled and not finite.
        """
        return self.trained or not self.dense_gradient.one_of_several

    def stepped(self) -> None:
        """After an optimizer has stepped: the weight is as training has left it."""
        self._left_at = self.weight._version

    def mask_if_written(self) -> None:
        """Before a step: masks a weight that somebody wrote into since the last one, as in a new initialisation."""
        if self.written is not None:
            self.mask_weight()
            self.version += 1

    def capture(self, on: bool) -> None:
        """Whether dense gradients are kept from now on; what was kept so far is dropped."""
        before = self.weight.grad if on and self.dense_gradient.one_of_several else None
        self.dense_gradient.capture(on, before)

    def before_accumulation(self, *_: object) -> None:
        """Before gradients are accumulated."""
        self.dense_gradient.before_accumulation(self.weight.grad)

    def accumulated(self, *_: object) -> None:
        """After gradients were accumulated: keeps them where evolution asks for them, then masks them."""
        self.dense_gradient.accumulated(self.weight.grad, self.bits)
        self.mask_gradient()

    def follow_gradient(self) -> None:
        """Before a step: what was kept is unscaled and clipped like the gradient."""
        self.dense_gradient.follow(self.weight.grad, self.bits)

    def settle(self) -> None:
        """After the step of its optimizer, where there are several."""
        self.dense_gradient.settle(self.weight.grad)

    def count_step(self) -> None:
        """After a step of all optimizers: what is counted or averaged over steps."""
        self.link_steps += self.total_links
        self.dense_gradient.count_step(averaged=self.took_part and self.settings.method.worth == "momentum")

    @property
    def input_size(self) -> tuple[int, ...] | None:
        """Spatial size of the input that evolution goes by, None before the first forward pass.

        That of the last input in training mode; where there was none yet, of the last input.
        """
        return input_size.seen(self.module)

    def geometry(self) -> Geometry:
        """The geometry of the layer for the input that evolution goes by.

        Raises:
            ConfigurationError: the layer has not been called yet, or with an input on which it has no graph.
        """
        size, m = self.input_size, self.module
        if size is None:
            raise ConfigurationError(
                f"layer {self.name}: its input size is unknown, because the layer has not been called since sparsify; "
                "run a forward pass of the model before the first evolution, or leave the layer out if it is never "
                "called. What is computed past its hooks, as by layer.forward(x) or functional.conv2d(x, "
                "layer.weight), is no call of it; without link prediction, such as with 'set', none is needed. A model "
                "that torch.compile compiled and that was called before sparsify does not notice hooks that are added "
                "later: call torch.compiler.reset() after sparsify, and it is compiled anew."
            )
        if isinstance(m, nn.Linear):
            return Geometry.of((), ())
        try:
            return Geometry.of(
                m.kernel_size,
                size,
                stride=m.stride,
                padding=m.padding,
                dilation=m.dilation,
                padding_mode=m.padding_mode,
                transposed=isinstance(m, TRANSPOSED),
                output_padding=m.output_padding if isinstance(m, TRANSPOSED) else 0,
            )
        except ConfigurationError as error:
            raise ConfigurationError(
                f"layer {self.name}: {error} Methods without link prediction need no graph, such as 'set' in overrides."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Everything but the mask that a resumed run needs: tensors and plain Python."""
        momentum = self.dense_gradient.momentum
        return {
            "links": self.links,
            "explored": self.explored.clone(),
            "newest": self.newest.clone(),
            "stopped": self.stopped,
            "link_steps": self.link_steps,
            "dense_steps": self.dense_gradient.steps,
            "momentum": None if momentum is None else gathered(momentum, self.weight).clone(),
            "input_size": None if self.input_size is None else list(self.input_size),
        }

    def load_state_dict(self, mask: Tensor, state: dict[str, Any]) -> None:
        """Continues from a mask, and a state, checked by :func:`chtconv.enforcement.loading.check_state`."""
        self.put_mask(mask)
        self.explored.copy_(state["explored"])
        self.newest.copy_(state["newest"])
        self.links, self.stopped = int(state["links"]), bool(state["stopped"])
        self.link_steps, self.dense_gradient.steps = int(state["link_steps"]), int(state["dense_steps"])
        momentum = state["momentum"]
        if momentum is not None:
            momentum = local_part(momentum, self.weight).to(self.weight.device, copy=True)
        self.dense_gradient.momentum = momentum
        # Where nothing was seen yet: what a run has to say of itself may not wait for its next step, if there is none.
        size = state.get("input_size")
        if size is not None and self.input_size is None:
            input_size.put(self.module, tuple(size))

    def link_scores(self, mask_OI: Tensor, predictor: str | None = None) -> Tensor:
        """Link scores of a mask of this layer, float32 of its shape [O, I]; 0 at active positions.

        Args:
            mask_OI: bool.
            predictor: another than that of its settings.
        """
        settings, groups = self.settings, groups_of(self.module)
        mask_GOCK = by_channel(mask_OI, self.module).unflatten(0, (groups, -1))
        scores_GOCK = disabled_scores(
            mask_GOCK,
            self.geometry(),
            predictor or settings.predictor,
            settings.graph,
            windows=settings.windows,
            exact=settings.exact,
        )
        return from_channels(scores_GOCK.flatten(0, 1))
