"""Operations that need to know little of the layout: pointwise ones, copies, sums, concatenation."""

from typing import Any

import torch
from torch import Tensor

from chtconv.sparse_compute import layout
from chtconv.sparse_compute.blocked_tensor import TYPES, Blocked, handles, make
from chtconv.sparse_compute.memory import empty

aten = torch.ops.aten


def overloads(*names: str) -> list[Any]:
    """Operations by name, such as ``"relu"`` or ``"add.Tensor"``; those that this torch does not have are left out."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet, None), overload or "default", None)
        found += [operation] if operation is not None else []
    return found


def elsewhere(dtype: Any, options: dict[str, Any]) -> bool:
    """Whether a tensor of this type and with these options cannot be blocked."""
    if dtype not in (None, *TYPES):
        return True
    device, strides = options.get("device"), options.get("layout")
    on_cpu = device is None or torch.device(device).type == "cpu"
    return not on_cpu or strides not in (None, torch.strided) or bool(options.get("pin_memory"))


# ---- Aliases and copies ----


@handles(aten.detach.default, aten.alias.default)
def alias(func: Any, x: Blocked) -> Blocked:
    """The same content in another tensor."""
    return make(x._content, x.shape, x.dtype)


@handles(aten.view.default, aten._unsafe_view.default)
def view(func: Any, x: Blocked, size: list[int]) -> Any:
    """A view that changes nothing, as backward hooks make it."""
    return alias(func, x) if tuple(size) == tuple(x.shape) else NotImplemented


@handles(aten.clone.default)
def clone(func: Any, x: Blocked, *, memory_format: Any = None) -> Blocked:
    """A copy; of whatever memory format, in blocks."""
    return Blocked.of(layout.like(x.blocks).copy_(x.blocks), x.shape[0])


@handles(aten._to_copy.default)
def to_copy(func: Any, x: Blocked, *, dtype: Any = None, **options: Any) -> Any:
    """A copy of another type."""
    if elsewhere(dtype, options):
        return NotImplemented
    return Blocked.of(layout.like(x.blocks, dtype).copy_(x.blocks), x.shape[0])


@handles(aten.copy_.default)
def copy_(func: Any, x: Any, source: Any, non_blocking: bool = False) -> Any:
    """Copies between tensors of which one or both are blocked."""
    if not isinstance(source, Tensor) or x.shape != source.shape:
        return NotImplemented
    if not isinstance(x, Blocked):
        if x.dtype is not source.dtype or x.device.type != "cpu" or x.is_neg():
            return NotImplemented
        layout.to_strided(source._content.blocks(source), source.shape[0], out=x)  # type: ignore[attr-defined]
        return x
    if x._content.dense is not None:
        return NotImplemented
    if isinstance(source, Blocked):
        blocks = layout.like(source.blocks, x.dtype).copy_(source.blocks)
    elif source.dtype is x.dtype and source.device.type == "cpu" and not source.is_neg():
        blocks = layout.to_blocks(source)
    else:
        return NotImplemented
    x._content.change()
    x._content.fill(blocks)
    return x


@handles(*overloads("empty_like", "zeros_like", "ones_like", "full_like"))
def filled_like(func: Any, x: Blocked, *value: Any, dtype: Any = None, **options: Any) -> Any:
    """A tensor of the same shape and layout."""
    if elsewhere(dtype, options):
        return NotImplemented
    blocks = layout.like(x.blocks, dtype)
    if func is aten.zeros_like.default:
        blocks.zero_()
    elif func is not aten.empty_like.default:
        blocks.fill_(*(value or (1,)))
    return Blocked.of(blocks, x.shape[0])


@handles(*overloads("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"))
def new(func: Any, x: Blocked, *args: Any, **kwargs: Any) -> Tensor:
    """An ordinary tensor of the same type, of whatever shape."""
    result: Tensor = func(torch.empty(0, dtype=x.dtype, device="cpu"), *args, **kwargs)
    return result


# ---- Pointwise operations ----


def inner(x: Any, shape: torch.Size, dtype: torch.dtype) -> Any:
    """What stands for an argument of a pointwise operation among blocks; NotImplemented where nothing does.

    Args:
        x: a Blocked; an ordinary tensor, to be broadcast in batch, channels or positions; or whatever is no tensor.
        shape: of the result, [N, C, H, W].
        dtype: of the result.
    """
    if isinstance(x, Blocked):
        return x.blocks if x.dtype is dtype and x.shape[0] == shape[0] else NotImplemented
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if x.dtype is not dtype or x.dim() > 4 or x.device.type != "cpu":
        return NotImplemented
    x = x[(None,) * (4 - x.dim())]
    return x.unsqueeze(-1) if x.shape[0] == 1 else layout.to_blocks(x)


def _inner_all(args: Any, shape: torch.Size, dtype: torch.dtype) -> list[Any] | None:
    result = [inner(each, shape, dtype) for each in args]
    return None if any(each is NotImplemented for each in result) else result


def broadcast(args: Any) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and type of the result of a pointwise operation, one of whose arguments is blocked."""
    shape: Any = None
    dtype = None
    for x in args:
        if isinstance(x, Tensor):
            if isinstance(x, Blocked):
                dtype = x.dtype
            if shape is None:
                shape = x.shape
            elif x.shape != shape:
                shape = torch.broadcast_shapes(shape, x.shape)
    return None if dtype is None or len(shape) != 4 else (shape, dtype)


def _with_out(name: str) -> tuple[Any, Any]:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default"), getattr(getattr(aten, packet), "out", None)


# By their variant that writes to memory that is given, where the result is as large as the largest argument.
_OUT = dict(map(_with_out, ["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"]))


@handles(
    *overloads(
        *("relu", "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "add.Scalar", "sub.Scalar", "mul.Scalar"),
        *(
            "div.Scalar",
            "rsub.Scalar",
            "rsub.Tensor",
            "neg",
            "abs",
            "exp",
            "log",
            "sqrt",
            "rsqrt",
            "reciprocal",
            "sign",
        ),
        *("pow.Tensor_Scalar", "square", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "sgn"),
        *("gelu", "gelu_backward", "silu", "silu_backward", "leaky_relu", "leaky_relu_backward", "sigmoid"),
        *("sigmoid_backward", "tanh", "tanh_backward", "hardtanh", "hardtanh_backward", "elu", "elu_backward"),
        *("hardswish", "hardswish_backward", "hardsigmoid", "hardsigmoid_backward", "softplus", "softplus_backward"),
        *("mish", "mish_backward", "threshold", "threshold_backward", "_prelu_kernel", "erf", "addcmul"),
    )
)
def pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation on numbers one by one."""
    result = broadcast(args)
    if result is None or "out" in kwargs or "grad_input" in kwargs:
        return NotImplemented
    shape, dtype = result
    within = _inner_all(args, shape, dtype)
    if within is None:
        return NotImplemented
    if func in _OUT and isinstance(args[0], Tensor) and args[0].shape == shape and not any(map(_is_complex, args)):
        return Blocked.of(_OUT[func](*within, out=layout.like(within[0]), **kwargs), shape[0])
    blocks: Tensor = func(*within, **kwargs)
    if blocks.dtype is not dtype:
        return NotImplemented
    return Blocked.of(blocks.contiguous(), shape[0])


def _is_complex(value: Any) -> bool:
    return value.is_complex() if isinstance(value, Tensor) else isinstance(value, complex)


@handles(
    *overloads(
        *("relu_", "add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "add_.Scalar", "sub_.Scalar"),
        *(
            "mul_.Scalar",
            "div_.Scalar",
            "neg_",
            "abs_",
            "exp_",
            "sigmoid_",
            "tanh_",
            "silu_",
            "leaky_relu_",
            "hardtanh_",
        ),
        *("elu_", "hardswish_", "hardsigmoid_", "mish_", "gelu_", "threshold_", "clamp_", "clamp_min_", "clamp_max_"),
        *("zero_", "fill_.Scalar", "bernoulli_.float", "normal_", "uniform_"),
    )
)
def pointwise_in_place(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation on numbers one by one, in place."""
    if not isinstance(x, Blocked) or x._content.dense is not None:
        return NotImplemented
    if any(isinstance(each, Tensor) and torch.broadcast_shapes(each.shape, x.shape) != x.shape for each in args):
        return NotImplemented
    within = _inner_all(args, x.shape, x.dtype)
    if within is None:
        return NotImplemented
    x._content.change()
    func(x.blocks, *within, **kwargs)
    return x


# ---- Several numbers at a time ----


@handles(aten.cat.default)
def cat(func: Any, tensors: list[Tensor], dim: int = 0) -> Any:
    """Concatenation along channels."""
    if dim not in (1, -3):
        return NotImplemented
    whole = tensors[0].shape
    for x in tensors:
        if x.dim() != 4 or x.dtype is not tensors[0].dtype or x.shape[0] != whole[0] or x.shape[2:] != whole[2:]:
            return NotImplemented
    parts = [inner(x, whole, tensors[0].dtype) for x in tensors]
    channels = sum(x.shape[1] for x in tensors)
    first = parts[0].shape
    blocks = empty((first[0], channels, *first[2:]), parts[0].dtype)
    return Blocked.of(torch.cat(parts, 1, out=blocks), whole[0])
