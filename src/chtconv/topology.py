"""The masks of a model in force: two lines make any PyTorch model sparse and let its topology evolve.

Parameters stay ordinary dense parameters that are exactly zero off the mask, so that state dicts, schedulers,
clipping and third-party code see a plain model. Gradients are masked as they are accumulated, which is before
anything else can see them; the optimizer's hooks count steps and let the topology evolve.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from chtconv.enforcement import apply_bits, bits_of, is_zero_off_mask, matching
from chtconv.errors import ConfigurationError, unknown
from chtconv.evolution import evolve
from chtconv.initial import links_per_kernel, random_mask
from chtconv.layers import Convolution, SparseLayer, check_scorable, find_layers, weight_of
from chtconv.methods import Method, find_method
from chtconv.metrics import layer_stats, overall_stats
from chtconv.optimizer_state import check_supported, group_of, reset_off_mask
from chtconv.predictors import find_predictor
from chtconv.randomness import canonical_name, generator
from chtconv.record import Record
from chtconv.schedule import Schedule
from chtconv.scores.api import GRAPHS

_MARK = "_chtconv_topology"


def sparsify(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    sparsity: float = 0.7,
    method: str = "chts",
    predictor: str = "ch3_l3n",
    graph: str = "kernel",
    zeta: float = 0.3,
    zeta_schedule: str | None = None,
    interval: int = 100,
    stop: int | None = None,
    total_steps: int | None = None,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> "Topology":
    """Makes the convolutions of a model sparse and lets their topology evolve as it trains.

    The model, the optimizer and the training loop stay as they are: masks are enforced by hooks, and evolution runs
    by itself after every ``interval`` optimizer steps.

    Args:
        model: any model; its weights are set to zero off the masks, in place.
        optimizer: the optimizer of its weights, or several. A step is counted when the last of them has stepped.
        sparsity: share of disabled links of every kernel, in [0, 1).
        method: ``"static"``, ``"set"``, ``"cht"`` or ``"chts"``, see :data:`chtconv.methods.METHODS`.
        predictor: link predictor of CHT and CHTs, ``"ch3_l3n"`` or ``"ch2_l3n"``.
        graph: ``"kernel"``, the graph of the paper.
        zeta: fraction of the links of a kernel that an evolution removes and regrows, in (0, 1].
        zeta_schedule: ``"constant"`` or ``"cosine"`` (falling to 0 at ``stop``); by default cosine where the end is
            known from ``stop`` or ``total_steps``, else constant.
        interval: optimizer steps between two evolutions.
        stop: no evolution at this optimizer step or later; by default three quarters of ``total_steps``.
        total_steps: length of the training in optimizer steps, only used for ``stop``.
        layers: names of the convolutions to make sparse, with wildcards; all by default.
        seed: initial masks and evolution depend on this and nothing else that is random.

    Returns:
        The topology: masks, statistics, state, and ``detach()``.

    Raises:
        ConfigurationError: a value, layer, model or optimizer that cannot be used, with what would be accepted.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> topology = sparsify(model, optimizer, sparsity=0.9, interval=1)
        >>> model(torch.randn(2, 3, 4, 4)).sum().backward()
        >>> optimizer.step()
        >>> topology.evolutions, topology.stats()["links"]
        (1, 24)
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    if graph not in GRAPHS:
        raise unknown("graph", graph, GRAPHS)
    find_predictor(predictor)
    if stop is None and total_steps is not None:
        stop = total_steps * 3 // 4
    decay = zeta_schedule or ("constant" if stop is None else "cosine")
    schedule = Schedule(zeta, decay, interval, stop)
    chosen = find_method(method)
    sparse = _sparse_layers(model, optimizers, chosen, sparsity, layers, seed)
    return Topology(model, optimizers, sparse, chosen, predictor, schedule, seed)


def _sparse_layers(
    model: nn.Module,
    optimizers: list[Optimizer],
    method: Method,
    sparsity: float,
    patterns: Sequence[str] | None,
    seed: int,
) -> list[SparseLayer]:
    """Checks every layer before any is touched, then draws the initial masks."""
    modules = find_layers(model, patterns)
    owner: dict[nn.Parameter, str] = {}
    links = {}
    for name, module in modules.items():
        weight = weight_of(module, name)
        if hasattr(module, _MARK):
            raise ConfigurationError(f"layer {name} is sparse already; call detach() on its topology first.")
        if weight in owner:
            raise ConfigurationError(
                f"layers {owner[weight]} and {name} share a weight; leave both out with layers=[...]."
            )
        if not any(group_of(optimizer, weight) for optimizer in optimizers):
            raise ConfigurationError(f"layer {name}: no optimizer holds its weight; pass the one that trains it.")
        if method.uses_scores:
            check_scorable(name, module)
        owner[weight] = name
        links[name] = links_per_kernel(sparsity, weight[0].numel(), name)
    for each in optimizers:
        check_supported(each)
    return [_sparse_layer(name, module, links[name], seed) for name, module in modules.items()]


def _sparse_layer(name: str, module: Convolution, links: int, seed: int) -> SparseLayer:
    parameter = f"{name}.weight" if name else "weight"
    weight = weight_of(module, name)
    draw = generator(seed, "mask", canonical_name(parameter), device=weight.device)
    return SparseLayer(parameter, module, links, random_mask(len(weight), weight[0].numel(), links, draw))


class Topology:
    """The evolving topology of a model; made by :func:`sparsify`.

    Attributes:
        step_count: optimizer steps since the start.
        evolutions: evolutions since the start.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        layers: list[SparseLayer],
        method: Method,
        predictor: str,
        schedule: Schedule,
        seed: int,
    ) -> None:
        self.step_count = 0
        self.evolutions = 0
        self.schedule = schedule
        self._model = model
        self._optimizers = optimizers
        self._layers = layers
        self._method = method
        self._predictor = predictor
        self._seed = seed
        self._record = Record()
        self._unchecked = False
        self._handles: list[RemovableHandle] = []
        self._register_hooks()
        self._enforce()

    @property
    def masks(self) -> dict[str, Tensor]:
        """The active links: qualified parameter name -> bool tensor of the weight's shape."""
        return {layer.name: layer.mask for layer in self._layers}

    @property
    def records(self) -> list[dict[str, Any]]:
        """What every evolution did to every layer so far, in order; see :mod:`chtconv.record`."""
        return self._record.rows()

    @property
    def uses_scores(self) -> bool:
        """Whether evolution needs link prediction."""
        return self._method.uses_scores

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
        evolved = evolve(
            weight.detach().flatten(1),
            layer.mask.flatten(1),
            method=self._method,
            links=layer.links,
            zeta=self.schedule.zeta_at(self.step_count),
            link_scores=lambda mask_OI: layer.link_scores(mask_OI, self._predictor),
            generator=generator(
                self._seed, "evolution", self.evolutions, canonical_name(layer.name), device=weight.device
            ),
        )
        new_mask = evolved.mask.view(weight.shape)
        layer.bits = bits_of(new_mask, weight)
        layer.explored |= new_mask
        self._enforce_layer(layer)
        self._record.add(self.evolutions, self.step_count, layer, evolved)

    def _enforce(self) -> None:
        for layer in self._layers:
            self._enforce_layer(layer)

    def _enforce_layer(self, layer: SparseLayer) -> None:
        """Puts the mask into force: weights to zero, gradients to zero, optimizer state to that of a fresh start."""
        weight = layer.weight
        layer.bits = matching(layer.bits, weight)
        apply_bits(weight.detach(), layer.bits)
        _mask_gradient(layer)
        for optimizer in self._optimizers:
            reset_off_mask(optimizer, weight, layer.bits)

    def _register_hooks(self) -> None:
        for layer in self._layers:
            setattr(layer.module, _MARK, True)
            layer.handles.append(
                layer.weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, layer=layer: _mask_gradient(layer)
                )
            )
            layer.observe_input_size()
        for optimizer in self._optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_load_state_dict_post_hook(self._after_load),
            ]
        self._handles += [
            self._optimizers[-1].register_step_post_hook(self._after_step),
            self._model.register_load_state_dict_post_hook(self._after_load),  # type: ignore[no-untyped-call]
        ]

    def _before_step(self, *_: Any) -> None:
        self._check_loaded()
        # Gradients that did not come from backward, or were changed since, are masked here.
        for layer in self._layers:
            _mask_gradient(layer)

    def _after_step(self, *_: Any) -> None:
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
        self._enforce()
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
        masks, explored = state["masks"], state["explored"]
        if set(masks) != {layer.name for layer in self._layers}:
            raise ConfigurationError(
                f"the state holds masks of {sorted(masks)}; "
                f"the sparse layers are {sorted(layer.name for layer in self._layers)}."
            )
        for layer in self._layers:
            _check_mask(layer, masks[layer.name])
        for layer in self._layers:
            layer.bits = bits_of(masks[layer.name], layer.weight)
            layer.explored.copy_(explored[layer.name])
        self.step_count, self.evolutions = int(state["step_count"]), int(state["evolutions"])
        self._record = Record(state["records"])
        self._unchecked = True

    def detach(self) -> None:
        """Removes every hook: the model stays as it is, plain and sparse, and trains densely from here."""
        for layer in self._layers:
            for handle in layer.handles:
                handle.remove()
            layer.module.__dict__.pop(_MARK, None)
            layer.module.__dict__.pop("_chtconv_input_size", None)
        for handle in self._handles:
            handle.remove()


def _mask_gradient(layer: SparseLayer) -> None:
    gradient = layer.weight.grad
    if gradient is not None:
        layer.bits = matching(layer.bits, gradient)
        apply_bits(gradient, layer.bits)


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
