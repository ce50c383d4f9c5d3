"""Around the steps of the optimizers: gradients are masked before them, and one step is counted after the last.

The optimizers own what their hooks call, and with it the topology; the model does not, see :class:`.hooks.WeakHook`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from chtconv.enforcement.distributed import Ranks
from chtconv.enforcement.optimizer_state import group_of, moves_zeros
from chtconv.enforcement.sharding import is_sharded, local
from chtconv.enforcement.sparse_layer import SparseLayer


class Stepping:
    """The hooks of the optimizers of one topology.

    Args:
        optimizers: that train the layers; they step in this order.
        layers: the sparse ones.
        ranks: that train together.
        begin: called before each step, when there may be states that were loaded.
        free: called after a step that may have moved weights which are zero, or what is remembered of them, with the
            layers of its optimizer: somebody may still go back through the others.
        count: called once after the step of the last optimizer, unless it was skipped.
        loaded: called after the state of an optimizer was loaded.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        layers: Sequence[SparseLayer],
        ranks: Ranks,
        *,
        begin: Callable[[], None],
        free: Callable[[Sequence[SparseLayer]], None],
        count: Callable[[], None],
        loaded: Callable[..., None],
    ) -> None:
        self._last = optimizers[-1]
        self._layers = layers
        self._layers_of = {id(each): [x for x in layers if group_of(each, x.weight)] for each in optimizers}
        self._ranks = ranks
        self._begin, self._free, self._count, self._loaded = begin, free, count, loaded
        self._within = self._over = False
        self._handles: list[RemovableHandle] = []
        for layer in layers:
            layer.dense_gradient.one_of_several = len(optimizers) > 1
        for optimizer in optimizers:
            self._register(optimizer)

    def end(self, *, keep: bool) -> None:
        """Does nothing from now on.

        Args:
            keep: whether the hooks stay where they are: torch goes through them just now.
        """
        self._over = True
        if not keep:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _register(self, optimizer: Optimizer) -> None:
        # In a step that is compiled, the compiler would follow evolution too, and compile anew at each of them.
        opaque: Callable[[Any], Any] = torch.compiler.disable
        self._handles += [
            optimizer.register_step_pre_hook(opaque(self._before)),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        ]
        if moves_zeros(optimizer):
            # Before the step is counted, so that an evolution sees masked weights.
            self._handles.append(optimizer.register_step_post_hook(opaque(self._after_free)))
        after = self._after_last if optimizer is self._last else self._settle
        self._handles.append(optimizer.register_step_post_hook(opaque(after)))

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._over or self._only_fills_state(optimizer):
            return args, kwargs
        self._begin()
        for layer in self._layers_of[id(optimizer)]:
            layer.mask_if_written()
            layer.trained |= layer.weight.requires_grad and not _skipped(optimizer)
        self._mask_gradients(optimizer)
        self._within |= optimizer is self._last
        # A closure computes gradients after this hook, and may write them by hand.
        own, *rest = args
        if rest and rest[0] is not None:
            rest[0] = self._masking(rest[0], optimizer)
        elif kwargs.get("closure") is not None:
            kwargs = kwargs | {"closure": self._masking(kwargs["closure"], optimizer)}
        return (own, *rest), kwargs

    def _only_fills_state(self, optimizer: Optimizer) -> bool:
        """Whether a step is one without rate and gradients, as torch.distributed.checkpoint takes to make state."""
        rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
        # Of a rate on another device nobody knows without waiting for it.
        if any((isinstance(rate, Tensor) and not rate.is_cpu) or rate != 0 for rate in rates):
            return False
        gradients = [local(layer.weight.grad) for layer in self._layers if layer.weight.grad is not None]
        return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)

    def _masking(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def masked() -> Any:
            loss = closure()
            self._mask_gradients(optimizer)
            return loss

        return masked

    def _mask_gradients(self, optimizer: Optimizer) -> None:
        for layer in self._layers_of[id(optimizer)]:
            # Gradients that each rank keeps of its own batches are no multiple of those that the ranks have averaged.
            if self._ranks.size == 1 or is_sharded(layer.weight):
                layer.follow_gradient()
        for layer in self._layers:
            layer.mask_gradient()

    def _after_free(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._over:
            self._free(self._layers_of[id(optimizer)])

    def _settle(self, optimizer: Optimizer, *_: Any) -> None:
        """What was kept of the gradients of one of several optimizers is final once it has stepped."""
        if _unscales(optimizer):
            self._mask_gradients(optimizer)
        skipped = _skipped(optimizer)
        if skipped:
            self._free(self._layers_of[id(optimizer)])
        for layer in self._layers_of[id(optimizer)]:
            if not skipped:
                layer.settle()
            layer.stepped()

    def _after_last(self, optimizer: Optimizer, *_: Any) -> None:
        # A subclass that calls the step of its parent runs the hooks twice.
        if not self._within or self._over:
            return
        self._within = False
        if _skipped(optimizer):
            self._free(self._layers_of[id(optimizer)])
            for layer in self._layers:
                layer.capture(layer.dense_gradient.capturing)
        else:
            if _unscales(optimizer):
                self._mask_gradients(optimizer)
            self._count()
        for layer in self._layers_of[id(optimizer)]:
            layer.stepped()


def _skipped(optimizer: Optimizer) -> bool:
    """Whether it has skipped the step by itself, under a gradient scaler, as fused ones do with infinite gradients.

    Fused SGD of torch 2.13 then leaves momentum that it made in that step as the memory happened to be.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _unscales(optimizer: Optimizer) -> bool:
    """Whether it has unscaled the gradients by itself, under a gradient scaler."""
    return getattr(optimizer, "grad_scale", None) is not None
