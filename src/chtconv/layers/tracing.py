"""How ``torch.fx`` looks at models here: past wrappers and hooks, and without changing them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn


class Tracer(fx.Tracer):
    """Traces past hooks, wrappers for compilation and data parallelism, and without a value of any buffer."""

    proxy_buffer_attributes = True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """What a call of a module is in the graph."""
        m, _ = unwrapped_model(m)
        return super().call_module(m, m.forward, args, kwargs)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """At the end, sets back the attributes of a model and its modules, whether they are in training mode among them."""
    attributes = [(module, module.__dict__.copy()) for module in model.modules()]
    try:
        yield
    finally:
        for module, before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)


def unwrapped_model(model: nn.Module) -> tuple[nn.Module, str]:
    """A model without wrappers, and what these put before the names of its modules."""
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    for attribute, wraps in (("_orig_mod", hasattr(model, "_orig_mod")), ("module", parallel)):
        if wraps:
            inner, prefix = unwrapped_model(getattr(model, attribute))
            return inner, f"{attribute}.{prefix}"
    return model, ""
