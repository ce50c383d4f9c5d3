"""A CUDA graph without a GPU: the operations of torch, recorded once and repeated on the same memory.

Like a graph, it runs no Python when it repeats, keeps numbers and addresses as they were when it was recorded, computes
nothing while it records (here: undoes it), and refuses to wait for the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from chtconv.training.step import Result

# What would have to wait until the device knows a value.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2"}


class Recording(TorchDispatchMode):
    """The operations that run while this is active, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        assert name not in WAITING, f"{name} waits for the device"
        results = func(*args, **kwargs)
        if name.startswith("aten::") and not is_view(func):
            self.calls.append((func, args, kwargs, results))
        return results

    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            with torch.no_grad():
                again = func(*args, **kwargs)
            for static, value in zip(tree_flatten(results)[0], tree_flatten(again)[0], strict=True):
                if isinstance(static, Tensor) and static is not value:
                    static.detach().copy_(value)


def is_view(func: Any) -> bool:
    aliases = [each.alias_info for each in func._schema.returns]
    return any(each is not None and not each.is_write for each in aliases)


class Recorder:
    """Takes the place of :func:`chtconv.training.step.cuda_graph`.

    Args:
        tensors: all that a step changes; called when a recording begins.
    """

    def __init__(self, tensors: Callable[[], list[Tensor]]) -> None:
        self._tensors = tensors
        self.recordings = 0

    def __call__(self, action: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        self.recordings += 1
        tensors = self._tensors()
        kept = [each.detach().clone() for each in tensors]
        random = torch.get_rng_state()
        recording = Recording()
        with recording:
            result = action()
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.detach().copy_(value)
        torch.set_rng_state(random)
        return result, recording.replay
