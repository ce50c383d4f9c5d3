"""The hooks that a sparse layer has while its mask is in force, and what tells that it has them."""

from collections.abc import Callable
from typing import Any, Final

from torch import nn

from chtconv.enforcement.hooks import PlainState, WeakHook
from chtconv.enforcement.sparse_layer import SparseLayer
from chtconv.layers import input_size

# Marks a module whose weight has a mask already.
_MARK: Final = "_chtconv_topology"


def attach(layer: SparseLayer, after_load: Callable[..., None]) -> None:
    """Registers the hooks of a layer; the model does not own what they call, see :class:`WeakHook`.

    Args:
        layer: that has none yet.
        after_load: a method that is called when state was loaded into the module.
    """
    module, loaded = layer.module, WeakHook(after_load)
    setattr(module, _MARK, loaded)
    layer.hooked = layer.weight
    of_module = [
        module.register_load_state_dict_post_hook(loaded),  # type: ignore[no-untyped-call]
        *input_size.observe(module),
    ]
    PlainState.put(module, of_module)
    layer.handles += [*of_module, layer.weight.register_post_accumulate_grad_hook(WeakHook(layer.accumulated))]
    if layer.settings.method.needs_dense_gradients:
        layer.handles.append(layer.weight.register_hook(WeakHook(layer.before_accumulation)))


def detach(layer: SparseLayer) -> None:
    """Removes all that :func:`attach` registered, and what the hooks noted."""
    for handle in layer.handles:
        handle.remove()
    layer.handles.clear()
    layer.capture(False)
    layer.module.__dict__.pop(_MARK, None)
    PlainState.remove(layer.module)
    input_size.forget(layer.module)


def is_attached(module: nn.Module) -> bool:
    """Whether a module is a sparse layer of a topology that is still there."""
    mark: Any = getattr(module, _MARK, None)
    return isinstance(mark, WeakHook) and mark.alive
