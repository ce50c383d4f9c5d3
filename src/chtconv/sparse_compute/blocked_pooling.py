"""Pooling, sums and means of tensors in the blocked layout."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from chtconv.sparse_compute import layout
from chtconv.sparse_compute.blocked_tensor import Blocked, handles
from chtconv.sparse_compute.memory import empty
from chtconv.sparse_compute.problem import pair

aten = torch.ops.aten
_LARGEST_WINDOW = 255  # positions of a window are kept in a byte


@lru_cache(maxsize=1024)
def _geometry(*numbers: int) -> Any:
    """``geometry`` of csrc/pooling.c.

    Rows, height, width, output height and width; kernel, step, padding, dilation (a pair each); whether averages count
    padding, and what divides them if not 0.
    """
    assert len(numbers) == 15
    return (ctypes.c_int64 * 15)(*numbers)


def _out_size(size: int, kernel: int, step: int, pad: int, dilation: int, ceil: bool) -> int:
    span = size + 2 * pad - dilation * (kernel - 1) - 1
    out = (span + (step - 1 if ceil else 0)) // step + 1
    # No window begins in the padding behind.
    return out - 1 if ceil and (out - 1) * step >= size + pad else out


def _plan(
    x: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil: bool,
    count_pad: bool = True,
    divisor: int = 0,
) -> tuple[tuple[int, int], Any] | None:
    """Output height and width and the geometry; None for what the kernels do not do."""
    (n, c, h, w), kernel, padding, dilation = x.shape, pair(kernel), pair(padding), pair(dilation)
    step = pair(stride) if stride else kernel
    for k, s, p, d in zip(kernel, step, padding, dilation, strict=True):
        if k < 1 or s < 1 or d < 1 or p < 0 or 2 * p > k or (d > 1 and p):
            return None
    out = tuple(_out_size(*each, ceil) for each in zip((h, w), kernel, step, padding, dilation, strict=True))
    if min(out) < 1 or kernel[0] * kernel[1] > 2**31:
        return None
    rows = -(-n // layout.LANES) * c
    geometry = _geometry(rows, h, w, *out, *kernel, *step, *padding, *dilation, int(count_pad), divisor)
    return (out[0], out[1]), geometry


# ---- Maximum ----


class Positions(Tensor):
    """Where maxima are, counted along the rows of the map, as torch gives it: int64 [N, C, H, W].

    Held as one byte each, for the backward pass; every operation gets the numbers themselves.
    """

    chosen: Tensor
    geometry: Any
    held: dict[str, Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(chosen: Tensor, geometry: Any, shape: Sequence[int], held: dict[str, Tensor] | None = None) -> "Positions":
        """Wraps what the kernel wrote.

        Args:
            chosen: tap of each window, uint8 [B, C, H, W, 16].
            geometry: of the pooling.
            shape: [N, C, H, W].
            held: the numbers themselves, once somebody asked; aliases share it.
        """
        result: Positions = Tensor._make_wrapper_subclass(Positions, shape, dtype=torch.int64)
        result.chosen, result.geometry, result.held = chosen, geometry, {} if held is None else held
        return result

    def numbers(self) -> Tensor:
        """As an ordinary tensor, which aliases share."""
        if not self.held:
            _, _, width, out_height, out_width, _, kernel_x, step_y, step_x, pad_y, pad_x, dy, dx, _, _ = self.geometry
            taps = self.chosen.permute(0, 4, 1, 2, 3).flatten(0, 1)[: self.shape[0]].long()
            y = torch.arange(out_height, device="cpu").view(-1, 1) * step_y - pad_y + taps // kernel_x * dy
            x = torch.arange(out_width, device="cpu") * step_x - pad_x + taps % kernel_x * dx
            self.held["numbers"] = y * width + x
        return self.held["numbers"]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.detach.default or func is aten.alias.default:
            return Positions.of(args[0].chosen, args[0].geometry, args[0].shape, args[0].held)
        given: dict[int, Positions] = {}

        def forth(x: Any) -> Any:
            if not isinstance(x, Positions):
                return x
            given[id(x.numbers())] = x
            return x.numbers()

        result = func(*tree_map(forth, tuple(args)), **tree_map(forth, kwargs or {}))
        return tree_map(lambda x: given.get(id(x), x), result)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.numbers())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.numbers().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        """As an array."""
        return self.numbers().numpy(force=force)

    def tolist(self) -> Any:
        """As lists of numbers."""
        return self.numbers().tolist()


@handles(aten.max_pool2d_with_indices.default)
def max_pool(
    func: Any, x: Blocked, kernel: Any, stride: Any = (), padding: Any = (0,), dilation: Any = (1,), ceil: bool = False
) -> Any:
    """The greatest number of each window."""
    plan = _plan(x, kernel, stride, padding, dilation, ceil)
    if plan is None or kernel[0] * kernel[-1] > _LARGEST_WINDOW:
        return NotImplemented
    (height, width), geometry = plan
    shape = (*x.blocks.shape[:2], height, width, layout.LANES)
    result, chosen = empty(shape, x.dtype), empty(shape, torch.uint8)
    layout.kernels().call("max_pool", x.dtype, geometry, x.blocks, result, chosen)
    pooled = Blocked.of(result, x.shape[0])
    return pooled, Positions.of(chosen, geometry, pooled.shape)


@handles(aten.max_pool2d_with_indices_backward.default)
def max_pool_backward(func: Any, gradient: Tensor, x: Any, *rest: Any) -> Any:
    """To where the greatest numbers were."""
    where = rest[-1]
    if not isinstance(where, Positions) or not isinstance(x, Blocked) or where.held or gradient.dtype is not x.dtype:
        return NotImplemented
    result = layout.like(x.blocks)
    blocks = gradient.blocks if isinstance(gradient, Blocked) else layout.to_blocks(gradient)
    layout.kernels().call("max_pool_backward", x.dtype, where.geometry, blocks, where.chosen, result)
    return Blocked.of(result, x.shape[0])


# ---- Averages ----


@handles(aten.avg_pool2d.default)
def average_pool(
    func: Any,
    x: Blocked,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0,),
    ceil: bool = False,
    count_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    """The mean of each window."""
    if divisor == 0:
        return NotImplemented
    plan = _plan(x, kernel, stride, padding, (1,), ceil, count_pad, divisor or 0)
    return NotImplemented if plan is None else _averaged(x, plan)


def _averaged(x: Blocked, plan: tuple[tuple[int, int], Any]) -> Blocked:
    (height, width), geometry = plan
    result = empty((*x.blocks.shape[:2], height, width, layout.LANES), x.dtype)
    layout.kernels().call("average_pool", x.dtype, geometry, x.blocks, result)
    return Blocked.of(result, x.shape[0])


@handles(aten.avg_pool2d_backward.default)
def average_pool_backward(
    func: Any,
    gradient: Tensor,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool,
    count_pad: bool,
    divisor: Any,
) -> Any:
    """An equal share to all of a window."""
    if not isinstance(x, Blocked) or gradient.dtype is not x.dtype or divisor == 0:
        return NotImplemented
    plan = _plan(x, kernel, stride, padding, (1,), ceil, count_pad, divisor or 0)
    return NotImplemented if plan is None else _shared(gradient, x, plan[1])


def _shared(gradient: Tensor, x: Blocked, geometry: Any) -> Blocked:
    result = layout.like(x.blocks)
    blocks = gradient.blocks if isinstance(gradient, Blocked) else layout.to_blocks(gradient)
    layout.kernels().call("average_pool_backward", x.dtype, geometry, blocks, result)
    return Blocked.of(result, x.shape[0])


def _adaptive(x: Tensor, height: int, width: int) -> Any:
    """The plan of an adaptive pooling whose windows are equal; None where they are not."""
    if height < 1 or width < 1 or x.shape[2] % height or x.shape[3] % width:
        return None
    kernel = (x.shape[2] // height, x.shape[3] // width)
    return _plan(x, kernel, kernel, (0,), (1,), False) if min(kernel) else None


@handles(aten._adaptive_avg_pool2d.default)
def adaptive_average_pool(func: Any, x: Blocked, size: Sequence[int]) -> Any:
    """The mean of each window, where these are of equal size."""
    plan = _adaptive(x, *size)
    return NotImplemented if plan is None else _averaged(x, plan)


@handles(aten._adaptive_avg_pool2d_backward.default)
def adaptive_average_pool_backward(func: Any, gradient: Tensor, x: Any) -> Any:
    """An equal share to all of a window, where windows are of equal size."""
    if not isinstance(x, Blocked) or gradient.dtype is not x.dtype:
        return NotImplemented
    plan = _adaptive(x, *gradient.shape[2:])
    return NotImplemented if plan is None else _shared(gradient, x, plan[1])


# ---- Sums and means ----


def _of_maps(x: Blocked, divisor: int) -> Tensor | None:
    """Sums of all positions divided by a number, [N, C]."""
    if not x.numel():
        return None
    plan = _plan(x, x.shape[2:], (), (0,), (1,), False, True, divisor)
    return None if plan is None else layout.lanes_first(_averaged(x, plan).blocks, x.shape[0])


@handles(aten.mean.dim, aten.sum.dim_IntList)
def reduced(func: Any, x: Blocked, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Over positions, and over images as well: an ordinary tensor."""
    if not all(-4 <= each < 4 for each in (dim or ())):
        return NotImplemented
    axes = sorted(each % 4 for each in (dim or range(4)))
    if dtype not in (None, x.dtype) or axes not in ([2, 3], [0, 2, 3], [0, 1, 2, 3]):
        return NotImplemented
    mean = func is aten.mean.dim
    result = _of_maps(x, x.shape[2] * x.shape[3] if mean else 1)
    if result is None:
        return NotImplemented
    over = tuple(axis for axis in axes if axis < 2)
    if over:
        result = result.mean(over) if mean else result.sum(over)
    return result.view([1 if axis in axes else x.shape[axis] for axis in range(4)]) if keepdim else result


@handles(aten.sum.default, aten.mean.default)
def reduced_to_one(func: Any, x: Blocked, *, dtype: Any = None) -> Any:
    """Of all numbers."""
    return reduced(aten.mean.dim if func is aten.mean.default else aten.sum.dim_IntList, x, None, dtype=dtype)
