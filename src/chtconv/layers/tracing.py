"""How ``torch.fx`` looks at models here: past wrappers and hooks, and without changing them."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

_WITHOUT_VALUES = (UninitializedParameter, UninitializedBuffer)


class Tracer(fx.Tracer):
    """Traces past hooks, wrappers for compilation and data parallelism, and without a value of any buffer."""

    proxy_buffer_attributes = True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """What a call of a module is in the graph."""
        m, _ = unwrapped_model(m)
        return super().call_module(m, m.forward, args, kwargs)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """At the end, sets back the attributes of modules, their parameters and buffers, and lists, dictionaries and sets.

    Whether modules are in training mode is among it, and so are the numbers in attributes that are tensors, into which
    ``forward`` really writes when it is traced. Numbers in parameters and buffers are not: it traces these.
    """
    modules = [(module.__dict__, module.__dict__.copy()) for module in model.modules()]
    values = [value for _, attributes in modules for value in attributes.values()]
    containers = [(value, value.copy()) for value in values if type(value) in (dict, list, set, OrderedDict)]
    tensors = [(value, value._version, value.detach().clone()) for value in values if is_watched(value)]
    try:
        yield
    finally:
        for held, before in (*containers, *modules):
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(before)
        for tensor, version, numbers in tensors:
            if tensor.shape != numbers.shape:
                tensor.data = numbers
            elif tensor._version != version:
                tensor.detach().copy_(numbers)


def is_watched(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor whose version tells that somebody wrote into it."""
    return isinstance(value, Tensor) and not isinstance(value, _WITHOUT_VALUES) and not value.is_inference()


def unwrapped_model(model: nn.Module) -> tuple[nn.Module, str]:
    """A model without wrappers, and what these put before the names of its modules."""
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    for attribute, wraps in (("_orig_mod", hasattr(model, "_orig_mod")), ("module", parallel)):
        if wraps:
            inner, prefix = unwrapped_model(getattr(model, attribute))
            return inner, f"{attribute}.{prefix}"
    return model, ""
