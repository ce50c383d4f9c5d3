"""How long a layer takes, sparse and dense, on the input at hand: outside of autograd, hooks and random numbers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from chtconv.onednn import overruns, plain
from chtconv.sparse_compute.blocked import to_blocked, to_dense
from chtconv.sparse_compute.convolution import gradients, sparse_conv2d
from chtconv.sparse_compute.links import Links
from chtconv.sparse_compute.problem import Geometry, pair
from chtconv.sparse_compute.tuning import Measurement, fastest


@torch.no_grad()
def measure(module: nn.Conv2d, input: Tensor, links: Links, passes: str, dense_type: torch.dtype) -> Measurement:
    """The seconds of a layer.

    Args:
        module: the layer.
        input: of it, [N, C, H, W] in any layout.
        links: its index lists.
        passes: any of "f", "i" and "w": forward, gradient of the input, gradient of the weight.
        dense_type: what the dense layer computes in, with channels last where it may.
    """
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    dense = to_dense(input.detach()).to(weight.dtype)
    geometry = Geometry.of(dense, weight.shape[2:], pair(module.stride), module.padding, pair(module.dilation))
    blocked = dense if geometry.flat else to_blocked(dense)
    # As many conversions as the activations have passes.
    ways = 0 if geometry.flat else len(passes.replace("w", ""))
    with torch.autocast("cpu", enabled=False):
        return Measurement(
            *fastest(
                _sparse(module, blocked, weight, bias, links, geometry, passes),
                _dense(module, dense.to(dense_type), weight, bias, geometry, passes),
                lambda: [to_blocked(dense) for _ in range(ways)],
            )
        )


def _sparse(
    module: nn.Conv2d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    links: Links,
    geometry: Geometry,
    passes: str,
) -> Callable[[], object]:
    constants = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}

    def run() -> None:
        y = sparse_conv2d(x, weight, bias, links, **constants)
        if passes != "f":
            # Its output serves as its gradient.
            gradients(x, weight, y, links, geometry, _wanted(passes, bias))

    return run


def _dense(
    module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, passes: str
) -> Callable[[], object]:
    padding = geometry.padding
    if padding != geometry.after:
        (top, left), (bottom, right) = padding, geometry.after
        x, padding = functional.pad(x, (left, right, top, bottom)), (0, 0)
    if overruns(module.in_channels // module.groups, geometry.window, geometry.stride):
        x, weight = plain(x), plain(weight)
    else:
        x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    rest = (list(module.stride), list(padding), list(module.dilation), False, [0, 0], module.groups)

    def run() -> None:
        # Autocast converts the weight in every step.
        converted = weight.to(x.dtype)
        y = torch.ops.aten.convolution(x, converted, None if bias is None else bias.to(x.dtype), *rest)
        if passes != "f":
            sizes = None if bias is None else list(bias.shape)
            torch.ops.aten.convolution_backward(y, x, converted, sizes, *rest, list(_wanted(passes, bias)))

    return run


def _wanted(passes: str, bias: Tensor | None) -> tuple[bool, bool, bool]:
    return "i" in passes, "w" in passes, "w" in passes and bias is not None
