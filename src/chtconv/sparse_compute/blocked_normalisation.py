"""Batch normalisation and ReLU of tensors in the blocked layout, in one pass where one follows the other.

What batch norm returns is computed when the next operation is known: if that is a ReLU, or an addition and a ReLU, all
is one pass. So it is with the gradient of a ReLU that goes on to a batch norm.
"""

import ctypes
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from chtconv.sparse_compute import layout
from chtconv.sparse_compute.blocked_content import Content
from chtconv.sparse_compute.blocked_operations import pointwise, pointwise_in_place
from chtconv.sparse_compute.blocked_tensor import Blocked, handles, make

aten = torch.ops.aten
_UNMASKED, _BY_OUTPUT, _BY_INPUT = range(3)


@lru_cache(maxsize=4096)
def _task(batch: int, channels: int, positions: int, train: bool = False, rectify: bool = False, mask: int = 0) -> Any:
    """``task`` of csrc/normalisation.c."""
    return (ctypes.c_int64 * 6)(batch, channels, positions, train, rectify, mask)


@lru_cache(maxsize=1024)
def _numbers(*numbers: float) -> Any:
    return (ctypes.c_double * len(numbers))(*numbers)


class Normalised:
    """x * scale + shift per channel, plus another tensor if there is one; ``scales`` [2, C] are both."""

    __slots__ = ("added", "batch", "changes", "scales", "x")

    def __init__(self, x: Content, batch: int, scales: Tensor, added: Content | None = None) -> None:
        self.x, self.batch, self.scales, self.added = x, batch, scales, added
        self.changes = x.changes

    def evaluate(self, rectify: bool = False) -> Tensor:
        """The blocks, rectified if asked for."""
        x, added = self.x.blocks(), None if self.added is None else self.added.blocks()
        result = layout.like(x)
        _, c, h, w, _ = x.shape
        task = _task(self.batch, c, h * w, False, rectify)
        layout.kernels().call("normalise", x.dtype, task, x, self.scales, added, result)
        return result

    def origin(self) -> "Origin | None":
        """What the backward pass can know of the rectified result."""
        return Origin(self) if self.added is None and torch.is_grad_enabled() else None


class Origin:
    """Of a rectified batch normalisation, what tells where it is zero without reading it. Does not keep the input."""

    __slots__ = ("changes", "scales", "x")

    def __init__(self, of: Normalised) -> None:
        self.x, self.changes, self.scales = weakref.ref(of.x), of.changes, of.scales

    def holds_for(self, x: Content) -> bool:
        """Whether x is the input, unchanged."""
        return self.x() is x and self.changes == x.changes and x.dense is None


class Masked:
    """A gradient where the output of the ReLU is not zero."""

    __slots__ = ("gradient", "output")

    def __init__(self, gradient: Content, output: Content) -> None:
        self.gradient, self.output = gradient, output

    def evaluate(self) -> Tensor:
        """The blocks."""
        gradient = self.gradient.blocks()
        result = layout.like(gradient)
        aten.threshold_backward.grad_input(gradient, self.output.blocks(), 0, grad_input=result)
        return result


@handles(aten.native_batch_norm.default)
def batch_norm(
    func: Any,
    x: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Statistics now, the normalised tensor when it is known whether a ReLU follows."""
    if not isinstance(x, Blocked) or not _plain(x.dtype, weight, bias, running_mean, running_var):
        return NotImplemented
    if (running_mean is None) != (running_var is None) or not (training or running_mean is not None):
        return NotImplemented
    blocks, (n, c, h, w) = x.blocks, x.shape
    scales = torch.empty((2, c), dtype=x.dtype, device="cpu")
    mean, inverse = (torch.empty(c if training else 0, dtype=x.dtype, device="cpu") for _ in range(2))
    layout.kernels().call(
        *("normalisation_scales", x.dtype, _task(n, c, h * w, training), _numbers(eps, momentum)),
        *(blocks, weight, bias, running_mean, running_var, mean, inverse, scales),
    )
    content = Content(None)
    content.defer(Normalised(x._content, n, scales), x._content)
    return make(content, x.shape, x.dtype), mean, inverse


def _plain(dtype: torch.dtype, *parameters: Tensor | None) -> bool:
    """Whether these, where they are given, are vectors that kernels can read and write."""
    for x in parameters:
        if x is not None and not (x.dtype is dtype and x.is_contiguous() and x.is_cpu and x.dim() == 1):
            return False
    return True


@handles(aten.native_batch_norm_backward.default)
def batch_norm_backward(
    func: Any,
    gradient: Tensor,
    x: Any,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    inverse: Tensor | None,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Any:
    """Gradients of input, weight and bias, with that of a ReLU in the same pass."""
    if not isinstance(x, Blocked) or not _plain(x.dtype, weight, running_mean, running_var, mean, inverse):
        return NotImplemented
    if gradient.dtype is not x.dtype or (mean is None if training else running_mean is None):
        return NotImplemented
    mask, output, scales = _UNMASKED, None, None
    pending = gradient._content.pending if isinstance(gradient, Blocked) else None
    if isinstance(pending, Masked):
        arriving = pending.gradient.blocks()
        origin = pending.output.origin
        if isinstance(origin, Origin) and origin.holds_for(x._content):
            mask, scales = _BY_INPUT, origin.scales
        else:
            mask, output = _BY_OUTPUT, pending.output.blocks()
    else:
        arriving = gradient.blocks if isinstance(gradient, Blocked) else layout.to_blocks(gradient)
    blocks, (n, c, h, w) = x.blocks, x.shape
    result = layout.like(blocks) if wanted[0] else None
    weight_gradient = torch.empty(c, dtype=x.dtype, device="cpu") if wanted[1] else None
    bias_gradient = torch.empty(c, dtype=x.dtype, device="cpu") if wanted[2] else None
    layout.kernels().call(
        *("normalisation_backward", x.dtype, _task(n, c, h * w, training, False, mask), _numbers(eps)),
        *(arriving, blocks, output, scales, weight, running_mean, running_var, mean, inverse),
        *(result, weight_gradient, bias_gradient),
    )
    return None if result is None else Blocked.of(result, n), weight_gradient, bias_gradient


@handles(aten.relu.default)
def relu(func: Any, x: Blocked) -> Blocked:
    """In one pass with what is pending."""
    pending = x._content.pending
    if isinstance(pending, Normalised):
        content = Content(pending.evaluate(rectify=True))
        content.origin = pending.origin()
        return make(content, x.shape, x.dtype)
    return Blocked.of(torch.clamp_min(x.blocks, 0, out=layout.like(x.blocks)), x.shape[0])


@handles(aten.relu_.default)
def relu_(func: Any, x: Blocked) -> Any:
    """In one pass with what is pending."""
    content, pending = x._content, x._content.pending
    if not isinstance(pending, Normalised):
        return pointwise_in_place(func, x)
    content.change()
    content.fill(pending.evaluate(rectify=True), pending.origin())
    return x


@handles(aten.threshold_backward.default)
def threshold_backward(func: Any, gradient: Any, output: Any, threshold: Any) -> Any:
    """The gradient of a ReLU, to be computed with that of a batch norm."""
    if threshold != 0 or gradient.shape != output.shape or gradient.dtype is not output.dtype or gradient.dim() != 4:
        return NotImplemented
    one, other = _content_of(gradient), _content_of(output)
    content = Content(None)
    content.defer(Masked(one, other), one, other)
    return make(content, output.shape, output.dtype)


def _content_of(x: Tensor) -> Content:
    return x._content if isinstance(x, Blocked) else Content(layout.to_blocks(x))


def _sum(x: Any, other: Any, alpha: Any) -> tuple[Normalised, Content] | None:
    """An addition to a batch norm that is pending, and what it needs; None where it is another."""
    if not isinstance(x, Blocked) or not isinstance(other, Blocked) or alpha != 1:
        return None
    pending, added = x._content.pending, other._content
    if not isinstance(pending, Normalised) or pending.added is not None:
        return None
    if x.shape != other.shape or x.dtype is not other.dtype or added is x._content:
        return None
    return Normalised(pending.x, pending.batch, pending.scales, added), added


@handles(aten.add.Tensor)
def add(func: Any, x: Any, other: Any, *, alpha: Any = 1) -> Any:
    """To a batch norm that is pending, in one pass with it and a ReLU that may follow."""
    found = _sum(x, other, alpha) or _sum(other, x, alpha)
    if found is None:
        return pointwise(func, x, other, alpha=alpha)
    content = Content(None)
    content.defer(found[0], found[0].x, found[1])
    return make(content, x.shape, x.dtype)


@handles(aten.add_.Tensor)
def add_(func: Any, x: Any, other: Any, *, alpha: Any = 1) -> Any:
    """To a batch norm that is pending, in one pass with it and a ReLU that may follow."""
    found = _sum(x, other, alpha)
    if found is None:
        return pointwise_in_place(func, x, other, alpha=alpha)
    x._content.change()
    x._content.defer(found[0], found[0].x, found[1])
    return x
