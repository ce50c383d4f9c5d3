"""The masks of a model in force.

Parameters stay ordinary dense parameters that are exactly zero off the mask, so that state dicts, schedulers,
clipping and third-party code see a plain model. Gradients are masked as they are accumulated, which is before
anything else can see them; the optimizer's hooks count steps and let the topology evolve.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from chtconv.enforcement.attachment import attach, detach
from chtconv.enforcement.averages import Averages
from chtconv.enforcement.distributed import Ranks, agree, average_gradients, verify
from chtconv.enforcement.loading import check_fits, check_state, check_uncut, count_set
from chtconv.enforcement.optimizer_state import reset_off_mask
from chtconv.enforcement.sharding import is_sharded, local_state
from chtconv.enforcement.sparse_layer import SparseLayer
from chtconv.enforcement.stepping import Stepping
from chtconv.errors import ConfigurationError
from chtconv.layers.chains import Link
from chtconv.layers.consecutive import consecutive_layers
from chtconv.layers.matrix import from_matrix
from chtconv.methods.schedule import Schedule
from chtconv.randomness import generator
from chtconv.topology.evolution import Evolved, evolve
from chtconv.topology.metrics import FROM_RECORD, anp, layer_stats, overall_evolution, overall_stats
from chtconv.topology.record import Record


class Acceleration(Protocol):
    """What computes the layers in a way of its own, as far as the topology has to know of it."""

    def stepped(self, evolutions: int) -> None:
        """After every optimizer step, and so many evolutions."""

    def take_back(self) -> None:
        """Makes all layers what they were."""


def _takes_turn(layer: SparseLayer) -> bool:
    """Whether a layer evolves when it is time: it is trained, and has the gradients that its method goes by.

    One of several optimizers may find the layers of the others frozen, as in adversarial training.
    """
    has_gradients = layer.took_part or not layer.settings.method.needs_dense_gradients
    return layer.trained or (layer.weight.requires_grad and has_gradients)


class Topology:
    """The evolving topology of a model; made by :func:`chtconv.sparsify`.

    A copy of it, by ``copy``, ``deepcopy`` or pickle, is None: what ``torch.save`` and checkpoints are to hold is
    :meth:`state_dict`.

    Attributes:
        step_count: optimizer steps since the start.
        evolutions: evolutions since the start.
        schedule: when the topology evolves, and the drop fraction.
        acceleration: what :func:`chtconv.accelerate` made of the layers; None where they are plain.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        layers: list[SparseLayer],
        schedule: Schedule,
        seed: int,
        chains: Sequence[Link] | None = None,
        ranks: Ranks | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.step_count = 0
        self.evolutions = 0
        self.schedule = schedule
        # Weakly: a topology that is kept for its record keeps no model alive.
        self._model = weakref.ref(model)
        self._optimizers = optimizers
        self._layers = layers
        self._seed = seed
        self._chains = chains
        self._ranks = ranks or Ranks()
        self._record = Record()
        self._unchecked = False
        self._callbacks: OrderedDict[int, Callable[[Topology], None]] = OrderedDict()
        self._averages = Averages(layers)
        self.acceleration: Acceleration | None = None
        # How many weights, and entries of optimizer state, a state that was loaded says are set.
        self._saved: dict[str, dict[str, int]] = {}
        self._detached = self._evolving = False
        self._stepping = Stepping(
            optimizers,
            layers,
            self._ranks,
            begin=self._check_loaded,
            free=self._enforce_layers,
            count=self.step,
            loaded=self._after_load,
        )
        for layer in layers:
            attach(layer, self._after_load)
        self._arm()
        if state is not None:
            try:
                self.load_state_dict(state)
            except Exception:
                self.detach()
                raise
        self.enforce()

    @property
    def masks(self) -> dict[str, Tensor]:
        """The active links: qualified parameter name -> bool tensor of the weight's shape."""
        return {layer.name: layer.mask for layer in self._layers}

    @property
    def records(self) -> list[dict[str, Any]]:
        """What every evolution did to every layer so far, in order; see :mod:`chtconv.topology.record`."""
        return [dict(row) for row in self._record.rows()]

    @property
    def mask_bits(self) -> list[Tensor]:
        """The masks as every step reads them (:mod:`chtconv.enforcement.bits`); evolution writes into these tensors."""
        return [layer.bits for layer in self._layers]

    @property
    def keeps_gradients(self) -> bool:
        """Whether the next backward pass keeps the gradients of disabled links, for methods that go by them."""
        return any(layer.dense_gradient.capturing for layer in self._layers)

    def stats(self) -> dict[str, Any]:
        """Numbers of every layer (``"layers"``) and of all together; see :mod:`chtconv.topology.metrics`.

        Those of the latest evolution, such as ``overlap``, are as in :mod:`chtconv.topology.record`; None before the
        first one, and for layers that had no part in it.
        """
        latest = self._record.last()
        rows = {row["layer"]: row for row in latest}
        by_layer = {
            layer.name: layer_stats(layer, self.step_count)
            | {key: rows.get(layer.name, {}).get(key) for key in FROM_RECORD}
            for layer in self._layers
        }
        return (
            overall_stats(by_layer)
            | overall_evolution(latest)
            | {
                "anp": anp(self._layers, self._known_chains()),
                "evolutions": self.evolutions,
                "step": self.step_count,
                "layers": by_layer,
            }
        )

    def on_evolution(self, callback: Callable[["Topology"], None]) -> RemovableHandle:
        """Calls ``callback(topology)`` after every evolution, until ``remove()`` of the handle is called."""
        handle = RemovableHandle(self._callbacks)
        self._callbacks[handle.id] = callback
        return handle

    def follow(self, copy: nn.Module) -> RemovableHandle:
        """Keeps a copy of the model as sparse as the model itself: an average (EMA, SWA) of its weights.

        Links come and go, so that an average over time has more and more of them. From now on the copy is masked
        after each evolution: it has exactly the links of the model, of which those that came lately are small.

        Args:
            copy: a model with parameters of the same names, such as ``torch.optim.swa_utils.AveragedModel``; it is
                masked now, and is not kept alive.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            ConfigurationError: the copy lacks a sparse layer, or has it in another shape, or the topology was detached.

        Example:
            >>> import chtconv
            >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
            >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
            >>> topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters()), sparsity=0.9, method="set")
            >>> average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
            >>> handle = topology.follow(average)
        """
        self._check_in_force()
        return self._averages.add(copy)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Its hooks belong to one model and optimizer. None, so that a model that holds its topology, as modules of
        # Lightning do, can be copied and pickled; the copy is plain.
        return type(None), ()

    def step(self) -> None:
        """Counts an optimizer step, and evolves when it is time.

        The optimizer's hook calls this; call it by hand only where no hook runs, as in the replay of a CUDA graph.
        Masks change in place, so that the graph stays valid.

        Raises:
            ConfigurationError: as :meth:`evolve`, where it is time to evolve.
        """
        self.step_count += 1
        for layer in self._layers:
            layer.count_step()
        if self.schedule.evolves_at(self.step_count):
            self._evolve([layer for layer in self._layers if _takes_turn(layer)])
        for layer in self._layers:
            layer.trained = False
        if self.acceleration is not None:
            self.acceleration.stepped(self.evolutions)
        if not self._detached:
            self._arm()

    def accelerate(self, model: nn.Module, make: Callable[[Sequence[SparseLayer]], Acceleration] | None) -> None:
        """Replaces the acceleration of the layers; see :func:`chtconv.accelerate`, which calls this.

        Args:
            model: that has the layers.
            make: makes the new one; None for none.

        Raises:
            ConfigurationError: the model has none of the layers or not all of them, or the topology was detached.
        """
        self._check_in_force()
        missing = self._missing(model)
        if missing:
            raise ConfigurationError(
                f"model={type(model).__name__}(...) does not have layer {missing} of the topology; accepted is the "
                "model that sparsify was given. A copy of it has no topology."
            )
        if self.acceleration is not None:
            self.acceleration.take_back()
        self.acceleration = None if make is None else make(self._layers)

    def capture_gradients(self) -> None:
        """Keeps the gradients of disabled links in the next backward pass, for an evolution that is called by hand.

        They are there until the optimizer steps, so the order is ``capture_gradients()``, the backward pass,
        :meth:`evolve`, and then the step. Only methods that go by gradients (RigL, SNFS, GraNet, ``cht_gradient``)
        need it, and only then: evolutions at their own time do it by themselves.
        """
        for layer in self._layers:
            layer.capture(layer.settings.method.needs_dense_gradients)

    def evolve(self) -> None:
        """One evolution of all layers now: removal, link prediction, regrowth. Nothing for a static topology.

        The fraction removed is that of the schedule at this step: none once a cosine has ended.

        Raises:
            ConfigurationError: link prediction needs the input size of a layer that was not called yet, regrowth by
                gradient a gradient that was not kept, or the topology was detached.
        """
        # A layer that was frozen since stays as it is.
        layers = [layer for layer in self._layers if layer.weight.requires_grad]
        going = [layer for layer in layers if layer.settings.method.needs_dense_gradients]
        if going and not any(layer.dense_gradient.is_there for layer in going):
            raise self._no_gradients(going[0])
        self._evolve(layers)

    @torch.no_grad()
    def _evolve(self, layers: list[SparseLayer]) -> None:
        self._check_in_force()
        evolving = [layer for layer in layers if layer.settings.method.evolves]
        if not evolving:
            return
        self._check_loaded()
        agree(self._ranks, evolving, self.step_count, self.evolutions)
        self._check_ready(evolving)
        average_gradients(self._ranks, evolving)
        results = evolve(
            evolving,
            zeta=self.schedule.zeta_at(self.step_count),
            progress=self.schedule.progress(self.step_count),
            generator_of=self._generator_of,
            chains=self._chains or (),
            ranks=self._ranks,
        )
        verify(
            self._ranks,
            [each.layer.name for each in results],
            [(each.new, each.removed, each.mask) for each in results],
            f"masks in evolution {self.evolutions}",
        )
        for evolved in results:
            self._put_into_force(evolved)
        self.evolutions += 1
        self._averages.mask()
        self._evolving = True
        try:
            for callback in list(self._callbacks.values()):
                callback(self)
        finally:
            self._evolving = False

    def _check_in_force(self) -> None:
        if self._detached:
            raise ConfigurationError("the topology was detached; call sparsify again to go on, with its state_dict().")

    def _check_ready(self, layers: list[SparseLayer]) -> None:
        """All that an evolution needs is there, before anything is changed."""
        model = self._model()
        missing = None if model is None else self._missing(model)
        if missing:
            raise ConfigurationError(
                f"layer {missing}: the model does not have it any more, and what was put in its place has no mask; "
                "call detach() on the topology, then sparsify again with an optimizer of all layers."
            )
        for layer in layers:
            method = layer.settings.method
            if method.uses_scores:
                layer.geometry()
            if method.needs_dense_gradients and not layer.dense_gradient.is_known:
                raise self._no_gradients(layer)

    @staticmethod
    def _no_gradients(layer: SparseLayer) -> ConfigurationError:
        return ConfigurationError(
            f"layer {layer.name}: regrowth {layer.settings.method.regrowth!r} needs the gradients of disabled links, "
            "and none are kept; before an evolution by hand call topology.capture_gradients(), run the backward pass, "
            "and let the optimizer step only after the evolution."
        )

    def _missing(self, model: nn.Module) -> str | None:
        """The first of the layers that a model does not have; None where it has all of them."""
        modules = set(model.modules())
        return next((layer.name for layer in self._layers if layer.module not in modules), None)

    def _generator_of(self, layer: SparseLayer) -> torch.Generator:
        return generator(self._seed, "evolution", self.evolutions, layer.seed_name, device=layer.weight.device)

    def _put_into_force(self, evolved: Evolved) -> None:
        layer = evolved.layer
        mask = from_matrix(evolved.mask, layer.module)
        layer.put_mask(mask)
        layer.links = evolved.links
        # In the memory order of the mask.
        layer.explored = mask | layer.explored.to(mask.device)
        self._enforce_layer(layer)
        brought, layer.newest = layer.newest.to(mask.device), evolved.new
        self._record.add(self.evolutions, self.step_count, evolved, brought, layer.explored)
        stop = layer.settings.method.early_stop
        if stop is not None and not layer.stopped:
            removed = evolved.removed
            layer.stopped = bool((removed & evolved.mask).sum() >= stop * removed.sum().clamp_min(1))

    def _known_chains(self) -> Sequence[Link]:
        """Which layers feed which, found once; none where the model is gone or cannot be traced."""
        model = self._model()
        if self._chains is None and model is not None:
            try:
                self._chains = consecutive_layers(model, [layer.module_name for layer in self._layers])
            except ConfigurationError:
                self._chains = ()
        return self._chains or ()

    def _enforce_layer(self, layer: SparseLayer) -> None:
        """Puts the mask into force: weights to zero, gradients to zero, optimizer state to that of a fresh start."""
        layer.mask_weight()
        self._enforce_beside(layer)

    def _enforce_beside(self, layer: SparseLayer) -> None:
        """What goes with a weight that is zero off the mask."""
        layer.mask_gradient()
        for optimizer in self._optimizers:
            reset_off_mask(*local_state(optimizer, layer.weight), layer.bits)

    def _arm(self) -> None:
        """Dense gradients are kept on the steps before an evolution, and on all steps where they are averaged."""
        evolves_next = self.schedule.evolves_at(self.step_count + 1)
        for layer in self._layers:
            method = layer.settings.method
            layer.capture(method.needs_dense_gradients and (evolves_next or method.worth == "momentum"))

    def _enforce_layers(self, layers: Sequence[SparseLayer]) -> None:
        for layer in layers:
            self._enforce_layer(layer)

    def _after_load(self, *_: Any) -> None:
        self._unchecked = True
        for layer in self._layers:
            layer.version += 1

    def _check_loaded(self) -> None:
        """After model or optimizer state was loaded: weights must fit the masks, state is made to."""
        if not self._unchecked:
            return
        check_fits(self._layers, bool(self._saved))
        check_uncut(self._layers, self._optimizers, self._saved)
        # Not the weights, which fit: another loss may still go back through them.
        for layer in self._layers:
            self._enforce_beside(layer)
        self._enforced()

    def enforce(self) -> None:
        """Cuts weights, gradients and optimizer state to the masks, after something else wrote into them."""
        self._enforce_layers(self._layers)
        self._enforced()

    def _enforced(self) -> None:
        for layer in self._layers:
            layer.version += 1
        self._averages.mask()
        self._unchecked, self._saved = False, {}

    def state_dict(self) -> dict[str, Any]:
        """Masks, counters and record: tensors and plain Python, for ``torch.save`` and ``weights_only=True``.

        The same on every rank, whatever the number of ranks that goes on from it, but for the sizes of inputs, which
        are those that a rank saw last. On several ranks, call it on all of them: averages of gradients (SNFS) are put
        together.
        """
        if self.step_count:
            average_gradients(self._ranks, [each for each in self._layers if each.settings.method.worth == "momentum"])
        return {
            "step_count": self.step_count,
            "evolutions": self.evolutions,
            "masks": self.masks,
            "layers": {layer.name: layer.state_dict() for layer in self._layers},
            "set": {
                layer.name: count_set(layer, self._optimizers) for layer in self._layers if not is_sharded(layer.weight)
            },
            "records": self.records,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state; in any order with the states of model and optimizer.

        Raises:
            ConfigurationError: masks of other layers, shapes or numbers of links, or a part that is missing; the
                topology is then as it was.
        """
        checked = check_state(state, self._layers)
        for layer in self._layers:
            layer.load_state_dict(checked.masks[layer.seed_name], checked.layers[layer.seed_name])
        self.step_count, self.evolutions = checked.step_count, checked.evolutions
        self._record, self._saved = Record(checked.records), checked.counts
        self._unchecked = True
        self._arm()

    def detach(self) -> None:
        """Removes every hook: the model stays as it is, plain and sparse, and trains densely from here."""
        self._detached = True
        if self.acceleration is not None:
            self.acceleration.take_back()
            self.acceleration = None
        for layer in self._layers:
            detach(layer)
        # A callback of an evolution may detach.
        self._stepping.end(keep=self._evolving)
        self._averages.clear()
