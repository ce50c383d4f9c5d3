"""Gradients of disabled links, for methods that go by them: kept before they are masked, only when somebody asks."""

import weakref

import torch
from torch import Tensor

from chtconv.enforcement.bits import accumulate, matching, rescaled, unless_zeroed
from chtconv.enforcement.sharding import is_sharded, local

# Of the exponential average of gradients, as Dettmers and Zettlemoyer (2019) take from their optimizer.
_MOMENTUM = 0.9


class DenseGradient:
    """The dense gradient of a layer's weight. Of a sharded weight, this rank's part of it.

    Its methods take the gradient of the weight as it is at that time, None where there is none.

    Attributes:
        capturing: whether gradients are kept as they come.
        settled: whether the optimizer of the layer has stepped since, and another one is still to: what was kept then
            stays, until it steps again.
        momentum: its exponential average, None where there is none.
        steps: optimizer steps that needed it.
        one_of_several: whether there are several optimizers, of which one counts.
    """

    def __init__(self) -> None:
        self.capturing = self.settled = self.one_of_several = False
        # What belongs to the gradient as it is, and what did when the optimizer of the layer stepped.
        self._running: Tensor | None = None
        self._final: Tensor | None = None
        self.momentum: Tensor | None = None
        self.steps = 0
        self._reduced: weakref.ref[Tensor] | None = None
        self._of_before: weakref.ref[Tensor] | None = None

    @property
    def captured(self) -> Tensor | None:
        """The dense gradient of this step so far, None where there is none."""
        return self._final if self.settled else self._running

    @captured.setter
    def captured(self, value: Tensor) -> None:
        if self.settled:
            self._final = value
        else:
            self._running = value

    @property
    def is_there(self) -> bool:
        """Whether something was kept."""
        return self.captured is not None or self.momentum is not None

    @property
    def is_known(self) -> bool:
        """Whether something was kept, or was to be and nothing came, as in a layer that was not used."""
        return self.capturing or self.is_there

    def capture(self, on: bool, before: Tensor | None = None) -> None:
        """Whether gradients are kept from now on; what was kept so far is dropped.

        Args:
            on: whether they are.
            before: the gradient as it is now, where another optimizer may step with it after the step was counted.
        """
        self.capturing, self.settled = on, False
        self._running = self._final = None
        self._of_before = None if before is None else weakref.ref(before)

    def is_late(self, gradient: Tensor | None) -> bool:
        """Whether the gradient is of a step that was counted already, as one of several optimizers had stepped.

        It was masked before anything was to be kept, so that it says nothing of disabled links.
        """
        return gradient is not None and self._of_before is not None and self._of_before() is gradient

    def before_accumulation(self, gradient: Tensor | None) -> None:
        """Forgets what was kept of gradients that somebody has zeroed since, as after a step that was skipped."""
        if gradient is None:
            self._running = None
        elif self._running is not None:
            self._running = unless_zeroed(self._running, local(gradient))

    def accumulated(self, gradient: Tensor | None, bits: Tensor) -> None:
        """Keeps a gradient to which something was added, before it is masked.

        Args:
            gradient: on the mask the sum so far, off the mask what was added last.
            bits: the mask.
        """
        self._of_before = None
        if not self.capturing or gradient is None:
            return
        if is_sharded(gradient):
            # No hook runs before: a gradient that is a new object begins a new sum.
            if self._reduced is None or self._reduced() is not gradient:
                self._running = None
            self._reduced = weakref.ref(gradient)
            gradient = local(gradient)
        self._running = accumulate(self._running, gradient, matching(bits, gradient))

    def follow(self, gradient: Tensor | None, bits: Tensor) -> None:
        """Before a step: unscales and clips what was kept by the factor that the gradient was unscaled and clipped by.

        A gradient that was written by hand, so that no hook has seen it, is kept as it is.

        Args:
            gradient: as the optimizer will see it.
            bits: the mask.
        """
        if not self.capturing or gradient is None or self.is_late(gradient):
            return
        gradient = local(gradient)
        if self._running is None:
            self._running = gradient.detach().clone()
        else:
            self._running = rescaled(self._running, gradient, matching(bits, gradient))

    def settle(self, gradient: Tensor | None) -> None:
        """After the optimizer of the layer has stepped: what was kept is final, unless it is of the step before."""
        if self.is_late(gradient):
            return
        self.settled = True
        # Gradients of other losses may be added to what belongs to the gradient.
        self._final = None if self._running is None else self._running.clone()

    def count_step(self, *, averaged: bool) -> None:
        """After a step of all optimizers: what is counted, and averaged over steps where that is asked for."""
        self.steps += self.capturing
        if self.captured is not None and averaged:
            captured = self.captured.float().nan_to_num(0.0, 0.0, 0.0)
            if self.momentum is None:
                self.momentum = torch.zeros_like(captured)
            self.momentum.mul_(_MOMENTUM).add_(captured, alpha=1 - _MOMENTUM)
