"""Sparse convolutions in graphs of ``torch.compile``: an operator that takes and gives ordinary tensors.

A graph holds no index lists, but a number by which they are looked up whenever it runs: evolution compiles nothing
anew, and what was measured decides at that time whether the layer is sparse.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from chtconv.onednn import overruns, plain
from chtconv.sparse_compute.blocked import to_dense
from chtconv.sparse_compute.computation import BY_NUMBER
from chtconv.sparse_compute.convolution import gradients, sparse_conv2d
from chtconv.sparse_compute.links import Links
from chtconv.sparse_compute.problem import Geometry


def convolution_in_graph(module: nn.Conv2d, input: Tensor, number: int, compute: torch.dtype) -> Tensor:
    """The call of a layer as a node of a graph: ordinary tensors in and out.

    Args:
        module: the layer; its padding is the same on both sides.
        input: [N, C, H, W], ordinary.
        number: of its :class:`.computation.Computation`.
        compute: what it computes in where it is dense.
    """
    weight, (_, left, _, top) = module.weight, module._reversed_padding_repeated_twice
    recorded = torch.is_grad_enabled()
    passes = "f" + "i" * (recorded and input.requires_grad) + "w" * (recorded and weight.requires_grad)
    constants = (list(module.stride), [top, left], list(module.dilation), module.groups)
    result: Tensor = _convolution(
        input.to(weight.dtype), weight, module.bias, number, *constants, passes, module.training, compute
    )
    return result


# Written out, because torch 2.6 does not read them off signatures with collections.abc.Sequence.
_SHAPE: Final = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
_CALL: Final = f"SymInt number, {_SHAPE}, str passes, bool training, ScalarType compute"


@torch.library.custom_op(
    "chtconv::convolution", mutates_args=(), schema=f"(Tensor x, Tensor weight, Tensor? bias, {_CALL}) -> Tensor"
)
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    number: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    passes: str,
    training: bool,
    compute: torch.dtype,
) -> Tensor:
    links = _links(number, x, weight, passes, training, compute)
    if links is None:
        return functional.conv2d(x, weight, bias, stride, padding, dilation, groups).contiguous()
    (sy, sx), (dy, dx) = stride, dilation
    return to_dense(
        sparse_conv2d(x, weight, bias, links, stride=(sy, sx), padding=padding, dilation=(dy, dx), groups=groups)
    )


@_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, number: int, *rest: Any) -> Tensor:
    stride, padding, dilation, groups, *_ = rest
    return functional.conv2d(x, weight, bias, stride, padding, dilation, groups).contiguous()


@torch.library.custom_op(
    "chtconv::convolution_gradients",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor weight, {_CALL}, bool[] wanted) -> Tensor[]",
)
def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    number: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    passes: str,
    training: bool,
    compute: torch.dtype,
    wanted: Sequence[bool],
) -> list[Tensor]:
    links = _links(number, x, weight, passes, training, compute)
    found: Sequence[Tensor | None]
    if links is None:
        if overruns(weight.shape[1], weight.shape[2:], stride):
            grad, x, weight = plain(grad), plain(x), plain(weight)
        rest = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
        found = torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *rest, list(wanted))
    else:
        (sy, sx), (dy, dx) = stride, dilation
        geometry = Geometry.of(x, weight.shape[2:], (sy, sx), padding, (dy, dx))
        found = gradients(x, weight, grad, links, geometry, wanted, BY_NUMBER[number].capturing)
    return [
        torch.empty_like(like).copy_(each)
        for each, like, on in zip(found, (x, weight, weight[:, 0, 0, 0]), wanted, strict=True)
        if on and each is not None
    ]


@_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    likes = (x, weight, weight[:, 0, 0, 0])
    return [torch.empty_like(like) for like, on in zip(likes, rest[-1], strict=True) if on]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.rest = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(_gradients(grad, x, weight, *ctx.rest, wanted))
    return (*(next(found) if each else None for each in wanted), *[None] * len(ctx.rest))


_convolution.register_autograd(_backward, setup_context=_keep)


def _links(number: int, x: Tensor, weight: Tensor, passes: str, training: bool, compute: torch.dtype) -> Links | None:
    computation = BY_NUMBER.get(number)
    return None if computation is None else computation.links_in_graph(x, weight, passes, training, compute)
