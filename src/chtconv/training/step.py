"""One training step, and how a GPU repeats it without the host: as a CUDA graph.

A step launches hundreds of kernels from Python, which may take longer than a GPU takes to compute them. A graph is all
of them, recorded once and launched at once. It runs no Python, so that what Python decides must not change from step
to step, or must be in memory that the graph reads: the draw of the batch, the learning rate and the masks are. Steps
in which Python has to decide something (those that evolve the topology or keep the gradients of disabled links, and
the batch at the end of an epoch, which is smaller) run eagerly in between, on the same weights.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from chtconv.data.batches import Batches, Draw
from chtconv.topology import Topology
from chtconv.training.device import autocast

# Eager steps before the first recording: libraries make their workspaces, and the optimizer its state, in the first.
WARM_UP: Final = 3


class Result(NamedTuple):
    """What a step computed, before it changed the weights.

    Attributes:
        loss: mean cross-entropy in nats.
        logits: ``[B, classes]``.
        labels: int64 ``[B]``.
    """

    loss: Tensor
    logits: Tensor
    labels: Tensor


# Runs a step without computing anything; returns what it will have computed, and what computes it, again and again.
Recorder: TypeAlias = Callable[[Callable[[], Result]], tuple[Result, Callable[[], None]]]


def cuda_graph(action: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
    """The :data:`Recorder` of a GPU: a CUDA graph of ``action`` in the current stream, which must be no default one."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = action()
    return result, graph.replay


class Step:
    """The training steps of a run: :meth:`forward`, a look at its result, :meth:`backward`, :meth:`update`.

    A replay does everything at once, in :meth:`forward`.

    Args:
        model: in training mode.
        optimizer: of its parameters; its learning rate is set in every step, in place where it is a tensor.
        topology: the links of its convolutions; None for a dense network.
        batches: makes the batches.
        device: where all of these are.
        precision: of the forward pass, see :func:`chtconv.training.device.autocast`.
        recorder: records the step; None runs all steps eagerly. The learning rate must be a tensor for it.

    Attributes:
        rate: learning rate of the latest step.
        replays: steps so far that ran no Python.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None,
        batches: Batches,
        device: torch.device,
        precision: str,
        recorder: Recorder | None = None,
    ) -> None:
        self.rate = 0.0
        self.replays = 0
        self._model = model
        self._optimizer = optimizer
        self._topology = topology
        self._batches = batches
        self._device = device
        self._precision = precision
        self._recorder = recorder
        self._eager = 0
        self._moved = False
        self._pending: Result | None = None
        self._counted = False
        self._recorded: _Recorded | None = None

    @property
    def evolves(self) -> bool:
        """Whether the topology evolves at the end of the next step."""
        topology = self._topology
        return topology is not None and topology.schedule.evolves_at(topology.step_count + 1)

    def forward(self, draw: Draw, rate: float) -> Result:
        """The forward pass of a batch. Its tensors are overwritten by the next step.

        Args:
            draw: of the batch.
            rate: learning rate of the step.
        """
        self._set_rate(rate)
        if not self._may_replay(draw):
            self._eager += 1
            self._moved = True
            self._pending = self._forward(draw)
            return self._pending
        self._pending, self._counted = None, False
        if self._moved and self._recorded is not None and self._recorded.addresses != self._addresses():
            self._recorded = None
        if self._recorded is None:
            self._recorded = self._record(draw)
            # The optimizer's hook has counted the step, as in every step that runs Python.
            self._counted = True
        self._moved = False
        self._recorded.run(draw)
        self.replays += 1
        return self._recorded.result

    def backward(self) -> None:
        """The gradients of the batch."""
        if self._pending is not None:
            self._backward(self._pending.loss)

    def update(self) -> None:
        """The optimizer's step, with the evolution where it is time for one."""
        if self._pending is not None:
            self._pending = None
            self._optimizer.step()
        elif self._topology is not None and not self._counted:
            self._topology.step()

    def forget(self) -> None:
        """After a state was loaded, which moves tensors and has to be checked: warms up and records anew."""
        self._recorded, self._eager = None, 0

    def _set_rate(self, rate: float) -> None:
        self.rate = rate
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _may_replay(self, draw: Draw) -> bool:
        whole = len(draw.chosen) == self._batches.batch_size
        special = self._topology is not None and (self.evolves or self._topology.keeps_gradients)
        return self._recorder is not None and self._eager >= WARM_UP and whole and not special

    def _forward(self, draw: Draw) -> Result:
        images, labels = self._batches.make(draw)
        with autocast(self._device, self._precision):
            logits = self._model(images)
        return Result(functional.cross_entropy(logits.float(), labels), logits, labels)

    def _backward(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)

    def _record(self, draw: Draw) -> "_Recorded":
        assert self._recorder is not None
        assert all(isinstance(group["lr"], Tensor) for group in self._optimizer.param_groups)
        inputs = Draw(*(each.clone() for each in draw))

        def action() -> Result:
            result = self._forward(inputs)
            self._backward(result.loss)
            self._optimizer.step()
            return Result(*(each.detach() for each in result))

        with _capturable(self._optimizer):
            result, replay = self._recorder(action)
        return _Recorded(inputs, result, replay, self._addresses())

    def _addresses(self) -> tuple[int, ...]:
        """Where everything lies that a recorded step reads and writes in place: it is valid as long as that stays."""
        optimizer = self._optimizer
        tensors: list[Any] = [*self._model.parameters(), *self._model.buffers()]
        tensors += [group["lr"] for group in optimizer.param_groups]
        tensors += [value for state in optimizer.state.values() for value in state.values()]
        tensors += self._topology.mask_bits if self._topology is not None else []
        return tuple(each.data_ptr() for each in tensors if isinstance(each, Tensor))


class _Recorded(NamedTuple):
    """A step that was recorded, with the memory that it reads its draw from and writes its result to."""

    inputs: Draw
    result: Result
    replay: Callable[[], None]
    addresses: tuple[int, ...]

    def run(self, draw: Draw) -> None:
        for static, value in zip(self.inputs, draw, strict=True):
            static.copy_(value)
        self.replay()


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Adam wants to be told; fused, it computes the same either way, and eager steps need no warning."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value
