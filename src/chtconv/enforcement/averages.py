"""Averages of weights over training (EMA, SWA), kept as sparse as the model itself."""

import weakref
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from chtconv.enforcement.bits import apply_bits, matching
from chtconv.enforcement.sharding import local
from chtconv.enforcement.sparse_layer import SparseLayer
from chtconv.errors import ConfigurationError
from chtconv.randomness import unwrapped


class Averages:
    """Copies of a model that are masked like it; see :meth:`chtconv.Topology.follow`.

    They are held weakly, so that following keeps no copy alive.
    """

    def __init__(self, layers: Sequence[SparseLayer]) -> None:
        self._layers = layers
        self._copies: OrderedDict[int, weakref.ref[nn.Module]] = OrderedDict()

    def add(self, copy: nn.Module) -> RemovableHandle:
        """Masks a copy, now and from now on.

        Raises:
            ConfigurationError: the copy lacks a sparse layer, or has it in another shape.
        """
        self._mask(copy)
        handle = RemovableHandle(self._copies)
        self._copies[handle.id] = weakref.ref(copy)
        return handle

    def mask(self) -> None:
        """Masks all copies that there still are."""
        for key, reference in list(self._copies.items()):
            copy = reference()
            if copy is None:
                del self._copies[key]
            else:
                self._mask(copy)

    def clear(self) -> None:
        """Follows none of them any more."""
        self._copies.clear()

    def _mask(self, copy: nn.Module) -> None:
        by_name = _by_name(copy, [layer.seed_name for layer in self._layers])
        for layer in self._layers:
            parameter = by_name.get(layer.seed_name)
            if parameter is None or parameter.shape != layer.weight.shape:
                found = "none" if parameter is None else f"one of shape {list(parameter.shape)}"
                raise ConfigurationError(
                    f"{type(copy).__name__} has {found} where the model has {layer.name} of shape "
                    f"{list(layer.weight.shape)}; accepted are copies of the model, also within a wrapper that calls "
                    "it 'module'."
                )
        for layer in self._layers:
            part = local(by_name[layer.seed_name].detach())
            apply_bits(part, matching(layer.bits, part))


def _by_name(copy: nn.Module, wanted: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of a copy by their names in the model: below as few wrappers as leave none of the wanted out."""
    names = [(unwrapped(name), parameter) for name, parameter in copy.named_parameters()]
    deepest = max((len(shorter) for shorter, _ in names), default=1)
    levels = [{shorter[level]: each for shorter, each in names if level < len(shorter)} for level in range(deepest)]
    return max(levels, key=lambda level: sum(name in level for name in wanted))
