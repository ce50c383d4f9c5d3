"""Sparse 2-D convolution with its gradients: nothing is computed for weights that are not active."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from chtconv.errors import ConfigurationError
from chtconv.onednn import overruns, plain
from chtconv.sparse_compute.blocked import Blocked, as_blocks, to_blocked, to_dense
from chtconv.sparse_compute.links import Links, kernels_needed
from chtconv.sparse_compute.memory import empty
from chtconv.sparse_compute.problem import Geometry, Pair, input_gradients_of, outputs_of


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    links: Links,
    *,
    stride: Pair = (1, 1),
    padding: str | Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    dense_gradient: bool = False,
    rectify: bool = False,
) -> Tensor:
    """What ``torch.nn.functional.conv2d`` computes, with the weights that are active.

    Each number is computed in the same order whatever the number of threads.

    Args:
        x: float32 or float64 [N, C, H, W] of any strides, on the CPU.
        weight: of the same type, [O, C / groups, kh, kw]; what it holds off the links is ignored.
        bias: [O], or None.
        links: the active ones.
        stride: of rows and columns, like ``dilation``.
        padding: zeros above and below, and at both sides; or ``"valid"`` or, with a stride of 1, ``"same"``.
        dilation: distance of the positions of the window.
        groups: of channels.
        dense_gradient: whether the gradient of ``weight`` is wanted off the links too; it is then computed densely.
        rectify: whether negative outputs become 0; for inference, without gradients.

    Returns:
        [N, O, H', W']: a :class:`Blocked` for N of 8 and more, else an ordinary tensor. Differentiable in ``x``,
        ``weight`` (zero off the links) and ``bias``; gradients that are to be differentiated again
        (``create_graph=True``) are computed densely.

    Raises:
        ConfigurationError: tensors that do not fit each other or the links, another stride, padding or dilation; or
            there are no compiled kernels.

    Example:
        >>> mask = torch.rand(4, 3, 3, 3) < 0.2
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3) * mask
        >>> y = sparse_conv2d(x, weight, None, Links.of(mask), padding=(1, 1))
        >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight, padding=1), atol=1e-5)
        True
    """
    if rectify and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        raise ConfigurationError("rectify: accepted without gradients only.")
    geometry = _geometry(x, weight, bias, links, stride, padding, dilation, groups)
    y: Tensor = _Convolution.apply(x, weight, bias, links, geometry, dense_gradient, rectify)  # type: ignore[no-untyped-call]
    return y


def sparse_outputs(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    links: Links,
    *,
    stride: Pair = (1, 1),
    padding: str | Sequence[int] = (0, 0),
    dilation: Pair = (1, 1),
    rectify: bool = False,
) -> Tensor:
    """:func:`sparse_conv2d` of weights that are known at the links only, without gradients.

    Args:
        x: as there, like all but ``values``.
        values: [links], in the order of ``links.codes``.
        bias: [O], or None.
        links: the active ones.
        stride: of rows and columns.
        padding: zeros around the input.
        dilation: distance of the positions of the window.
        rectify: whether negative outputs become 0.

    Raises:
        ConfigurationError: tensors that do not fit each other or the links; or there are no compiled kernels.

    Example:
        >>> mask = torch.rand(4, 3, 1, 1) < 0.5
        >>> x, weight = torch.randn(8, 3, 4, 4), torch.randn(4, 3, 1, 1) * mask
        >>> links = Links.of(mask)
        >>> y = sparse_outputs(x, weight[mask], None, links)
        >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight), atol=1e-5)
        True
    """
    if values.shape != (len(links),):
        raise ConfigurationError(f"values of shape {list(values.shape)}: accepted is [{len(links)}], one a link.")
    geometry = _geometry(x, values, bias, links, stride, padding, dilation, links.groups, shape=links.shape)
    return _outputs(x.detach(), values.detach().contiguous(), bias, links, geometry, rectify)


def _geometry(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    links: Links,
    stride: Pair,
    padding: str | Sequence[int],
    dilation: Pair,
    groups: int,
    shape: tuple[int, ...] | None = None,
) -> Geometry:
    """The geometry, once everything fits."""
    others = [each for each in (weight, bias) if each is not None]
    if x.dtype not in (torch.float32, torch.float64) or any(each.dtype != x.dtype for each in others):
        found = ", ".join(str(each.dtype) for each in (x, *others))
        raise ConfigurationError(f"sparse convolution of {found}: accepted are torch.float32 or torch.float64 alone.")
    if not all(each.is_cpu for each in (x, *others)):
        raise ConfigurationError(f"sparse convolution on {x.device}: accepted is the CPU.")
    shape = tuple(weight.shape) if shape is None else shape
    if shape != links.shape or groups != links.groups:
        raise ConfigurationError(
            f"weight of shape {list(shape)} with groups={groups}: the links are of {list(links.shape)} with "
            f"groups={links.groups}."
        )
    if x.dim() != 4 or x.shape[1] != shape[1] * groups or len(x) == 0:
        raise ConfigurationError(
            f"input of shape {list(x.shape)}: accepted is [N, {shape[1] * groups}, H, W] with N of at least 1."
        )
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise ConfigurationError(f"bias of shape {list(bias.shape)}: accepted is [{shape[0]}].")
    _check_window(stride, padding, dilation)
    geometry = Geometry.of(x, shape[2:], stride, padding, dilation)
    if min(geometry.out_size) < 1:
        raise ConfigurationError(
            f"input of {list(geometry.size)}: the window of {list(geometry.window)} with dilation {list(dilation)} "
            "does not fit into it, padded."
        )
    return geometry


def _check_window(stride: Pair, padding: str | Sequence[int], dilation: Pair) -> None:
    for name, value, least in (("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, 0)):
        words = ("valid", "same") if name == "padding" and tuple(stride) == (1, 1) else ("valid",)
        named = name == "padding" and value in words
        if not named and (isinstance(value, str) or len(value) != 2 or min(value) < least):
            also = f", or {' or '.join(map(repr, words))} with this stride" if name == "padding" else ""
            raise ConfigurationError(f"{name}={value!r}: accepted are two whole numbers of at least {least}{also}.")


def _in_memory(x: Tensor, geometry: Geometry) -> Tensor:
    """A tensor as the kernels take it."""
    return to_dense(x).resolve_neg().contiguous() if geometry.flat else as_blocks(x)


def _shown(memory: Tensor, geometry: Geometry) -> Tensor:
    return memory if geometry.flat else Blocked.of(memory, geometry.batch)


def _one_piece(weight: Tensor) -> Tensor:
    """A weight without gaps in its memory, with kernels one after the other."""
    weight = weight.detach()
    formats = (torch.contiguous_format, torch.channels_last)
    return weight if any(weight.is_contiguous(memory_format=each) for each in formats) else weight.contiguous()


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None, links: Links, geometry: Geometry, rectify: bool) -> Tensor:
    problem = outputs_of(kernels_needed(), links, geometry, weight)
    out = empty(geometry.shape(links.shape[0], geometry.out_size), x.dtype)
    bias = None if bias is None else bias.detach().contiguous()
    problem.outputs(_in_memory(x, geometry), problem.values(weight), bias, out, rectify)
    return _shown(out, geometry)


class _Convolution(torch.autograd.Function):
    """The three passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        links: Links,
        geometry: Geometry,
        dense_gradient: bool,
        rectify: bool,
    ) -> Tensor:
        """The outputs."""
        ctx.save_for_backward(x, weight)
        ctx.links, ctx.geometry, ctx.dense_gradient = links, geometry, dense_gradient
        return _outputs(x.detach(), _one_piece(weight), bias, links, geometry, rectify)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        if torch.is_grad_enabled():
            # Autograd records a backward pass only where it is to be differentiated.
            found = _recorded_gradients(ctx, grad)
        else:
            x, weight = ctx.saved_tensors
            wanted = ctx.needs_input_grad[:3]
            found = gradients(x, weight, grad, ctx.links, ctx.geometry, wanted, ctx.dense_gradient)
        return *found, None, None, None, None


def gradients(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    links: Links,
    geometry: Geometry,
    wanted: Sequence[bool],
    dense_gradient: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a sparse convolution, outside of autograd.

    Args:
        x: the input, ordinary or Blocked.
        weight: [O, I / groups, kh, kw].
        grad: of the output, ordinary or Blocked.
        links: the active ones.
        geometry: of the convolution.
        wanted: whether those of input, weight and bias are.
        dense_gradient: whether that of the weight is wanted off the links too.

    Returns:
        Those of input, weight and bias; None for what is not wanted.
    """
    memory, own = _in_memory(grad, geometry), _one_piece(weight)
    of_x = of_weight = of_bias = None
    if wanted[0]:
        of_x = _input_gradient(memory, own, links, geometry)
        if not isinstance(x, Blocked):
            of_x = to_dense(of_x)
    problem = outputs_of(kernels_needed(), links, geometry, own)
    if wanted[1]:
        if dense_gradient:
            of_weight = _dense_gradient(x, weight, grad, links, geometry)
        else:
            of_weight = empty(own.shape, own.dtype).as_strided(own.shape, own.stride())
            problem.scatter(problem.gradients(_in_memory(x, geometry), memory), of_weight)
    if wanted[2]:
        of_bias = problem.kernel_sums(memory)
    return of_x, of_weight, of_bias


def _input_gradient(grad: Tensor, weight: Tensor, links: Links, geometry: Geometry) -> Tensor:
    channels = links.shape[1] * links.groups
    problems = input_gradients_of(kernels_needed(), links, geometry, weight)
    out = empty(geometry.shape(channels, geometry.size), grad.dtype)
    apart = geometry.flat and geometry.stride != (1, 1)
    for problem in problems:
        part = empty(geometry.shape(channels, problem.out_size), grad.dtype) if apart else out
        problem.outputs(grad, problem.values(weight), None, part)
        if apart:
            (y, x), (step_y, step_x) = problem.first, geometry.stride
            out[..., y::step_y, x::step_x] = part
    return _shown(out, geometry)


def _dense_gradient(x: Tensor, weight: Tensor, grad: Tensor, links: Links, geometry: Geometry) -> Tensor:
    """The gradient of all weights, active or not, by the dense kernels."""
    dense_x, weight, dense_grad = to_dense(x), weight.detach(), to_dense(grad)
    if overruns(links.shape[1], geometry.window, geometry.stride):
        dense_x, weight, dense_grad = (plain(each) for each in (dense_x, weight, dense_grad))
    else:
        dense_x, dense_grad = (each.contiguous(memory_format=torch.channels_last) for each in (dense_x, dense_grad))
    found = _by_dense_kernels(dense_x, weight, dense_grad, links.groups, geometry, (False, True))[1]
    assert found is not None
    return found


def _recorded_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What :func:`gradients` returns, by operations that can be differentiated again: those of dense convolutions."""
    x, weight = ctx.saved_tensors
    dense_x, dense_grad, weight = (plain(to_dense(each)) for each in (x, grad, weight))
    active = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    active[ctx.links.positions(weight).long()] = True
    active, everywhere = active.view(weight.shape), bool(ctx.dense_gradient)
    # Off the links a weight is 0, of which the gradient may be wanted all the same.
    weight = torch.where(active, weight, weight - weight.detach() if everywhere else 0)
    wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad[:3]
    of_x, of_weight = _by_dense_kernels(
        dense_x, weight, dense_grad, ctx.links.groups, ctx.geometry, (wanted_x, wanted_weight)
    )
    if of_x is not None and isinstance(x, Blocked):
        of_x = to_blocked(of_x)
    if of_weight is not None and not everywhere:
        of_weight = of_weight * active
    return of_x, of_weight, dense_grad.sum((0, 2, 3)) if wanted_bias else None


def _by_dense_kernels(
    x: Tensor, weight: Tensor, grad: Tensor, groups: int, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and weight by the dense kernels, which pad both ends alike."""
    (top, left), (bottom, right) = geometry.padding, geometry.after
    padding, (height, width) = geometry.padding, geometry.size
    apart = geometry.padding != geometry.after
    if apart:
        x, padding = functional.pad(x, (left, right, top, bottom)), (0, 0)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, geometry.stride, padding, geometry.dilation, False, [0, 0], groups, [*wanted, False]
    )
    if apart and of_x is not None:
        of_x = of_x[..., top : top + height, left : left + width]
    return of_x, of_weight
