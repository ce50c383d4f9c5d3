"""The passes of single convolutions, sparse and dense; see ways.py."""

from collections.abc import Callable
from typing import Any

import torch
from sparse_ways import empty_slices, sparsified
from torch import Tensor, nn
from trainees import BATCHES, Dense

from chtconv.sparse_compute.blocked import to_blocked
from chtconv.sparse_compute.convolution import gradients, sparse_conv2d
from chtconv.sparse_compute.links import Links
from chtconv.sparse_compute.problem import Geometry

PASSES = ("forward", "input gradient", "weight gradient")


class Layers:
    """The passes of each convolution of VGG16 by themselves, their tensors in the format in which they travel.

    Args:
        sparsity: 0 for dense ones.
        distinct: whether layers of one shape are taken once.
        width: of the model.
        masks: a file with the links, see :func:`sparsified`.
        at_random: see there.
    """

    def __init__(
        self,
        sparsity: float = 0.0,
        distinct: bool = True,
        width: float = 1.0,
        masks: str | None = None,
        at_random: bool = False,
    ) -> None:
        trainee = Dense("vgg16", "sgd", width)
        sparse, found = bool(sparsity or masks), {}
        if sparse:
            found = sparsified(trainee, sparsity=sparsity, masks=masks, at_random=at_random).masks
        self._batch = BATCHES["vgg16"]
        self.actions: dict[str, Callable[[], object]] = {}
        self.about: dict[str, Any] = {"layers": {}}
        if found:
            self.about["empty_slices"] = empty_slices(found)
        for name, module, size in convolutions(trainee.model):
            label = f"{module.in_channels}→{module.out_channels}, {size}x{size}"
            if not distinct:
                label = f"{name}: {label}"
            known = self.about["layers"].get(label)
            if known:
                known["count"] += 1
                continue
            mask = found.get(f"{name}.weight")
            passes = [each for each in PASSES if module.in_channels != 3 or each != "input gradient"]
            self.about["layers"][label] = self._described(module, size, mask) | {"passes": passes}
            make = _dense_passes if mask is None else _sparse_passes
            x = torch.randn(self._batch, module.in_channels, size, size)
            for each, run in make(module, x, mask).items():
                if each in passes:
                    self.actions[f"{label}/{each}"] = run

    def _described(self, module: nn.Conv2d, size: int, mask: Tensor | None) -> dict[str, Any]:
        links = module.weight.numel() if mask is None else int(mask.sum())
        pixels = self._batch * size * size
        # Values of the links, and where they are, 4 bytes each.
        bytes_of_links = 4 * links * (1 if mask is None else 2)
        return {
            "count": 1,
            "multiply_adds": links * pixels,
            "bytes": 4 * pixels * (module.in_channels + module.out_channels) + bytes_of_links,
        }


def convolutions(model: nn.Module) -> list[tuple[str, nn.Conv2d, int]]:
    """Names, modules, and sizes of the images that they see."""
    sizes: dict[nn.Module, int] = {}
    named = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    handles = [
        module.register_forward_pre_hook(lambda module, args: sizes.__setitem__(module, args[0].shape[-1]))
        for module in named.values()
    ]
    model.eval()(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    return [(name, module, sizes[module]) for name, module in named.items()]


def _dense_passes(module: nn.Conv2d, x: Tensor, mask: None) -> dict[str, Callable[[], object]]:
    x = x.to(memory_format=torch.channels_last)
    weight = module.weight.detach()
    rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    y = torch.ops.aten.convolution(x, weight, None, *rest)

    def backward(*wanted: bool) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(y, x, weight, None, *rest, [*wanted, False])

    return {
        "forward": lambda: torch.ops.aten.convolution(x, weight, None, *rest),
        "input gradient": backward(True, False),
        "weight gradient": backward(False, True),
    }


def _sparse_passes(module: nn.Conv2d, x: Tensor, mask: Tensor) -> dict[str, Callable[[], object]]:
    blocked, weight, links = to_blocked(x), module.weight.detach(), Links.of(mask)
    geometry = Geometry.of(blocked, weight.shape[2:], stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    y = sparse_conv2d(blocked, weight, None, links, padding=(1, 1))

    def backward(*wanted: bool) -> Callable[[], object]:
        return lambda: gradients(blocked, weight, y, links, geometry, (*wanted, False))

    return {
        "forward": lambda: sparse_conv2d(blocked, weight, None, links, padding=(1, 1)),
        "input gradient": backward(True, False),
        "weight gradient": backward(False, True),
    }
