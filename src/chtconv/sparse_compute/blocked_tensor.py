"""The tensor in the blocked layout: what it holds, what becomes of operations on it, and conversion from and to others.

Memory is a contiguous ``blocks`` of shape [B, C, H, W, 16] with B = ceil(N / 16): image n is lane n % 16 of block
n // 16. Lanes beyond N hold anything. Aliases (``detach``, what autograd saves) share one :class:`Content`, so that
what changes one of them in place changes all.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from chtconv.errors import ConfigurationError
from chtconv.sparse_compute import layout
from chtconv.sparse_compute.blocked_content import Content

TYPES = (torch.float32, torch.float64)


class Blocked(Tensor):
    """An activation [N, C, H, W] in the blocked layout, float32 or float64, on the CPU.

    To modules, hooks and autograd it is an ordinary tensor. Operations that know the layout (batch norm, ReLU and other
    pointwise functions, pooling, addition, concatenation, means) give such a tensor again; every other one gets an
    ordinary copy and gives ordinary tensors. Views share memory with it, as always: the first one moves the numbers to
    ordinary memory, from where every later use of the layout copies them again if they changed.

    What dropout draws is as random as elsewhere, but not what the same seed draws for ordinary tensors. The gradient of
    an ordinary leaf tensor that meets one of these in an addition or product may be a Blocked. Pickled, as an array and
    through DLPack, it is an ordinary copy. Its numbers have no address: ``data_ptr``, ``untyped_storage`` and
    ``torch.utils.dlpack.to_dlpack``, the old one, do not work.

    >>> x = to_blocked(torch.arange(16.0).view(8, 2, 1, 1))
    >>> x.shape, x.blocks.shape
    (torch.Size([8, 2, 1, 1]), torch.Size([1, 2, 1, 1, 16]))
    >>> torch.relu(x - 8).sum()
    tensor(28.)
    """

    _content: Content

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(blocks: Tensor, batch: int) -> "Blocked":
        """Wraps blocks without a copy.

        Args:
            blocks: [B, C, H, W, 16], contiguous, float32 or float64.
            batch: N, with B = ceil(N / 16).
        """
        return make(Content(blocks), (batch, *blocks.shape[1:4]), blocks.dtype)

    @property
    def blocks(self) -> Tensor:
        """[B, C, H, W, 16], contiguous, without a gradient. To be read, not written."""
        return self._content.blocks(self)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(func, *args, **kwargs) if kwargs else handler(func, *args)
            if result is not NotImplemented:
                return result
        return densely(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        more = f", grad_fn=<{self.grad_fn.name()}>" if self.grad_fn else ", requires_grad=True" * self.requires_grad
        return f"Blocked({to_dense(self.detach())!r}{more})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        dense = to_dense(self.detach())
        return dense.requires_grad_(self.requires_grad and self.is_leaf).__reduce_ex__(protocol)

    @property
    def data(self) -> Any:
        """The same numbers outside of autograd, which does not notice when they are written to."""
        # Views of it have a version of their own, so that ours tells nothing.
        self._content.watched = False
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__get__(self).copy_(value)  # type: ignore[attr-defined]

    def numpy(self, *, force: bool = False) -> Any:
        """A copy, as an array."""
        return to_dense(self).numpy(force=force)

    def tolist(self) -> Any:
        """As lists of numbers."""
        return to_dense(self.detach()).tolist()

    def __array__(self, dtype: Any = None) -> Any:
        return to_dense(self).__array__(dtype)

    def __dlpack__(self, **options: Any) -> Any:
        return to_dense(self).__dlpack__(**options)

    def apply_(self, function: Callable[[float], float]) -> "Blocked":
        """Replaces every number by what a Python function makes of it; outside of autograd, as for other tensors."""
        if self.requires_grad:
            raise RuntimeError("apply_ of an activation that requires grad: accepted is x.detach().apply_(function).")
        self.copy_(to_dense(self.detach()).apply_(function))
        return self

    def share_memory_(self) -> Any:
        """Refused: blocks stay in the memory of this process."""
        raise ConfigurationError(
            f"an activation of shape {tuple(self.shape)} in the blocked layout has no shared memory: accepted is an "
            "ordinary copy, to_dense(x).share_memory_()."
        )


Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}
"""The operations that know the layout."""


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Enters what is decorated in the table of operations that know the layout.

    It is called with the operation and its arguments, at least one of them a Blocked, below autograd. It returns the
    result, or NotImplemented where it cannot, before it has changed anything.
    """

    def enter(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return enter


def make(content: Content, shape: Sequence[int], dtype: torch.dtype) -> Blocked:
    """A tensor with this content."""
    result: Blocked = Tensor._make_wrapper_subclass(Blocked, shape, dtype=dtype)
    result._content = content
    return result


def ordinary(x: Blocked) -> Tensor:
    """The numbers as an ordinary tensor, for use below autograd: a copy, or the memory that views share."""
    content = x._content
    return content.dense if content.dense is not None else layout.to_strided(content.blocks(x), x.shape[0])


def densely(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Runs an operation that does not know the layout on ordinary tensors, and writes back what it changed."""
    schema = func._schema
    is_view = not schema.is_mutable and any(each.alias_info is not None for each in schema.returns)
    changed = _written(schema, args, kwargs) if schema.is_mutable else []
    for x in changed:
        x._content.change()
    stand_ins: dict[int, tuple[Blocked, Tensor]] = {}

    def forth(x: Any) -> Any:
        if not isinstance(x, Blocked):
            return x
        if id(x._content) not in stand_ins:
            stand_ins[id(x._content)] = x, x._content.reveal(x.shape[0], x) if is_view else ordinary(x)
        return stand_ins[id(x._content)][1]

    result = func(*tree_map(forth, tuple(args)), **tree_map(forth, kwargs))
    for x in changed:
        dense = stand_ins[id(x._content)][1]
        if dense.shape != x.shape:
            raise ConfigurationError(
                f"{func} changed the shape of an activation in the blocked layout from {tuple(x.shape)} to "
                f"{tuple(dense.shape)} in place: accepted are operations that keep it. Call to_dense first."
            )
        if x._content.dense is None:
            x._content.fill(layout.to_blocks(dense))
    originals = {id(dense): x for x, dense in stand_ins.values()}

    def back(each: Any) -> Any:
        if not isinstance(each, Tensor) or id(each) not in originals:
            return each
        return each.detach() if is_view else originals[id(each)]

    return tree_map(back, result)


def _written(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Blocked]:
    """The arguments that an operation changes in place."""
    named = dict(zip((each.name for each in schema.arguments), args, strict=False)) | kwargs
    written: list[Any] = []
    for each in schema.arguments:
        if each.alias_info is not None and each.alias_info.is_write:
            given = named.get(each.name)
            written += given if isinstance(given, list | tuple) else [given]
    return [x for x in written if isinstance(x, Blocked)]


class _ToBlocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Blocked.of(layout.to_blocks(x), x.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return to_dense(gradients[0])


class _ToDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        dense: Tensor | None = x._content.dense
        return ordinary(x) if dense is None else dense.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return to_blocked(gradients[0])


def to_blocked(x: Tensor) -> Blocked:
    """The tensor in the blocked layout; a copy, differentiable. A Blocked is returned as it is.

    Args:
        x: [N, C, H, W] of any strides, float32 or float64, on the CPU.

    Raises:
        ConfigurationError: it is something else, or there are no compiled kernels.
    """
    if isinstance(x, Blocked):
        return x
    if x.dim() != 4 or x.dtype not in TYPES or x.device.type != "cpu":
        raise ConfigurationError(
            f"a tensor of shape {tuple(x.shape)}, {x.dtype}, on {x.device} has no blocked layout: accepted are "
            "[N, C, H, W], float32 or float64, on the CPU."
        )
    result: Blocked = _ToBlocked.apply(x)  # type: ignore[no-untyped-call]
    return result


def to_dense(x: Tensor) -> Tensor:
    """The tensor as an ordinary, contiguous one; differentiable. A copy where it was not."""
    if not isinstance(x, Blocked):
        return x.contiguous()
    result: Tensor = _ToDense.apply(x)  # type: ignore[no-untyped-call]
    return result


def as_blocks(x: Tensor) -> Tensor:
    """The blocks [B, C, H, W, 16] of a Blocked, or those of a conversion. Not differentiable; not to be written to."""
    return x._content.blocks(x) if isinstance(x, Blocked) else layout.to_blocks(x.detach())
