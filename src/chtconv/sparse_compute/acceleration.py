"""Steps of a sparse model that take less time than dense ones, on CPUs."""

import weakref
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple, TypeVar

from torch import nn

from chtconv.enforcement.sparse_layer import SparseLayer
from chtconv.errors import ConfigurationError, check_name
from chtconv.sparse_compute.computation import Computation
from chtconv.sparse_compute.layers import put, refusal, take_back
from chtconv.sparse_compute.library import library
from chtconv.sparse_compute.tuning import Tuner
from chtconv.topology import Topology

BACKENDS: Final = ("auto", "sparse", "dense")
M = TypeVar("M", bound=nn.Module)


class Backend(NamedTuple):
    """How a layer is computed.

    Attributes:
        kind: "sparse" or "dense".
        reason: why; empty where it was asked for.
        sparse_seconds: of all its passes, as measured; None where it was not.
        dense_seconds: the same, of the dense layer.
    """

    kind: Literal["sparse", "dense"]
    reason: str
    sparse_seconds: float | None = None
    dense_seconds: float | None = None


def accelerate(model: M, topology: Topology, *, backend: str = "auto") -> M:
    """Computes the sparse 2-D convolutions of a model with kernels that skip what is off the mask, in place.

    The class of these modules is replaced by one of the same name; parameters, hooks and state dict stay. Between two
    of them activations travel in a layout of their own, as tensors that look ordinary to everything else. Whatever the
    kernels cannot compute stays dense: other devices and types than float32 and float64, padding modes other than
    zeros, weights that are sharded or computed from others, transforms such as ``torch.func``, exported and traced
    models. Copies of the model are plain and dense. Evolution, ``topology.detach()`` and states that are loaded are
    followed. Gradients of gradients are right, and computed densely.

    Args:
        model: the model that was made sparse, or a wrapper of it.
        topology: what :func:`chtconv.sparsify` returned.
        backend: ``"sparse"``: all layers that can be. ``"auto"``: those in which it saves time, measured in the first
            step on its own input, and again where the density or the size of the input has changed by a third.
            ``"dense"``: none, which takes an earlier call back.

    Returns:
        The model.

    Raises:
        ConfigurationError: an unknown backend, no topology, that of another model, or one that was detached.

    Example:
        >>> import torch, chtconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters()), sparsity=0.9)
        >>> model = chtconv.accelerate(model, topology)
        >>> model(torch.randn(16, 3, 8, 8)).shape
        torch.Size([16, 8, 4, 4])
    """
    check_name("backend", backend, BACKENDS)
    if not isinstance(topology, Topology):
        raise ConfigurationError(f"topology={topology!r}: accepted is what chtconv.sparsify returned.")
    topology.accelerate(model, None if backend == "dense" else lambda layers: Acceleration(layers, backend))
    return model


class Acceleration:
    """The accelerated layers of one topology.

    Attributes:
        backend: "auto" or "sparse".
        tuner: chooses between sparse and dense; None for "sparse".
    """

    def __init__(self, layers: Sequence[SparseLayer], backend: str) -> None:
        self.backend = backend
        self.tuner = Tuner() if backend == "auto" else None
        self._evolutions = 0
        self._refused: dict[str, str] = {}
        self._computations: dict[str, Computation] = {}
        self._modules: list[weakref.ref[nn.Module]] = []
        kernels = library()
        for layer in layers:
            name = layer.name
            reason = refusal(layer.module) if kernels else "there are no compiled kernels"
            if reason:
                self._refused[name] = reason
                continue
            self._computations[name] = computation = Computation(layer, self.tuner)
            put(layer.module, computation)
            self._modules.append(weakref.ref(layer.module))

    def stepped(self, evolutions: int) -> None:
        """After every optimizer step, and so many evolutions."""
        if self.tuner is not None and (self.tuner.stepped() or evolutions != self._evolutions):
            self._evolutions = evolutions
            for computation in self._computations.values():
                computation.settle(self.tuner)

    def state_dict(self) -> dict[str, Any]:
        """What was chosen: plain Python."""
        return {} if self.tuner is None else self.tuner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Chooses as before, without measuring again."""
        if self.tuner is not None and state:
            self.tuner.load_state_dict(state)

    def take_back(self) -> None:
        """Makes all layers what they were."""
        for reference in self._modules:
            module = reference()
            if module is not None:
                take_back(module)

    def backends(self) -> dict[str, Backend]:
        """How each layer is computed."""
        return {name: Backend("dense", reason) for name, reason in self._refused.items()} | {
            name: self._backend(name, computation) for name, computation in self._computations.items()
        }

    def _backend(self, name: str, computation: Computation) -> Backend:
        if computation.obstacle:
            return Backend("dense", computation.obstacle)
        if self.tuner is None:
            return Backend("sparse", "")
        case = self.tuner.last(name)
        if case is None:
            return Backend("dense", "not measured yet")
        sparse, found = self.tuner.choices[name, case], self.tuner.measured[name, case]
        return Backend("sparse" if sparse else "dense", "measured", found.sparse, found.dense)


def backends(topology: Topology) -> dict[str, Backend]:
    """How each sparse layer of a topology is computed, by the name of its weight, and why.

    Example:
        >>> import torch, chtconv
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv1d(8, 8, 3))
        >>> topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters()))
        >>> backends(topology)["0.weight"]
        Backend(kind='dense', reason='not accelerated', sparse_seconds=None, dense_seconds=None)
    """
    acceleration = topology.acceleration
    if not isinstance(acceleration, Acceleration):
        return {name: Backend("dense", "not accelerated") for name in topology.masks}
    found = acceleration.backends()
    return {name: found[name] for name in topology.masks}
