"""The masks of a model in force.

Parameters stay ordinary dense parameters that are exactly zero off the mask, so that state dicts, schedulers,
clipping and third-party code see a plain model. Gradients are masked as they are accumulated, which is before
anything else can see them; the optimizer's hooks count steps and let the topology evolve.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from chtconv.enforcement import apply_bits, bits_of, is_zero_off_mask, matching
from chtconv.errors import ConfigurationError
from chtconv.evolution import evolve
from chtconv.hooks import WeakHook
from chtconv.layers import SparseLayer
from chtconv.methods import Method
from chtconv.metrics import layer_stats, overall_stats
from chtconv.optimizer_state import reset_off_mask
from chtconv.randomness import canonical_names, generator
from chtconv.record import Record
from chtconv.schedule import Schedule

# Marks a module whose weight has a mask already.
MARK = "_chtconv_topology"


class LinkPrediction(NamedTuple):
    """How links are scored: the predictor, the graph, and whether the arithmetic is exact."""

    predictor: str
    graph: str
    exact: bool


class Topology:
    """The evolving topology of a model; made by :func:`chtconv.sparsify`.

    Attributes:
        step_count: optimizer steps since the start.
        evolutions: evolutions since the start.
    """

    def __init__(
        self,
        optimizers: list[Optimizer],
        layers: list[SparseLayer],
        method: Method,
        prediction: LinkPrediction,
        schedule: Schedule,
        seed: int,
    ) -> None:
        self.step_count = 0
        self.evolutions = 0
        self.schedule = schedule
        self._optimizers = optimizers
        self._layers = layers
        self._method = method
        self._prediction = prediction
        self._seed = seed
        self._record = Record()
        self._unchecked = False
        self._stepping = False
        self._handles: list[RemovableHandle] = []
        self._register_hooks()
        self.enforce()

    @property
    def masks(self) -> dict[str, Tensor]:
        """The active links: qualified parameter name -> bool tensor of the weight's shape."""
        return {layer.name: layer.mask for layer in self._layers}

    @property
    def records(self) -> list[dict[str, Any]]:
        """What every evolution did to every layer so far, in order; see :mod:`chtconv.record`."""
        return [dict(row) for row in self._record.rows()]

    def stats(self) -> dict[str, Any]:
        """Density, links, ITOP and the like of every layer (``"layers"``) and of all together."""
        by_layer = {layer.name: layer_stats(layer) for layer in self._layers}
        for row in self._record.last():
            by_layer[row["layer"]]["overlap"] = row["overlap"]
        return overall_stats(by_layer) | {
            "evolutions": self.evolutions, "step": self.step_count, "layers": by_layer,
        }  # fmt: skip

    def step(self) -> None:
        """Counts an optimizer step, and evolves when it is time.

        The optimizer's hook calls this; call it by hand only where no hook runs, as in the replay of a CUDA graph.
        """
        self.step_count += 1
        if self.schedule.evolves_at(self.step_count):
            self.evolve()

    @torch.no_grad()
    def evolve(self) -> None:
        """One evolution of all layers now: removal, link prediction, regrowth. Nothing for a static topology.

        The fraction removed is that of the schedule at this step: none once a cosine has ended.

        Raises:
            ConfigurationError: link prediction needs the input size of a layer that was not called yet.
        """
        if self._method.regrowth is None:
            return
        self._check_loaded()
        if self._method.uses_scores:
            for layer in self._layers:
                layer.geometry()
        for layer in self._layers:
            self._evolve_layer(layer)
        self.evolutions += 1

    def _evolve_layer(self, layer: SparseLayer) -> None:
        weight = layer.weight
        layer.bits = matching(layer.bits, weight)
        evolved = evolve(
            weight.detach().flatten(1),
            layer.mask.flatten(1),
            method=self._method,
            links=layer.links,
            zeta=self.schedule.zeta_at(self.step_count),
            link_scores=lambda mask_OI: layer.link_scores(mask_OI, *self._prediction),
            generator=generator(self._seed, "evolution", self.evolutions, layer.seed_name, device=weight.device),
        )
        new_mask = evolved.mask.view(weight.shape)
        layer.bits = bits_of(new_mask, weight)
        layer.explored = layer.explored.to(weight.device) | new_mask
        self._enforce_layer(layer)
        self._record.add(self.evolutions, self.step_count, layer, evolved)

    def _enforce_layer(self, layer: SparseLayer) -> None:
        """Puts the mask into force: weights to zero, gradients to zero, optimizer state to that of a fresh start."""
        weight = layer.weight
        layer.bits = matching(layer.bits, weight)
        apply_bits(weight.detach(), layer.bits)
        layer.mask_gradient()
        for optimizer in self._optimizers:
            reset_off_mask(optimizer, weight, layer.bits)

    def _register_hooks(self) -> None:
        """The optimizers own the topology through their hooks; the model does not, see :class:`WeakHook`."""
        for layer in self._layers:
            module = layer.module
            mask_gradient, after_load = WeakHook(layer.mask_gradient), WeakHook(self._after_load)
            setattr(module, MARK, after_load)
            layer.handles += [
                layer.weight.register_post_accumulate_grad_hook(mask_gradient),
                module.register_load_state_dict_post_hook(after_load),  # type: ignore[no-untyped-call]
            ]
            if self._method.uses_scores:
                layer.observe_input_size()
        for optimizer in self._optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_load_state_dict_post_hook(self._after_load),
            ]
        self._handles.append(self._optimizers[-1].register_step_post_hook(self._after_step))

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._check_loaded()
        self._mask_gradients()
        self._stepping |= optimizer is self._optimizers[-1]
        # A closure computes gradients after this hook, and may write them by hand.
        own, *rest = args
        if rest and rest[0] is not None:
            rest[0] = self._masking(rest[0])
        elif kwargs.get("closure") is not None:
            kwargs = kwargs | {"closure": self._masking(kwargs["closure"])}
        return (own, *rest), kwargs

    def _masking(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def masked() -> Any:
            loss = closure()
            self._mask_gradients()
            return loss

        return masked

    def _mask_gradients(self) -> None:
        for layer in self._layers:
            layer.mask_gradient()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # A subclass that calls the step of its parent runs the hooks twice.
        if not self._stepping:
            return
        self._stepping = False
        # A fused optimizer skips a step with infinite gradients by itself, under a gradient scaler.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self.step()

    def _after_load(self, *_: Any) -> None:
        self._unchecked = True

    def _check_loaded(self) -> None:
        """After model or optimizer state was loaded: weights must fit the masks, state is made to."""
        if not self._unchecked:
            return
        for layer in self._layers:
            layer.bits = matching(layer.bits, layer.weight)
            if not is_zero_off_mask(layer.weight, layer.bits):
                raise ConfigurationError(
                    f"layer {layer.name}: the weights that were loaded are not zero off the mask; load the state of "
                    "their topology too (topology.load_state_dict), or call topology.enforce() to cut them to this one."
                )
        self.enforce()

    def enforce(self) -> None:
        """Cuts weights, gradients and optimizer state to the masks, after something else wrote into them."""
        for layer in self._layers:
            self._enforce_layer(layer)
        self._unchecked = False

    def state_dict(self) -> dict[str, Any]:
        """Masks, counters and record: tensors and plain Python, for ``torch.save`` and ``weights_only=True``."""
        return {
            "step_count": self.step_count,
            "evolutions": self.evolutions,
            "masks": self.masks,
            "explored": {layer.name: layer.explored.clone() for layer in self._layers},
            "records": self.records,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state; in any order with the states of model and optimizer.

        Raises:
            ConfigurationError: masks of other layers, shapes or numbers of links.
        """
        names = canonical_names(state["masks"])
        masks, explored = ({names[key]: value for key, value in state[part].items()} for part in ("masks", "explored"))
        if set(masks) != {layer.seed_name for layer in self._layers}:
            raise ConfigurationError(
                f"the state holds masks of {sorted(masks)}; "
                f"the sparse layers are {sorted(layer.seed_name for layer in self._layers)}."
            )
        for layer in self._layers:
            _check_mask(layer, masks[layer.seed_name])
        for layer in self._layers:
            layer.bits = bits_of(masks[layer.seed_name], layer.weight)
            layer.explored.copy_(explored[layer.seed_name])
        self.step_count, self.evolutions = int(state["step_count"]), int(state["evolutions"])
        self._record = Record(state["records"])
        self._unchecked = True

    def detach(self) -> None:
        """Removes every hook: the model stays as it is, plain and sparse, and trains densely from here."""
        for layer in self._layers:
            for handle in layer.handles:
                handle.remove()
            layer.module.__dict__.pop(MARK, None)
            layer.module.__dict__.pop("_chtconv_input_size", None)
        for handle in self._handles:
            handle.remove()


def _check_mask(layer: SparseLayer, mask: Tensor) -> None:
    if mask.shape != layer.weight.shape or mask.dtype != torch.bool:
        raise ConfigurationError(
            f"layer {layer.name}: the mask to load is {mask.dtype} of shape {list(mask.shape)}; "
            f"accepted is torch.bool of shape {list(layer.weight.shape)}."
        )
    links = mask.flatten(1).sum(1)
    if not bool((links == layer.links).all()):
        raise ConfigurationError(
            f"layer {layer.name}: the mask to load has {int(links.min())} to {int(links.max())} links a kernel; "
            f"accepted are {layer.links}, as sparsify was told."
        )
